"""The synthetic task: depth, poses and points at once, beside trivial guesses.

Without published numbers to compare with, a number means something beside what
can be had without a model:

  constant_depth/…  the same depth everywhere, seen from one and the same place
  last_depth/…      the true depth of the frame before
  constant_pose/…   a camera that does not move
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Many
from typing import Literal

import numpy as np

from point3r_jax.evaluation import depth, pose, reconstruction
from point3r_jax.evaluation.clouds import transform
from point3r_jax.evaluation.predict import Keep
from point3r_jax.evaluation.predictions import SavedPrediction
from point3r_jax.evaluation.report.figures import DepthFigure, Figures
from point3r_jax.evaluation.results import SequenceResult
from point3r_jax.evaluation.sequences import Sequence, Trajectory
from point3r_jax.evaluation.tasks import (
  cloud_figure,
  compare_points,
  keep_points,
  predicted_trajectory,
  sequence_result,
  trajectory_figure,
  true_depths,
)


@dataclasses.dataclass(frozen=True)
class SyntheticTaskOptions:
  """What decides the numbers.

  Attributes:
    alignment: of depth, one a sequence, for `abs_rel` and `delta_1_25`;
      `abs_rel_metric` has none. Without a shift, which a guess that is the same
      everywhere could not have.
    align: of paths; see `pose.PoseOptions`.
    icp_distance: of clouds; see `reconstruction.ReconstructionOptions`.
    pixel_stride: of clouds; likewise.
  """

  alignment: Literal["scale", "median"] = "scale"
  align: Literal["sim3", "se3", "none"] = "sim3"
  icp_distance: float = 0.1
  pixel_stride: int = 2

  @property
  def poses(self) -> pose.PoseOptions:
    """How paths are scored."""
    return pose.PoseOptions(align=self.align)

  @property
  def points(self) -> reconstruction.ReconstructionOptions:
    """How clouds are scored: whole maps, all points."""
    return reconstruction.ReconstructionOptions(
      crop=None,
      pixel_stride=self.pixel_stride,
      icp_distance=self.icp_distance,
    )


def path_length(trajectory: Trajectory) -> float:
  """Returns the length of a path, in its unit."""
  steps = np.diff(trajectory.camera_to_world[:, :3, 3], axis=0)
  return float(np.linalg.norm(steps, axis=1).sum())


def constant_pose_metrics(truth: Trajectory) -> dict[str, float]:
  """Scores a camera that does not move, best placed: in the path's middle."""
  positions = truth.camera_to_world[:, :3, 3]
  middle = positions - positions.mean(axis=0)
  still = Trajectory(
    truth.timestamps, np.tile(truth.camera_to_world[:1], (len(positions), 1, 1))
  )
  found = pose.pose_metrics(truth, still, pose.PoseOptions(align="none"))
  ate = float(np.sqrt((middle**2).sum(axis=1).mean()))
  return found | {"ate_over_path": ate / path_length(truth)}


def _constant_points(sequence: Sequence) -> list[np.ndarray]:
  """Returns maps of points of depth 1, all as if from the first camera."""
  maps = []
  for index in range(len(sequence)):
    view = sequence.load_points(index)
    points = transform(np.linalg.inv(view.camera_to_world), view.points)
    depths = np.where(view.valid, points[..., 2], 1)
    maps.append(points / depths[..., None])
  return maps


