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

from point3r_jax.errors import InputError
from point3r_jax.evaluation import depth, pose, reconstruction
from point3r_jax.evaluation.clouds import transform
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

# Points of a cloud to draw from.
_CLOUD = 100_000


class Task(Protocol):
  """What is measured.

  Attributes:
    options: a frozen dataclass of what decides the numbers.
    workers: sequences that are scored at a time, at most.
    headline: the metric by which sequences are chosen for pictures; smaller is
      better.
    keep: what of predictions is needed.
  """

  options: Any
  workers: int
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
    overflow=prediction.overflow,
    **fields,
  )


def predicted_trajectory(prediction: SavedPrediction) -> Trajectory:
  """Returns predicted poses, with frame numbers for timestamps.

  Raises:
    InputError: if one is not finite.
  """
  poses = np.asarray(prediction.arrays["pose"], np.float64)
  bad = ~np.isfinite(poses).all(axis=1) | ~poses[:, 3:].any(axis=1)
  if bad.any():
    raise InputError(
      f"{bad.sum()} of {len(poses)} predicted poses are NaN, infinite or have "
      f"no rotation, the first at frame {bad.argmax()}"
    )
  matrices = np.tile(np.eye(4), (len(poses), 1, 1))
  matrices[:, :3, :3] = Rotation.from_quat(
    poses[:, 3:], scalar_first=True
  ).as_matrix()
  matrices[:, :3, 3] = poses[:, :3]
  return Trajectory(np.arange(len(poses), dtype=np.float64), matrices)


def true_depths(sequence: Sequence, frames: range | None = None) -> np.ndarray:
  """Returns (T, H0, W0) true depth of frames; of all if None."""
  frames = range(len(sequence)) if frames is None else frames
  return np.stack([sequence.load_depth(i) for i in frames])


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
    """Refuses alignments that are unknown or named twice."""
    unknown = set(self.alignments) - set(ALIGNMENTS)
    if unknown or not self.alignments:
      raise InputError(
        f"alignments {sorted(unknown)} are unknown; there are "
        f"{', '.join(ALIGNMENTS)}"
      )
    if len(set(self.alignments)) != len(self.alignments):
      raise InputError(
        f"alignments {', '.join(self.alignments)}: name each of them once"
      )


