import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from point3r_jax.errors import InputError
from point3r_jax.evaluation.pose import (
  DegenerateTrajectoryError,
  PoseOptions,
  align_poses,
  associate,
  compare_trajectories,
  fit_similarity,
  pose_metrics,
  procrustes,
)
from point3r_jax.evaluation.sequences import Trajectory
from tests.goldens import FOLDER

_settings = settings(deadline=None, max_examples=30)
_seeds = st.integers(0, 1000)
_NAMES = ("ate", "rpe_trans", "rpe_rot_deg")
_UNALIGNED = PoseOptions(align="none")


def _trajectory(positions, rotations, stamps=None):
  poses = np.tile(np.eye(4), (len(positions), 1, 1))
  poses[:, :3, :3] = rotations.as_matrix()
  poses[:, :3, 3] = positions
  if stamps is None:
    stamps = np.arange(len(positions), dtype=np.float64)
  return Trajectory(stamps, poses)


def _walk(seed, count=12):
  """A random path and a noisy version of it."""
  rng = np.random.default_rng(seed)
  positions = np.cumsum(rng.normal(size=(count, 3)), axis=0)
  rotations = Rotation.random(count, random_state=seed)
  noise = Rotation.from_rotvec(rng.normal(scale=0.05, size=(count, 3)))
  shift = rng.normal(scale=0.1, size=(count, 3))
  truth = _trajectory(positions, rotations)
  return truth, _trajectory(positions + shift, rotations * noise)


def _straight(count=5):
  """One metre a frame along x, without turning: no alignment exists."""
  positions = np.arange(count)[:, None] * [1.0, 0, 0]
  return _trajectory(positions, Rotation.identity(count))


def _moved(trajectory, seed, scale):
  """The same path in another frame and unit."""
  rotation = Rotation.random(random_state=seed).as_matrix()
  poses = trajectory.camera_to_world.copy()
  poses[:, :3, :3] = rotation @ poses[:, :3, :3]
  poses[:, :3, 3] = scale * poses[:, :3, 3] @ rotation.T + [3, -2, seed]
  return trajectory._replace(camera_to_world=poses)


def test_metrics_are_the_published_ones():
  with np.load(FOLDER / "evaluation.npz") as file:
    rows = [file["pose/gt"], file["pose/pred"]]
    results = json.loads(str(file["pose/results"]))
  # Rows are translation and quaternion, real part first.
  truth, prediction = (
    _trajectory(row[:, :3], Rotation.from_quat(np.roll(row[:, 3:], -1, axis=1)))
    for row in rows
  )
  expected = dict(zip(_NAMES, results.values(), strict=True))
  metrics = pose_metrics(truth, prediction)
  assert metrics == pytest.approx(expected, rel=1e-6)


def test_metrics_by_hand():
  truth = _straight()
  poses = truth.camera_to_world.copy()
  poses[2, :3, 3] += [0, 0.3, 0.4]
  turn = Rotation.from_euler("z", 10, degrees=True).as_matrix()
  poses[4, :3, :3] = turn
  comparison = compare_trajectories(
    truth, truth._replace(camera_to_world=poses), _UNALIGNED
  )
  np.testing.assert_allclose(comparison.position_errors, [0, 0, 0.5, 0, 0])
  assert comparison.metrics == pytest.approx(
    {
      "ate": 0.5 / np.sqrt(5),
      "rpe_trans": 0.5 * np.sqrt(2 / 4),  # The motions to and from frame 2.
      "rpe_rot_deg": 10 * np.sqrt(1 / 4),
    }
  )


@pytest.mark.parametrize(
  ("all_pairs", "first"), ((True, (0, 1, 2)), (False, (0, 2)))
)
def test_longer_relative_motions(all_pairs, first):
  truth = _straight(5)
  poses = truth.camera_to_world.copy()
  poses[1, :3, 3] += [0, 1, 0]
  options = PoseOptions(align="none", delta=2, all_pairs=all_pairs)
  metrics = pose_metrics(truth, truth._replace(camera_to_world=poses), options)
  hit = sum(1 in (start, start + 2) for start in first)
  assert metrics["rpe_trans"] == pytest.approx(np.sqrt(hit / len(first)))


@_settings
@given(_seeds, _seeds, st.floats(0.01, 100))
def test_frame_and_unit_of_the_prediction_do_not_matter(seed, other, scale):
  truth, prediction = _walk(seed)
  expected = pose_metrics(truth, prediction)
  again = pose_metrics(truth, _moved(prediction, other, scale))
  assert again == pytest.approx(expected, rel=1e-6)
  exact = pose_metrics(truth, _moved(truth, other, scale))
  assert exact == pytest.approx(dict.fromkeys(_NAMES, 0), abs=1e-5)


