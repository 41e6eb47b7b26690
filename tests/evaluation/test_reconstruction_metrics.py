import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from point3r_jax.errors import InputError
from point3r_jax.evaluation.clouds import estimate_normals, icp
from point3r_jax.evaluation.reconstruction import (
  ReconstructionOptions,
  evaluate_reconstruction,
  used_pixels,
)
from point3r_jax.evaluation.sequences import PointView
from tests.goldens import FOLDER

_settings = settings(deadline=None, max_examples=15)
_NO_ICP = {"icp_iterations": 0, "normal_neighbors": 9}


@pytest.fixture(scope="module")
def golden():
  """The published results, and ours."""
  with np.load(FOLDER / "evaluation.npz") as file:
    keys = [key for key in file if key.startswith("recon/")]
    arrays = {key.removeprefix("recon/"): file[key] for key in keys}
  views = (
    PointView(
      arrays[f"gt{t}/pts3d"].astype(np.float32),
      arrays[f"gt{t}/valid_mask"],
      arrays[f"gt{t}/camera_pose"],
    )
    for t in range(3)
  )
  predictions = (arrays[f"pred{t}/pts3d"] for t in range(3))
  results = json.loads(str(arrays["results"]))
  return results, evaluate_reconstruction(views, predictions)


def test_metrics_are_the_published_ones(golden):
  results, ours = golden
  names = {
    "accuracy": "acc",
    "completeness": "comp",
    "nc1": "nc1",
    "nc2": "nc2",
  }
  expected = {
    our + end: results[their + short]
    for our, their in names.items()
    for end, short in (("", ""), ("_median", "_med"))
  }
  for end in ("", "_median"):
    both = expected[f"nc1{end}"] + expected[f"nc2{end}"]
    expected[f"normal_consistency{end}"] = both / 2
  assert ours.metrics == pytest.approx(expected, rel=1e-4)


def test_alignment_is_the_published_one(golden):
  results, ours = golden
  keys = ("gt_shift_z", "pred_shift_z", "gt_scale", "pred_scale")
  expected = tuple(results[key] for key in keys)
  assert ours.medians == pytest.approx(expected, rel=1e-6)
  np.testing.assert_allclose(
    ours.icp.transformation, results["icp_transformation"], atol=1e-6
  )
  assert ours.icp.fitness == pytest.approx(results["icp_fitness"], rel=1e-6)
  rmse = results["icp_inlier_rmse"]
  assert ours.icp.inlier_rmse == pytest.approx(rmse, rel=1e-6)
  assert len(ours.true_points) == len(ours.predicted_points) == 52658


def _scene(frames=2, size=(20, 24), seed=0):
  """Views of a curved surface, and the same points for the first camera."""
  rng = np.random.default_rng(seed)
  turn = Rotation.random(random_state=seed).as_matrix()
  first = np.eye(4)
  first[:3, :3], first[:3, 3] = turn, rng.normal(size=3)
  height, width = size
  views, maps = [], []
  for frame in range(frames):
    v, u = np.mgrid[:height, :width] / 10.0
    z = 3 + 0.3 * np.sin(2 * u + frame) * np.cos(v)
    points = np.stack([u + 0.7 * frame - 1, v - 1, z], axis=-1)
    maps.append(points.astype(np.float32))
    world = points @ turn.T + first[:3, 3]
    valid = rng.random(size) < 0.9
    views.append(
      PointView(world.astype(np.float32), valid, first.astype(np.float32))
    )
  return views, maps


def _evaluate(views, maps, confidences=None, **options):
  options = ReconstructionOptions(**{**_NO_ICP, **options})
  grid = options.crop, options.pixel_stride
  used = used_pixels(maps[0].shape[:2], *grid) if maps else ()
  return evaluate_reconstruction(
    views,
    [points[used] for points in maps],
    options,
    confidences and [confidence[used] for confidence in confidences],
  )


