"""The tasks: what they keep of predictions, how they score, how they average.

A task turns a sequence and its prediction into a `SequenceResult`, the results
into averages, and chosen sequences into pictures. What decides its numbers is
one dataclass of options, whose defaults are the published protocol.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence as Many
from typing import Any, Literal, Protocol

import numpy as np
from scipy.spatial.transform import Rotation

from point3r_jax.data.errors import InputError
from point3r_jax.evaluation import depth, pose, reconstruction
from point3r_jax.evaluation.depth_alignment import ALIGNMENTS, DepthOptions
from point3r_jax.evaluation.predict import Keep
from point3r_jax.evaluation.predictions import SavedPrediction
from point3r_jax.evaluation.report.figures import (
  CloudFigure,
  DepthFigure,
  Figures,
  TrajectoryFigure,
  choose,
)
from point3r_jax.evaluation.results import SequenceResult
from point3r_jax.evaluation.sequences import Sequence, Trajectory


class Task(Protocol):
  """What is measured.

  Attributes:
    options: a frozen dataclass of what decides the numbers.
    headline: the metric by which sequences are chosen for pictures; smaller is
      better.
    keep: what of predictions is needed.
  """

  options: Any
  headline: str
  keep: Keep

  def score(
    self, sequence: Sequence, prediction: SavedPrediction
  ) -> SequenceResult:
    """Scores a sequence.

    Raises:
      InputError: truth or prediction cannot be used.
    """

  def average(self, results: Many[SequenceResult]) -> dict[str, float]:
    """Averages over sequences, of which there is at least one."""

  def figures(
    self, chosen: Many[tuple[Sequence, SavedPrediction, SequenceResult]]
  ) -> Figures:
    """Returns the pictures of chosen sequences."""


def sequence_result(
  sequence: Sequence,
  prediction: SavedPrediction,
  metrics: Mapping[str, float],
  **fields,
) -> SequenceResult:
  """Joins what was measured with what the prediction says of itself."""
  return SequenceResult(
    name=sequence.name,
    frames=len(sequence),
    metrics=metrics,
    pointers=prediction.pointers,
    seconds=prediction.seconds,
    **fields,
  )


def predicted_trajectory(prediction: SavedPrediction) -> Trajectory:
  """Returns predicted poses, with frame numbers for timestamps."""
  poses = np.asarray(prediction.arrays["pose"], np.float64)
  matrices = np.tile(np.eye(4), (len(poses), 1, 1))
  matrices[:, :3, :3] = Rotation.from_quat(
    poses[:, 3:], scalar_first=True
  ).as_matrix()
  matrices[:, :3, 3] = poses[:, :3]
  return Trajectory(np.arange(len(poses), dtype=np.float64), matrices)


def true_depths(sequence: Sequence) -> np.ndarray:
  """Returns (T, H0, W0) true depth of all frames."""
  return np.stack([sequence.load_depth(i) for i in range(len(sequence))])


@dataclasses.dataclass(frozen=True)
class DepthTaskOptions(DepthOptions):
  """What decides the numbers of the depth tasks.

  Attributes:
    alignments: each is scored: "median", "scale", "scale_shift", "lad",
      "least_squares" or "metric"; see `depth.align_depth`.
    average: "pixels" weighs samples by their pixels with truth, as published;
      so long and densely measured ones count for more. "samples" does not.
    resize_filter: what brings predictions to the truth's size.
  """

  alignments: tuple[str, ...] = ("scale", "scale_shift", "lad", "metric")
  average: Literal["pixels", "samples"] = "pixels"
  resize_filter: Literal["bicubic", "bilinear", "nearest"] = "bicubic"

  def __post_init__(self):
    """Refuses unknown alignments."""
    unknown = set(self.alignments) - set(ALIGNMENTS)
    if unknown or not self.alignments:
      raise InputError(
        f"alignments {sorted(unknown)} are unknown; there are "
        f"{', '.join(ALIGNMENTS)}"
      )


@dataclasses.dataclass(frozen=True)
class DepthTask:
  """Depth of single images, or of videos with one alignment each.

  Metrics are named `ALIGNMENT/NAME`; single images, which have one published
  alignment, need no prefix.

  Attributes:
    options: what decides the numbers.
    by_image: whether every image is a sample with an alignment of its own.
  """

  options: DepthTaskOptions
  by_image: bool

  keep = Keep(depth=True)

  def _name(self, alignment: str, metric: str) -> str:
    alone = self.by_image and len(self.options.alignments) == 1
    return metric if alone else f"{alignment}/{metric}"

  @property
  def headline(self) -> str:
    """The first alignment's relative error."""
    return self._name(self.options.alignments[0], "abs_rel")

  def _samples(
    self, sequence: Sequence, prediction: SavedPrediction
  ) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns pairs of predicted and true maps that share an alignment."""
    truth = true_depths(sequence)
    predicted = np.stack(
      [
        depth.resize_depth(x, truth.shape[1:], self.options.resize_filter)
        for x in prediction.arrays["depth"]
      ]
    )
    if not self.by_image:
      return [(predicted, truth)]
    return [(predicted[i : i + 1], truth[i : i + 1]) for i in range(len(truth))]

  def score(
    self, sequence: Sequence, prediction: SavedPrediction
  ) -> SequenceResult:
    """Scores a video, or the images of a folder; see `Task`."""
    samples = self._samples(sequence, prediction)
    metrics, per_frame = {}, {}
    for alignment in self.options.alignments:
      scores, errors = [], []
      for pair in samples:
        fit = depth.align_depth(*pair, alignment, self.options)
        scores.append(depth.depth_metrics(*pair, fit, self.options))
        errors.append(depth.frame_abs_rel(*pair, fit, self.options))
      weights = self._weights(scores)
      if not sum(weights):
        return sequence_result(
          sequence, prediction, {}, excluded="no pixel has a true depth"
        )
      means = depth.weighted_mean(scores, weights)
      pixels = means.pop("valid_pixels")
      metrics |= {self._name(alignment, key): x for key, x in means.items()}
      per_frame[self._name(alignment, "abs_rel")] = np.concatenate(
        errors
      ).tolist()
    weight = pixels if self.options.average == "pixels" else sum(weights)
    return sequence_result(
      sequence, prediction, metrics, weight=weight, per_frame=per_frame
    )

  def _weights(self, scores: Many[Mapping[str, float]]) -> list[float]:
    pixels = [score["valid_pixels"] for score in scores]
    if self.options.average == "pixels":
      return pixels
    return [float(x > 0) for x in pixels]

  def average(self, results: Many[SequenceResult]) -> dict[str, float]:
    """Averages over all samples of all sequences; see `Task`."""
    return depth.weighted_mean(
      [result.metrics for result in results],
      [result.weight for result in results],
    )

  def figures(
    self, chosen: Many[tuple[Sequence, SavedPrediction, SequenceResult]]
  ) -> Figures:
    """Shows each sequence's middle frame; see `Task`."""
    shown = [
      self._figure(sequence, prediction, len(sequence) // 2)
      for sequence, prediction, _ in chosen
    ]
    if self.by_image and len(chosen) == 1:
      sequence, prediction, result = chosen[0]
      frames = choose(next(iter(result.per_frame.values())))
      shown = [self._figure(sequence, prediction, i) for i in frames]
    return Figures(depths=shown)

  def _figure(
    self, sequence: Sequence, prediction: SavedPrediction, frame: int
  ) -> DepthFigure:
    samples = self._samples(sequence, prediction)
    predicted, truth = samples[frame] if self.by_image else samples[0]
    at = 0 if self.by_image else frame
    alignment = self.options.alignments[0]
    fit = depth.align_depth(predicted, truth, alignment, self.options)
    error = depth.frame_abs_rel(predicted, truth, fit, self.options)[at]
    return DepthFigure(
      name=sequence.name,
      frame=frame,
      image=sequence.load_image(frame),
      prediction=fit.scale * predicted[at] + fit.shift,
      truth=truth[at],
      error=f"Abs Rel {error:.3f} ({alignment})",
    )


@dataclasses.dataclass(frozen=True)
class PoseTaskOptions(pose.PoseOptions):
  """What decides the numbers of the camera pose task.

  Attributes:
    solve_pose: whether poses are found from the two point maps (weighted
      Procrustes) instead of taken from the pose head. A choice of prediction,
      not of scoring.
  """

  solve_pose: bool = False


def trajectory_figure(
  sequence: Sequence, found: pose.PoseComparison, unit: str = "m"
) -> TrajectoryFigure:
  """Shows paths in the frame of the first true camera."""
  to_first = np.linalg.inv(found.truth.camera_to_world[0])
  truth, predicted = (
    (to_first @ path.camera_to_world)[:, :3, 3]
    for path in (found.truth, found.aligned)
  )
  error = f"ATE {found.metrics['ate']:.3f} {unit}"
  return TrajectoryFigure(sequence.name, truth, predicted, error, unit)


@dataclasses.dataclass(frozen=True)
class PoseTask:
  """Camera poses along a sequence.

  Attributes:
    options: what decides the numbers.
    unit: of the true positions.
  """

  options: PoseTaskOptions
  unit: str = "m"

  headline = "ate"

  @property
  def keep(self) -> Keep:
    """The poses."""
    return Keep(pose=True, solve_pose=self.options.solve_pose)

  def _compare(
    self, sequence: Sequence, prediction: SavedPrediction
  ) -> pose.PoseComparison:
    return pose.compare_trajectories(
      sequence.load_trajectory(),
      predicted_trajectory(prediction),
      self.options,
    )

  def score(
    self, sequence: Sequence, prediction: SavedPrediction
  ) -> SequenceResult:
    """Scores a path; one that cannot be aligned is excluded; see `Task`."""
    try:
      found = self._compare(sequence, prediction)
    except pose.DegenerateTrajectoryError as error:
      return sequence_result(sequence, prediction, {}, excluded=str(error))
    per_frame = {"position error": found.position_errors.tolist()}
    return sequence_result(
      sequence, prediction, found.metrics, per_frame=per_frame
    )

  def average(self, results: Many[SequenceResult]) -> dict[str, float]:
    """Averages over sequences, all alike; see `Task`."""
    return depth.weighted_mean([result.metrics for result in results])

  def figures(
    self, chosen: Many[tuple[Sequence, SavedPrediction, SequenceResult]]
  ) -> Figures:
    """Shows the paths from above; see `Task`."""
    return Figures(
      trajectories=[
        trajectory_figure(
          sequence, self._compare(sequence, prediction), self.unit
        )
        for sequence, prediction, _ in chosen
      ]
    )


def _compare_points(
  sequence: Sequence,
  prediction: SavedPrediction,
  options: reconstruction.ReconstructionOptions,
) -> reconstruction.Reconstruction:
  return reconstruction.evaluate_reconstruction(
    map(sequence.load_points, range(len(sequence))),
    prediction.arrays["points"],
    options,
    prediction.arrays.get("confidence"),
  )


@dataclasses.dataclass(frozen=True)
class ReconstructionTask:
  """Points in the global frame, as one cloud a sequence.

  Attributes:
    options: what decides the numbers.
  """

  options: reconstruction.ReconstructionOptions

  headline = "accuracy"

  @property
  def keep(self) -> Keep:
    """The points that are scored, and their confidence if it matters."""
    return Keep(
      points=self.options,
      confidence=self.options.min_confidence is not None,
    )

  def score(
    self, sequence: Sequence, prediction: SavedPrediction
  ) -> SequenceResult:
    """Scores a cloud; see `Task`."""
    found = _compare_points(sequence, prediction, self.options)
    per_frame = {"accuracy": found.frame_accuracy.tolist()}
    return sequence_result(
      sequence, prediction, found.metrics, per_frame=per_frame
    )

  def average(self, results: Many[SequenceResult]) -> dict[str, float]:
    """Averages over sequences, all alike; see `Task`."""
    return depth.weighted_mean([result.metrics for result in results])

  def figures(
    self, chosen: Many[tuple[Sequence, SavedPrediction, SequenceResult]]
  ) -> Figures:
    """Shows the clouds from above, in the first camera's frame; see `Task`."""
    clouds = []
    for sequence, prediction, _ in chosen:
      found = _compare_points(sequence, prediction, self.options)
      clouds.append(cloud_figure(sequence, found))
    return Figures(clouds=clouds)


def cloud_figure(
  sequence: Sequence, found: reconstruction.Reconstruction
) -> CloudFigure:
  """Shows clouds in the frame of the first true camera."""
  to_first = np.linalg.inv(sequence.load_points(0).camera_to_world)
  truth, predicted = (
    points @ to_first[:3, :3].T + to_first[:3, 3]
    for points in (found.true_points, found.predicted_points)
  )
  return CloudFigure(
    sequence.name,
    truth,
    predicted,
    error=f"accuracy {found.metrics['accuracy']:.3f} m",
  )