@_settings
@given(_seeds, _seeds)
def test_without_scale_the_unit_matters(seed, other):
  truth, prediction = _walk(seed)
  rigid = PoseOptions(align="se3")
  expected = pose_metrics(truth, prediction, rigid)
  again = pose_metrics(truth, _moved(prediction, other, 1), rigid)
  assert again == pytest.approx(expected, rel=1e-6)
  ate = [
    pose_metrics(truth, prediction, PoseOptions(align=align))["ate"]
    for align in ("sim3", "se3", "none")
  ]
  assert ate == sorted(ate)


@_settings
@given(_seeds, st.floats(-0.1, 0.1), st.integers(0, 2), st.floats(-0.1, 0.1))
def test_alignment_is_the_best(seed, angle, axis, stretch):
  truth, prediction = _walk(seed)
  aligned = align_poses(prediction.camera_to_world, truth.camera_to_world)
  positions, goal = aligned[:, :3, 3], truth.camera_to_world[:, :3, 3]
  mean = positions.mean(axis=0)
  np.testing.assert_allclose(mean, goal.mean(axis=0), atol=1e-9)
  turn = Rotation.from_rotvec(angle * np.eye(3)[axis]).as_matrix()
  other = (1 + stretch) * (positions - mean) @ turn.T + mean
  error = np.sum((positions - goal) ** 2)
  assert error <= np.sum((other - goal) ** 2) * (1 + 1e-9)
  rotation = aligned[:, :3, :3]
  product = rotation @ rotation.transpose(0, 2, 1)
  np.testing.assert_allclose(product, np.tile(np.eye(3), (12, 1, 1)), atol=1e-9)


def test_a_mirrored_path_is_turned_and_not_mirrored():
  points = np.random.default_rng(0).normal(size=(20, 3))
  fit = fit_similarity(points, points * [1, 1, -1])
  assert np.linalg.det(fit.rotation) == pytest.approx(1)
  assert fit.scale < 1


@pytest.mark.parametrize("align", ("sim3", "se3"))
@pytest.mark.parametrize("count", (1, 2, 9))
def test_a_path_on_a_line_has_no_alignment(align, count):
  path = _straight(count)
  _, other = _walk(0, count)
  options = PoseOptions(align=align)
  for truth, prediction in ((path, path), (path, other), (other, path)):
    with pytest.raises(DegenerateTrajectoryError):
      pose_metrics(truth, prediction, options)
  if count > 1:
    assert pose_metrics(path, path, _UNALIGNED)["ate"] == 0


def test_a_standing_camera_has_no_alignment():
  truth, _ = _walk(0)
  still = _trajectory(np.zeros((12, 3)), Rotation.identity(12))
  for align in ("sim3", "se3"):
    with pytest.raises(DegenerateTrajectoryError):
      pose_metrics(truth, still, PoseOptions(align=align))


def test_too_few_poses_for_a_relative_motion():
  truth, prediction = _walk(0, 3)
  with pytest.raises(InputError, match="over 3 frames"):
    pose_metrics(truth, prediction, PoseOptions(delta=3))


def test_equally_many_poses_belong_together_whatever_their_timestamps():
  truth, prediction = _walk(0)
  stamps = 1.3e9 + np.arange(12) / 30
  stamped = truth._replace(timestamps=stamps)
  comparison = compare_trajectories(stamped, prediction)
  assert comparison.metrics == pose_metrics(truth, prediction)
  np.testing.assert_array_equal(comparison.aligned.timestamps, stamps)
  own = PoseOptions(take_over_timestamps=False)
  with pytest.raises(InputError, match=r"within 0\.01 s"):
    pose_metrics(stamped, prediction, own)
  # One pose less, and the timestamps stay what they are.
  shorter = Trajectory(*(values[:-1] for values in prediction))
  with pytest.raises(InputError, match=r"11 predicted, 12 true"):
    pose_metrics(stamped, shorter)


def _on_a_line(stamps):
  """Poses whose x is their timestamp."""
  stamps = np.asarray(stamps, np.float64)
  positions = stamps[:, None] * [1, 0, 0]
  return _trajectory(positions, Rotation.identity(len(stamps)), stamps)


def test_association_by_time():
  truth = _on_a_line([0, 0.1, 0.2, 0.3, 0.4])
  prediction = _on_a_line([0.004, 0.108, 0.215, 0.39])
  options = PoseOptions(max_timestamp_difference=0.0101)
  pairs = associate(truth, prediction, options)
  np.testing.assert_array_equal(pairs[0].timestamps, [0, 0.1, 0.4])
  np.testing.assert_array_equal(pairs[1].timestamps, [0.004, 0.108, 0.39])
  for trajectory in pairs:
    positions = trajectory.camera_to_world[:, 0, 3]
    np.testing.assert_array_equal(positions, trajectory.timestamps)
  # The roles do not matter, and the nearest of a longer one is taken.
  swapped = associate(prediction, truth, options)
  np.testing.assert_array_equal(swapped[0].timestamps, pairs[1].timestamps)
  dense = _on_a_line(np.arange(0, 0.5, 0.003))
  pairs = associate(truth, dense)
  np.testing.assert_array_equal(pairs[0].timestamps, truth.timestamps)
  difference = np.abs(pairs[1].timestamps - truth.timestamps)
  assert difference.max() <= 0.0015 + 1e-9