@_settings
@given(st.floats(0.1, 10), st.floats(-1, 1), st.integers(0, 20))
def test_scale_and_shift_in_depth_do_not_matter(scale, shift, seed):
  views, maps = _scene(seed=seed)
  moved = [scale * points + np.array([0, 0, shift]) for points in maps]
  result = _evaluate(views, moved)
  # The shift is found from the depths alone, so that it is exact.
  assert result.metrics["accuracy"] < 1e-5
  assert result.metrics["completeness"] < 1e-5
  assert result.metrics["normal_consistency"] > 0.99
  assert result.medians.predicted_scale == pytest.approx(
    scale * result.medians.true_scale, rel=1e-4
  )
  assert result.icp.fitness == 1


def test_icp_undoes_what_medians_cannot():
  views, maps = _scene()
  turn = Rotation.from_euler("xyz", [0.2, -0.3, 0.4], degrees=True).as_matrix()
  moved = [points @ turn.T for points in maps]
  without = _evaluate(views, moved)
  result = _evaluate(views, moved, icp_iterations=30)
  assert result.metrics["accuracy"] < without.metrics["accuracy"] / 3
  assert result.icp.inlier_rmse < without.icp.inlier_rmse / 3
  np.testing.assert_array_equal(without.icp.transformation, np.eye(4))


def test_metrics_by_brute_force():
  views, maps = _scene()
  rng = np.random.default_rng(0)
  noisy = [
    points + rng.normal(scale=0.03, size=points.shape) for points in maps
  ]
  result = _evaluate(views, noisy)
  truth = np.concatenate([view.points[view.valid] for view in views])
  np.testing.assert_allclose(result.true_points, truth, atol=1e-5)
  difference = result.predicted_points[:, None] - truth[None]
  distance = np.linalg.norm(difference, axis=-1)
  accuracy, completeness = distance.min(axis=1), distance.min(axis=0)
  np.testing.assert_allclose(result.predicted_distances, accuracy, atol=1e-5)
  np.testing.assert_allclose(result.true_distances, completeness, atol=1e-5)
  metrics = result.metrics
  assert metrics["accuracy"] == pytest.approx(accuracy.mean(), abs=1e-5)
  median = np.median(completeness)
  assert metrics["completeness_median"] == pytest.approx(median, abs=1e-5)
  extent = truth.max(axis=0) - truth.min(axis=0)
  assert result.scene_size == pytest.approx(np.linalg.norm(extent), rel=1e-5)


def test_only_the_centre_is_scored_and_all_is_aligned():
  views, maps = _scene(size=(21, 24))
  everything = _evaluate(views, maps, crop=None)
  centre = _evaluate(views, maps, crop=8)
  expected = [view.points[6:14, 8:16][view.valid[6:14, 8:16]] for view in views]
  np.testing.assert_allclose(
    centre.true_points, np.concatenate(expected), atol=1e-5
  )
  assert centre.medians == everything.medians
  # A crop larger than the map is the map.
  large = _evaluate(views, maps, crop=224)
  np.testing.assert_array_equal(large.true_points, everything.true_points)