@dataclasses.dataclass(frozen=True)
class DepthTask:
  """Depth of single images, or of videos with one alignment each.

  Metrics are named `ALIGNMENT/NAME`, but for "median" of single images, which
  is the published one.

  Attributes:
    options: what decides the numbers.
    by_image: whether every image is a sample with an alignment of its own.
  """

  options: DepthTaskOptions
  by_image: bool

  keep = Keep(depth=True)
  workers = 4

  def _name(self, alignment: str, metric: str) -> str:
    plain = self.by_image and alignment == "median"
    return metric if plain else f"{alignment}/{metric}"

  @property
  def headline(self) -> str:
    """The first alignment's relative error."""
    return self._name(self.options.alignments[0], "abs_rel")

  def _maps(
    self, sequence: Sequence, prediction: SavedPrediction, frames: range
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns predicted and true maps (T, H0, W0) of some frames."""
    truth = true_depths(sequence, frames)
    predicted = np.stack(
      [
        depth.resize_depth(
          prediction.arrays["depth"][i],
          truth.shape[1:],
          self.options.resize_filter,
        )
        for i in frames
      ]
    )
    return predicted, truth

  def _samples(self, sequence: Sequence) -> list[range]:
    """Returns which frames share an alignment."""
    every = range(len(sequence))
    return [every[i : i + 1] for i in every] if self.by_image else [every]

  def score(
    self, sequence: Sequence, prediction: SavedPrediction
  ) -> SequenceResult:
    """Scores a video, or the images of a folder; see `Task`."""
    names = self.options.alignments
    scores, errors = ({name: [] for name in names} for _ in range(2))
    for frames in self._samples(sequence):
      try:
        pair = self._maps(sequence, prediction, frames)
        for name in names:
          fit = depth.align_depth(*pair, name, self.options)
          scores[name].append(depth.depth_metrics(*pair, fit, self.options))
          errors[name].extend(depth.frame_abs_rel(*pair, fit, self.options))
      except InputError as error:
        if not self.by_image:
          raise
        raise InputError(f"{sequence.frames[frames[0]]}: {error}") from error
    pixels = [score["valid_pixels"] for score in scores[names[0]]]
    if self.options.average == "samples":
      pixels = [float(count > 0) for count in pixels]
    if not sum(pixels):
      return sequence_result(
        sequence, prediction, {}, excluded="no pixel has a true depth"
      )
    metrics = {}
    for name in names:
      means = depth.weighted_mean(scores[name], pixels)
      del means["valid_pixels"]
      metrics |= {self._name(name, key): x for key, x in means.items()}
    return sequence_result(
      sequence,
      prediction,
      metrics,
      weight=sum(pixels),
      per_frame={
        self._name(name, "abs_rel"): list(map(float, errors[name]))
        for name in names
      },
    )

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
      frames = choose(result.per_frame[self.headline])
      shown = [self._figure(sequence, prediction, i) for i in frames]
    return Figures(depths=shown)

  def _figure(
    self, sequence: Sequence, prediction: SavedPrediction, frame: int
  ) -> DepthFigure:
    frames = next(x for x in self._samples(sequence) if frame in x)
    predicted, truth = self._maps(sequence, prediction, frames)
    at, alignment = frame - frames[0], self.options.alignments[0]
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
  workers = 4

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


def compare_points(
  sequence: Sequence,
  prediction: SavedPrediction,
  options: reconstruction.ReconstructionOptions,
) -> reconstruction.Reconstruction:
  """Scores the saved points of a sequence."""
  return reconstruction.evaluate_reconstruction(
    map(sequence.load_points, range(len(sequence))),
    prediction.arrays["points"],
    options,
    prediction.arrays.get("confidence"),
  )


def keep_points(options: reconstruction.ReconstructionOptions) -> Keep:
  """Returns what of points the scores under these options need."""
  stride = options.pixel_stride
  return Keep(
    points=True,
    # It decides where the grid of used pixels begins.
    crop=options.crop if stride > 1 else None,
    from_camera=options.source == "camera",
    pixel_stride=stride,
    confidence=options.min_confidence is not None,
  )


@dataclasses.dataclass(frozen=True)
class ReconstructionTask:
  """Points in the global frame, as one cloud a sequence.

  Attributes:
    options: what decides the numbers.
  """

  options: reconstruction.ReconstructionOptions

  headline = "accuracy"
  workers = 1  # Searching neighbours takes all cores, and a cloud is large.

  @property
  def keep(self) -> Keep:
    """The points that are scored, and their confidence if it matters."""
    return keep_points(self.options)

  def score(
    self, sequence: Sequence, prediction: SavedPrediction
  ) -> SequenceResult:
    """Scores a cloud; see `Task`."""
    found = compare_points(sequence, prediction, self.options)
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
      found = compare_points(sequence, prediction, self.options)
      clouds.append(cloud_figure(sequence, found))
    return Figures(clouds=clouds)


def cloud_figure(
  sequence: Sequence, found: reconstruction.Reconstruction
) -> CloudFigure:
  """Shows clouds in the frame of the first true camera."""
  to_first = np.linalg.inv(sequence.load_points(0).camera_to_world)
  truth, predicted = (
    transform(to_first, points[:: -(-len(points) // _CLOUD)])
    for points in (found.true_points, found.predicted_points)
  )
  return CloudFigure(
    sequence.name,
    truth,
    predicted,
    error=f"accuracy {found.metrics['accuracy']:.3f} m",
  )