def test_true_poses_that_are_not_finite():
  truth, prediction = _walk(0)
  truth.camera_to_world[[3, 7]] = -np.inf
  with pytest.raises(InputError, match=r"2 of 12 true poses.*frame 3.*drop"):
    pose_metrics(truth, prediction)
  drop = PoseOptions(non_finite_truth="drop")
  comparison = compare_trajectories(truth, prediction, drop)
  kept = np.delete(np.arange(12), [3, 7])
  np.testing.assert_array_equal(comparison.truth.timestamps, kept)
  expected = pose_metrics(
    Trajectory(*(values[kept] for values in truth)),
    Trajectory(*(values[kept] for values in prediction)),
  )
  assert comparison.metrics == expected
  truth.camera_to_world[:] = np.nan
  with pytest.raises(InputError, match="0 true"):
    pose_metrics(truth, prediction, drop)


def test_poses_that_are_refused():
  truth, prediction = _walk(0)
  broken = prediction.camera_to_world.copy()
  broken[5, 0, 0] = np.nan
  with pytest.raises(InputError, match=r"1 of 12 predicted.*frame 5"):
    pose_metrics(truth, prediction._replace(camera_to_world=broken))
  scaled = truth.camera_to_world.copy()
  scaled[4, :3, :3] *= 2
  with pytest.raises(InputError, match="1 of 12 true poses are no rotations"):
    pose_metrics(truth._replace(camera_to_world=scaled), prediction)
  mirrored = truth.camera_to_world * [[1], [1], [-1], [1]]
  with pytest.raises(InputError, match="12 of 12 predicted poses are no"):
    pose_metrics(truth, truth._replace(camera_to_world=mirrored))
  column = truth._replace(timestamps=truth.timestamps[:, None])
  with pytest.raises(InputError, match=r"the true trajectory.*\(12, 1\)"):
    pose_metrics(column, prediction)


@pytest.mark.parametrize(
  "option", ({"align": "sim2"}, {"delta": 0}, {"non_finite_truth": "ignore"})
)
def test_options_that_are_refused(option):
  with pytest.raises(InputError, match=next(iter(option))):
    PoseOptions(**option)


@_settings
@given(_seeds)
def test_procrustes_finds_a_motion_despite_worthless_points(seed):
  rng = np.random.default_rng(seed)
  points = rng.normal(size=(5, 6, 3))
  pose = _moved(_straight(1), seed, 1).camera_to_world[0]
  moved = points @ pose[:3, :3].T + pose[:3, 3]
  np.testing.assert_allclose(procrustes(points, moved), pose, atol=1e-9)
  weights = rng.uniform(0.1, 1, (5, 6))
  weights[0], moved[0] = 0, 100
  found = procrustes(points, moved, weights)
  np.testing.assert_allclose(found, pose, atol=1e-9)
  # A weight of two is a point given twice.
  moved += rng.normal(scale=0.1, size=moved.shape)
  twice = procrustes(np.tile(points, (2, 1, 1)), np.tile(moved, (2, 1, 1)))
  doubled = procrustes(points, moved, np.full((5, 6), 2))
  np.testing.assert_allclose(twice, doubled, atol=1e-9)


def test_procrustes_has_no_scale():
  points = np.random.default_rng(0).normal(size=(9, 3))
  found = procrustes(points, points * 3)
  np.testing.assert_allclose(found[:3, :3], np.eye(3), atol=1e-9)


def test_procrustes_of_points_that_determine_nothing():
  points = np.ones((4, 4, 3))
  with pytest.raises(DegenerateTrajectoryError):
    procrustes(points, points)
  with pytest.raises(InputError, match="add up to nothing"):
    procrustes(points, points, np.zeros((4, 4)))


def test_relative_motions_may_be_aligned_otherwise():
  truth, prediction = _paths(scale=2.0)
  usual = pose_metrics(truth, prediction)
  apart = pose_metrics(truth, prediction, PoseOptions(rpe_align="none"))
  assert apart["ate"] == usual["ate"]
  steps = np.diff(truth.camera_to_world[:, :3, 3], axis=0)
  expected = np.sqrt((np.linalg.norm(steps, axis=1) ** 2).mean())
  assert apart["rpe_trans"] == pytest.approx(expected, rel=1e-6)
  assert usual["rpe_trans"] < 1e-9
  with pytest.raises(InputError, match="rpe_align must be"):
    PoseOptions(rpe_align="umeyama")


def _paths(scale):
  """Returns a path without turns, and the same in another unit."""
  rng = np.random.default_rng(0)
  poses = np.tile(np.eye(4), (9, 1, 1))
  poses[:, :3, 3] = rng.normal(size=(9, 3))
  larger = poses.copy()
  larger[:, :3, 3] *= scale
  stamps = np.arange(9.0)
  return Trajectory(stamps, poses), Trajectory(stamps, larger)