@pytest.mark.parametrize("stride", (2, 3))
def test_strided_pixels_include_the_centres(stride):
  views, maps = _scene(size=(21, 25))
  strided = _evaluate(views, maps, crop=10, pixel_stride=stride)
  top, left = 21 // 2 - 5, 25 // 2 - 5
  pick = (
    slice(top, top + 10, stride),
    slice(left, left + 10, stride),
  )
  expected = [view.points[pick][view.valid[pick]] for view in views]
  np.testing.assert_allclose(
    strided.true_points, np.concatenate(expected), atol=1e-5
  )
  # The alignment uses every such pixel of the map, not the centre alone.
  everything = tuple(
    slice(first % stride, None, stride) for first in (top, left)
  )
  depth = [
    points[everything][view.valid[everything]][:, 2]
    for view, points in zip(views, maps, strict=True)
  ]
  depth = np.sort(np.concatenate(depth))
  median = depth[(len(depth) - 1) // 2]
  assert strided.medians.predicted_shift == pytest.approx(median, rel=1e-6)


def test_unconfident_predictions_are_not_scored():
  views, maps = _scene()
  wrong = [points.copy() for points in maps]
  confidences = [np.full((20, 24), 3.0) for _ in maps]
  wrong[0][5, 3:9] += 10
  confidences[0][5, 3:9] = 1
  result = _evaluate(views, wrong, confidences, min_confidence=2)
  missing = views[0].valid[5, 3:9].sum()
  count = sum(view.valid.sum() for view in views)
  assert len(result.true_points) == count
  assert len(result.predicted_points) == count - missing
  everything = _evaluate(views, wrong, confidences)
  assert everything.metrics["accuracy"] > 10 * result.metrics["accuracy"]
  first, second = everything.frame_accuracy
  assert first > 10 * second
  assert np.average(
    [first, second], weights=[view.valid.sum() for view in views]
  ) == pytest.approx(everything.metrics["accuracy"])
  with pytest.raises(InputError, match="needs confidences"):
    _evaluate(views, maps, min_confidence=2)
  with pytest.raises(InputError, match="no pixel to score"):
    _evaluate(views, maps, confidences, min_confidence=4)


def test_the_predicted_scale_is_bounded():
  views, maps = _scene()
  tiny = [points * 1e-6 for points in maps]
  result = _evaluate(views, tiny)
  assert result.medians.predicted_scale == pytest.approx(1e-3)
  assert result.metrics["accuracy"] < result.metrics["completeness"]


def test_a_prediction_that_is_one_point():
  views, maps = _scene()
  result = _evaluate(views, [0 * points + 1 for points in maps])
  assert all(np.isfinite(value) for value in result.metrics.values())


def test_inputs_that_are_refused():
  views, maps = _scene()
  broken = [maps[0], maps[1].copy()]
  broken[1][views[1].valid] = np.nan
  count = views[1].valid.sum()
  message = f"frame 1: {count} of {count} predicted points"
  with pytest.raises(InputError, match=message):
    _evaluate(views, broken)
  broken[1][:] = maps[1]
  broken[1][~views[1].valid] = np.nan  # Where there is no truth.
  assert _evaluate(views, broken).metrics == _evaluate(views, maps).metrics
  world = views[0].points.copy()
  world[3] = np.inf
  with pytest.raises(InputError, match=r"frame 0: \d+ of \d+ true points"):
    _evaluate([views[0]._replace(points=world), views[1]], maps)
  with pytest.raises(InputError, match=r"frame 1: .* disagree"):
    _evaluate(views, [maps[0], maps[1][:5]])
  with pytest.raises(InputError, match="first frame's true pose"):
    _evaluate(
      [views[0]._replace(camera_to_world=np.full((4, 4), np.nan))], maps
    )
  nothing = [view._replace(valid=np.zeros_like(view.valid)) for view in views]
  with pytest.raises(InputError, match="no pixel of the sequence"):
    _evaluate(nothing, maps)
  with pytest.raises(InputError, match="no frames"):
    _evaluate([], [])
  with pytest.raises(InputError, match="pixel_stride must be 1 or more"):
    ReconstructionOptions(pixel_stride=0)


def _cloud(seed, count=400):
  return np.random.default_rng(seed).uniform(-1, 1, (count, 3))


@_settings
@given(st.integers(0, 100))
def test_icp_recovers_a_small_motion(seed):
  rng = np.random.default_rng(seed)
  target = _cloud(seed)
  motion = np.eye(4)
  turn = Rotation.from_rotvec(rng.uniform(-0.015, 0.015, 3))
  motion[:3, :3] = turn.as_matrix()
  motion[:3, 3] = rng.uniform(-0.015, 0.015, 3)
  source = (target - motion[:3, 3]) @ motion[:3, :3]
  found = icp(source, cKDTree(target), 0.1)
  np.testing.assert_allclose(found.transformation, motion, atol=1e-6)
  assert found.fitness == 1
  assert found.inlier_rmse < 1e-6


def test_icp_steps():
  target = _cloud(0)
  tree = cKDTree(target)
  source = target[:300] + np.array([0.03, 0, 0])
  source[0] = 50  # In nobody's reach.
  none = icp(source, tree, 0.1, iterations=0)
  np.testing.assert_array_equal(none.transformation, np.eye(4))
  distance, index = tree.query(source)
  near = distance < 0.1
  assert none.fitness == near.mean() < 1
  rmse = np.sqrt(np.mean(distance[near] ** 2))
  assert none.inlier_rmse == pytest.approx(rmse)
  # The first step is the rigid motion between the first pairs.
  step, _ = Rotation.align_vectors(
    target[index[near]] - target[index[near]].mean(axis=0),
    source[near] - source[near].mean(axis=0),
  )
  one = icp(source, tree, 0.1, iterations=1)
  np.testing.assert_allclose(
    one.transformation[:3, :3], step.as_matrix(), atol=1e-6
  )
  # Steps add up, and a loose tolerance stops after the first.
  moved = source @ one.transformation[:3, :3].T + one.transformation[:3, 3]
  again = icp(moved, tree, 0.1, iterations=1)
  two = icp(source, tree, 0.1, iterations=2)
  np.testing.assert_allclose(
    two.transformation, again.transformation @ one.transformation, atol=1e-12
  )
  loose = icp(source, tree, 0.1, tolerance=1.0)
  np.testing.assert_array_equal(loose.transformation, one.transformation)


def test_icp_without_pairs_stays():
  found = icp(_cloud(0) + 100, cKDTree(_cloud(0)), 0.1)
  np.testing.assert_array_equal(found.transformation, np.eye(4))
  assert (found.fitness, found.inlier_rmse) == (0, 0)


def test_normals_of_a_plane_and_of_a_sphere():
  rng = np.random.default_rng(0)
  turn = Rotation.random(random_state=0).as_matrix()
  plane = np.column_stack([rng.random((2000, 2)), np.zeros(2000)]) @ turn.T
  normals = estimate_normals(cKDTree(plane + 7))
  np.testing.assert_allclose(np.abs(normals @ turn[:, 2]), 1, atol=1e-9)
  sphere = rng.normal(size=(5000, 3))
  sphere /= np.linalg.norm(sphere, axis=1, keepdims=True)
  normals = estimate_normals(cKDTree(3 * sphere))
  np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1)
  assert np.abs(np.sum(normals * sphere, axis=1)).min() > 0.97