@dataclasses.dataclass(frozen=True)
class SyntheticTask:
  """Depth, poses and points of synthetic scenes; a `tasks.Task`.

  Attributes:
    options: what decides the numbers.
  """

  options: SyntheticTaskOptions

  headline = "abs_rel"
  workers = 1  # Searching neighbours takes all cores.

  @property
  def keep(self) -> Keep:
    """Depth, poses and points."""
    points = keep_points(self.options.points)
    return dataclasses.replace(points, depth=True, pose=True)

  def score(
    self, sequence: Sequence, prediction: SavedPrediction
  ) -> SequenceResult:
    """Scores everything; see `Task`."""
    truth = true_depths(sequence)
    predicted = np.asarray(prediction.arrays["depth"])
    fit = depth.align_depth(predicted, truth, self.options.alignment)
    scaled = depth.depth_metrics(predicted, truth, fit)
    metric = depth.depth_metrics(predicted, truth, "metric")
    path = sequence.load_trajectory()
    try:
      poses = self._poses(sequence, prediction)
    except pose.DegenerateTrajectoryError as error:
      return sequence_result(sequence, prediction, {}, excluded=str(error))
    points = compare_points(sequence, prediction, self.options.points)
    metrics = {
      "abs_rel": scaled["abs_rel"],
      "delta_1_25": scaled["delta_1_25"],
      "abs_rel_metric": metric["abs_rel"],
      "delta_1_25_metric": metric["delta_1_25"],
      **poses.metrics,
      "ate_over_path": poses.metrics["ate"] / path_length(path),
      **_over_scene(points),
      **self._trivial(sequence, truth),
    }
    per_frame = {
      "abs_rel": depth.frame_abs_rel(predicted, truth, fit).tolist(),
      "position error": poses.position_errors.tolist(),
    }
    return sequence_result(sequence, prediction, metrics, per_frame=per_frame)

  def _trivial(self, sequence: Sequence, truth: np.ndarray) -> dict[str, float]:
    """Scores the trivial guesses."""
    flat = np.ones(truth.shape, np.float32)
    # Where the frame before has sky, or none is before, a guess is needed, too.
    known = truth > 0
    usual = np.median(truth[known])
    last = np.where(known, truth, usual).astype(np.float32)
    last = np.concatenate([np.full_like(last[:1], usual), last[:-1]])
    guesses = {"constant_depth": flat, "last_depth": last}
    metrics = {}
    for name, guess in guesses.items():
      found = depth.depth_metrics(guess, truth, self.options.alignment)
      metrics[f"{name}/abs_rel"] = found["abs_rel"]
      metrics[f"{name}/delta_1_25"] = found["delta_1_25"]
    still = constant_pose_metrics(sequence.load_trajectory())
    metrics |= {f"constant_pose/{name}": x for name, x in still.items()}
    used = reconstruction.used_pixels(
      sequence.image_size, None, self.options.pixel_stride
    )
    cloud = reconstruction.evaluate_reconstruction(
      map(sequence.load_points, range(len(sequence))),
      [points[used] for points in _constant_points(sequence)],
      self.options.points,
    )
    found = _over_scene(cloud)
    return metrics | {f"constant_depth/{name}": x for name, x in found.items()}

  def _poses(
    self, sequence: Sequence, prediction: SavedPrediction
  ) -> pose.PoseComparison:
    return pose.compare_trajectories(
      sequence.load_trajectory(),
      predicted_trajectory(prediction),
      self.options.poses,
    )

  def average(self, results: Many[SequenceResult]) -> dict[str, float]:
    """Averages over sequences, all alike; see `Task`."""
    return depth.weighted_mean([result.metrics for result in results])

  def figures(
    self, chosen: Many[tuple[Sequence, SavedPrediction, SequenceResult]]
  ) -> Figures:
    """Shows depth, path and cloud of each sequence; see `Task`."""
    depths, paths, clouds = [], [], []
    for sequence, prediction, result in chosen:
      truth = true_depths(sequence)
      predicted = np.asarray(prediction.arrays["depth"])
      fit = depth.align_depth(predicted, truth, self.options.alignment)
      frame = len(sequence) // 2
      depths.append(
        DepthFigure(
          name=sequence.name,
          frame=frame,
          image=sequence.load_image(frame),
          prediction=fit.scale * predicted[frame] + fit.shift,
          truth=truth[frame],
          error=f"Abs Rel {result.per_frame['abs_rel'][frame]:.3f}",
        )
      )
      poses = self._poses(sequence, prediction)
      paths.append(trajectory_figure(sequence, poses))
      points = compare_points(sequence, prediction, self.options.points)
      clouds.append(cloud_figure(sequence, points))
    return Figures(trajectories=paths, depths=depths, clouds=clouds)


def _over_scene(found: reconstruction.Reconstruction) -> dict[str, float]:
  """Returns mean distances in shares of the scene's diagonal."""
  return {
    f"{name}_over_scene": found.metrics[name] / found.scene_size
    for name in ("accuracy", "completeness")
  }
