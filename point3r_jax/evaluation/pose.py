"""How far a predicted camera path is from the true one.

Poses are camera-to-world, OpenCV axes, (4, 4) float64. The prediction has a
frame and unit of its own; aligned, it has those of the truth. The definitions
are those of the tool evo, which is not needed.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import numpy as np
from scipy.spatial.transform import Rotation

from point3r_jax.errors import InputError
from point3r_jax.evaluation.sequences import Trajectory


class DegenerateTrajectoryError(InputError):
  """Paths that determine no alignment: positions on a line or at a point."""


@dataclasses.dataclass(frozen=True)
class PoseOptions:
  """What decides the numbers; the defaults are the published ones.

  Attributes:
    align: "sim3" fits rotation, translation and scale of the prediction to the
      truth, "se3" rotation and translation, "none" nothing.
    rpe_align: likewise for relative motions; "as_ate" is the same alignment,
      so that relative translations are in the truth's unit.
    delta: frames from the first to the second pose of a relative motion.
    all_pairs: whether relative motions start at every frame, not only at every
      `delta`-th.
    max_timestamp_difference: between poses that belong together, seconds.
    take_over_timestamps: whether a prediction of as many poses as the truth
      has its timestamps, whatever its own are.
    non_finite_truth: "error" refuses true poses that are NaN or infinite,
      "drop" leaves their frames out.
  """

  align: Literal["sim3", "se3", "none"] = "sim3"
  rpe_align: Literal["as_ate", "sim3", "se3", "none"] = "as_ate"
  delta: int = 1
  all_pairs: bool = True
  max_timestamp_difference: float = 0.01
  take_over_timestamps: bool = True
  non_finite_truth: Literal["error", "drop"] = "error"

  def __post_init__(self):
    """Refuses what has no meaning."""
    if self.align not in ("sim3", "se3", "none"):
      raise InputError(f"align must be sim3, se3 or none, not {self.align!r}")
    if self.rpe_align not in ("as_ate", "sim3", "se3", "none"):
      raise InputError(
        f"rpe_align must be as_ate, sim3, se3 or none, not {self.rpe_align!r}"
      )
    if self.delta < 1:
      raise InputError(f"delta must be 1 frame or more, not {self.delta}")
    if self.non_finite_truth not in ("error", "drop"):
      raise InputError(
        f"non_finite_truth must be error or drop, not {self.non_finite_truth!r}"
      )


_DEFAULTS = PoseOptions()


class Similarity(NamedTuple):
  """What takes points to others: scale · rotation · point + translation.

  Attributes:
    scale: > 0.
    rotation: (3, 3) float64.
    translation: (3,) float64.
    singular_values: (3,) of the points' covariance, falling. The rotation is
      determined only if the second one is not zero.
  """

  scale: float
  rotation: np.ndarray
  translation: np.ndarray
  singular_values: np.ndarray

  def matrix(self) -> np.ndarray:
    """Returns it as (4, 4) float64."""
    matrix = np.eye(4)
    matrix[:3, :3] = self.scale * self.rotation
    matrix[:3, 3] = self.translation
    return matrix


def fit_similarity(
  points_from: np.ndarray,
  points_to: np.ndarray,
  weights: np.ndarray | None = None,
  with_scale: bool = True,
) -> Similarity:
  """Fits a similarity by least squares (Umeyama).

  Args:
    points_from: (N, 3).
    points_to: (N, 3), where they should go.
    weights: (N,), not negative, of the squared distances; None: all alike.
    with_scale: False for a rigid motion.

  Raises:
    DegenerateTrajectoryError: if a scale is asked for and `points_from`
      coincide.
  """
  if weights is None:
    weights = np.ones(len(points_from))
  share = weights / weights.sum()
  mean_from, mean_to = share @ points_from, share @ points_to
  centered = points_from - mean_from
  covariance = (share[:, None] * (points_to - mean_to)).T @ centered
  u, singular_values, vt = np.linalg.svd(covariance)
  signs = np.ones(3)
  signs[2] = np.sign(np.linalg.det(u) * np.linalg.det(vt))
  rotation = u * signs @ vt
  scale = 1.0
  if with_scale:
    variance = share @ np.sum(centered**2, axis=1)
    if variance == 0:
      raise DegenerateTrajectoryError(
        "all points to align coincide, so that no scale can be found"
      )
    scale = float(singular_values @ signs / variance)
  translation = mean_to - scale * rotation @ mean_from
  return Similarity(scale, rotation, translation, singular_values)


def procrustes(
  points_from: np.ndarray,
  points_to: np.ndarray,
  weights: np.ndarray | None = None,
) -> np.ndarray:
  """Finds the rigid motion between two maps of the same points.

  With a frame's points in its own camera and in the global frame, and the
  product of the logarithms of both confidences as weights, it is a pose.

  Args:
    points_from: (..., 3).
    points_to: (..., 3).
    weights: (...), not negative; None: all alike.

  Returns:
    (4, 4) float64 without scale; from camera to global points, it is
    camera-to-world.

  Raises:
    InputError: if the points do not determine a motion.
  """
  points_from = np.asarray(points_from, np.float64).reshape(-1, 3)
  points_to = np.asarray(points_to, np.float64).reshape(-1, 3)
  if weights is not None:
    weights = np.asarray(weights, np.float64).ravel()
    if not weights.sum() > 0:
      raise InputError("the weights of the points to align add up to nothing")
  fit = fit_similarity(points_from, points_to, weights, with_scale=False)
  _require_rank(fit)
  return fit.matrix()


def _require_rank(fit: Similarity) -> None:
  """Refuses what evo refuses."""
  if np.count_nonzero(fit.singular_values > np.finfo(np.float64).eps) < 2:
    raise DegenerateTrajectoryError(
      "positions lie on a line or at a point, or are unrelated to the true "
      "ones: no rotation aligns them"
    )


def _checked(trajectory: Trajectory, name: str) -> Trajectory:
  """Returns a trajectory in float64; raises if its shapes make none."""
  stamps = np.asarray(trajectory.timestamps, np.float64)
  poses = np.asarray(trajectory.camera_to_world, np.float64)
  if stamps.ndim != 1 or poses.shape != (*stamps.shape, 4, 4):
    raise InputError(
      f"the {name} trajectory has timestamps {stamps.shape} and poses "
      f"{poses.shape} instead of (T,) and (T, 4, 4)"
    )
  return Trajectory(stamps, poses)


def _require_rigid(trajectory: Trajectory, name: str) -> None:
  """Refuses poses with scale, shear or mirror; text files round a little."""
  rotation = trajectory.camera_to_world[:, :3, :3]
  product = rotation @ np.swapaxes(rotation, 1, 2)
  bad = np.abs(product - np.eye(3)).max(axis=(1, 2), initial=0) > 1e-2
  bad |= np.linalg.det(rotation) < 0
  if bad.any():
    raise InputError(
      f"{bad.sum()} of {bad.size} {name} poses are no rotations with a "
      f"translation, the first at timestamp {trajectory.timestamps[bad][0]:g}"
    )


def _take(trajectory: Trajectory, index: np.ndarray) -> Trajectory:
  """Returns the poses with these indices, or where a mask is true."""
  return Trajectory(*(values[index] for values in trajectory))


def associate(
  truth: Trajectory, prediction: Trajectory, options: PoseOptions = _DEFAULTS
) -> tuple[Trajectory, Trajectory]:
  """Finds the poses of two trajectories that belong together.

  Each pose of the shorter trajectory (the prediction if they are equally long)
  belongs to the nearest in time of the other, if that is near enough.

  Args:
    truth: of T poses.
    prediction: of any number of poses.
    options: `max_timestamp_difference`, `take_over_timestamps` and
      `non_finite_truth` matter.

  Returns:
    Both, of one length, matching row by row.

  Raises:
    InputError: if no two poses belong together, or a pose is not finite.
  """
  truth = _checked(truth, "true")
  prediction = _checked(prediction, "predicted")
  bad = ~np.isfinite(prediction.camera_to_world).all(axis=(1, 2))
  if bad.any():
    raise InputError(
      f"{bad.sum()} of {bad.size} predicted poses are NaN or infinite, the "
      f"first at frame {bad.argmax()}; leave the sequence out"
    )
  if options.take_over_timestamps and len(truth[0]) == len(prediction[0]):
    prediction = prediction._replace(timestamps=truth.timestamps)
  bad = ~np.isfinite(truth.camera_to_world).all(axis=(1, 2))
  if bad.any() and options.non_finite_truth == "error":
    raise InputError(
      f"{bad.sum()} of {bad.size} true poses are NaN or infinite, the first at "
      f"frame {bad.argmax()}; leave the sequence out or drop these frames "
      "(non_finite_truth=drop)"
    )
  truth = _take(truth, ~bad)
  _require_rigid(truth, "true")
  _require_rigid(prediction, "predicted")
  swapped = len(prediction.timestamps) <= len(truth.timestamps)
  short, long = (prediction, truth) if swapped else (truth, prediction)
  pairs = []
  for index, stamp in enumerate(short.timestamps):
    difference = np.abs(long.timestamps - stamp)
    nearest = difference.argmin()
    if difference[nearest] <= options.max_timestamp_difference:
      pairs.append((index, nearest))
  if not pairs:
    raise InputError(
      "no predicted pose is within "
      f"{options.max_timestamp_difference} s of a true one "
      f"({len(prediction.timestamps)} predicted, {len(truth.timestamps)} true)"
    )
  short_index, long_index = np.transpose(pairs)
  short, long = _take(short, short_index), _take(long, long_index)
  return (long, short) if swapped else (short, long)


def align_poses(
  poses: np.ndarray, truth: np.ndarray, align: str = "sim3"
) -> np.ndarray:
  """Moves a path as near to the true one as it gets, by its positions.

  Args:
    poses: (T, 4, 4) predicted.
    truth: (T, 4, 4) true.
    align: "sim3", "se3" or "none".

  Returns:
    (T, 4, 4) rigid poses in the truth's frame, and with "sim3" its unit.

  Raises:
    DegenerateTrajectoryError: if the positions determine no alignment.
  """
  if align == "none":
    return poses
  fit = fit_similarity(
    poses[:, :3, 3], truth[:, :3, 3], with_scale=align == "sim3"
  )
  _require_rank(fit)
  aligned = poses.copy()
  aligned[:, :3, :3] = fit.rotation @ poses[:, :3, :3]
  aligned[:, :3, 3] = (
    fit.scale * poses[:, :3, 3] @ fit.rotation.T + fit.translation
  )
  return aligned


def _seen_from(first: np.ndarray, second: np.ndarray) -> np.ndarray:
  """Returns the second poses (N, 4, 4) in the cameras of the first ones."""
  return np.linalg.inv(first) @ second


def _rms(values: np.ndarray) -> float:
  return float(np.sqrt(np.mean(values**2)))


@dataclasses.dataclass(frozen=True)
class PoseComparison:
  """A predicted path beside the true one, N poses that belong together.

  Attributes:
    metrics: `ate` and `rpe_trans`, root mean squares in the truth's unit, and
      `rpe_rot_deg`, in degrees.
    truth: the true poses.
    aligned: the predicted poses after the alignment.
    position_errors: (N,) distances in the truth's unit.
  """

  metrics: dict[str, float]
  truth: Trajectory
  aligned: Trajectory
  position_errors: np.ndarray


def compare_trajectories(
  truth: Trajectory, prediction: Trajectory, options: PoseOptions = _DEFAULTS
) -> PoseComparison:
  """Associates, aligns and compares two trajectories.

  Args:
    truth: of T poses.
    prediction: of any number of poses, in any frame and unit.
    options: what decides the numbers.

  Raises:
    DegenerateTrajectoryError: if the positions determine no alignment.
    InputError: if poses are not finite, do not belong together in time, or are
      too few for a relative motion.
  """
  truth, prediction = associate(truth, prediction, options)
  true_poses = truth.camera_to_world
  aligned = align_poses(prediction.camera_to_world, true_poses, options.align)
  errors = np.linalg.norm(true_poses[:, :3, 3] - aligned[:, :3, 3], axis=1)
  moving = aligned
  if options.rpe_align != "as_ate":
    moving = align_poses(
      prediction.camera_to_world, true_poses, options.rpe_align
    )
  step = 1 if options.all_pairs else options.delta
  first = np.arange(0, len(errors) - options.delta, step)
  if not first.size:
    raise InputError(
      f"{len(errors)} poses have no relative motion over {options.delta} frames"
    )
  second = first + options.delta
  difference = _seen_from(
    _seen_from(true_poses[first], true_poses[second]),
    _seen_from(moving[first], moving[second]),
  )
  angles = Rotation.from_matrix(difference[:, :3, :3]).magnitude()
  metrics = {
    "ate": _rms(errors),
    "rpe_trans": _rms(np.linalg.norm(difference[:, :3, 3], axis=1)),
    "rpe_rot_deg": _rms(np.degrees(angles)),
  }
  aligned = Trajectory(truth.timestamps, aligned)
  return PoseComparison(metrics, truth, aligned, errors)


def pose_metrics(
  truth: Trajectory, prediction: Trajectory, options: PoseOptions = _DEFAULTS
) -> dict[str, float]:
  """Returns the metrics of `compare_trajectories`: what it takes and raises."""
  return compare_trajectories(truth, prediction, options).metrics