def test_normals_in_pieces(monkeypatch):
  points = _cloud(0)
  whole = estimate_normals(cKDTree(points))
  monkeypatch.setattr("point3r_jax.evaluation.clouds._CHUNK", 64)
  np.testing.assert_array_equal(estimate_normals(cKDTree(points)), whole)


def test_normals_of_few_or_equal_points():
  square = np.array([[0.0, 0, 1], [1, 0, 1], [0, 1, 1], [1, 1, 1]])
  normals = estimate_normals(cKDTree(square[:, [2, 0, 1]]))
  np.testing.assert_allclose(np.abs(normals), [[1, 0, 0]] * 4, atol=1e-12)
  same = estimate_normals(cKDTree(np.full((50, 3), 0.1)))
  np.testing.assert_array_equal(same, [[0, 0, 1]] * 50)
  assert np.isfinite(estimate_normals(cKDTree(np.ones((1, 3))))).all()


def test_the_centre_alone_may_be_aligned():
  """What lies outside does not matter then, and does by default."""
  views, maps = _scene(size=(20, 24))
  outside = [points.copy() for points in maps]
  for points in outside:
    points[:4] *= 50
  options = {"crop": 12, "align_centre": True}
  assert (
    _evaluate(views, outside, **options).metrics
    == _evaluate(views, maps, **options).metrics
  )
  assert (
    _evaluate(views, outside, crop=12).medians
    != _evaluate(views, maps, crop=12).medians
  )
  turned = [points @ np.diag([1.0, -1, -1]) * 3 for points in maps]
  found = _evaluate(views, turned, align="sim3")
  assert found.medians is None and found.metrics["accuracy"] < 1e-4
  with pytest.raises(InputError, match="align must be medians or sim3"):
    ReconstructionOptions(align="icp")
  with pytest.raises(InputError, match=r"crop must be even.* not 225"):
    ReconstructionOptions(crop=225)


def test_a_centre_without_truth_has_nothing_to_align():
  views, maps = _scene(size=(20, 24))
  for view in views:
    view.valid[6:14, 8:16] = False
  for align in ("medians", "sim3"):
    with pytest.raises(InputError, match="no pixel to score"):
      _evaluate(views, maps, crop=8, align_centre=True, align=align)
