"""How far predicted points are from the true surface.

The prediction is brought to the truth's shift in depth and scale by medians
(of an even count the lower of the middle two), then to its frame by iterated
closest points. Letters: T frames, H W rows and columns of a map, N points.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np
from scipy.spatial import cKDTree

from point3r_jax.errors import InputError
from point3r_jax.evaluation.clouds import (
  Icp,
  estimate_normals,
  icp,
  transform,
)
from point3r_jax.evaluation.depth_alignment import lower_median
from point3r_jax.evaluation.pose import fit_similarity
from point3r_jax.evaluation.sequences import PointView

_MOST_POINTS = 30_000_000  # More are gigabytes, and hours of neighbours.


@dataclasses.dataclass(frozen=True)
class ReconstructionOptions:
  """What decides the numbers; the defaults are the published ones.

  Attributes:
    align: "medians" gives the prediction the truth's median depth and extent,
      which is no fit: what is left is for ICP, within its reach. "sim3" fits a
      similarity to corresponding points, as other papers do before ICP.
    align_centre: whether that alignment looks at the scored centre alone; the
      published one looks at whole maps.
    source: "world" scores the world head's points; "camera" those of the camera
      head, moved by the predicted pose. A choice of prediction.
    crop: side of the central square of each map that is scored, pixels; the
      alignment by medians uses whole maps. None: all is scored.
    pixel_stride: every how many rows and columns of a map are used, such that
      the centre's first pixel is; for long sequences.
    min_confidence: predicted points below are not scored; the truth and the
      alignment by medians stay whole. None: all are.
    min_scale: the prediction's median extent is raised to this.
    max_scale: and cut down to this.
    icp_distance: between points that ICP pairs, metres.
    icp_iterations: of ICP at most; 0: none.
    icp_tolerance: ICP stops where a step changes both the share of paired
      points and their root mean square distance (metres) by less than this.
    normal_neighbors: points that a normal is taken from, itself among them.
  """

  align: Literal["medians", "sim3"] = "medians"
  align_centre: bool = False
  source: Literal["world", "camera"] = "world"
  crop: int | None = 224
  pixel_stride: int = 1
  min_confidence: float | None = None
  min_scale: float = 1e-3
  max_scale: float = 1e3
  icp_distance: float = 0.1
  icp_iterations: int = 30
  icp_tolerance: float = 1e-6
  normal_neighbors: int = 30

  def __post_init__(self):
    """Refuses what has no meaning."""
    if self.align not in ("medians", "sim3"):
      raise InputError(f"align must be medians or sim3, not {self.align!r}")
    for name in ("crop", "pixel_stride", "normal_neighbors"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise InputError(f"{name} must be 1 or more, not {value}")
    if self.crop is not None and self.crop % 2:
      raise InputError(
        f"crop must be even, for as many pixels on both sides of the middle, "
        f"not {self.crop}"
      )


_DEFAULTS = ReconstructionOptions()


class MedianAlignment(NamedTuple):
  """What the alignment by medians found, in the first camera's frame.

  Attributes:
    true_shift: median true depth, metres.
    predicted_shift: median predicted depth.
    true_scale: median distance of true points from their median, metres.
    predicted_scale: of predicted points.
  """

  true_shift: float
  predicted_shift: float
  true_scale: float
  predicted_scale: float


class _Pixels(NamedTuple):
  """Pixels with truth, of some frames, (N, ...) each."""

  truth: np.ndarray  # (N, 3) float32 in the first camera's frame.
  prediction: np.ndarray  # (N, 3) float32 in the first camera's frame.
  central: np.ndarray  # (N,) bool, whether it is scored.
  confident: np.ndarray  # (N,) bool, whether the prediction is.
  frame: np.ndarray  # (N,) int.


def _centre(side: int, crop: int | None) -> slice:
  """Returns the rows or columns that are scored."""
  if crop is None:
    return slice(0, side)
  half = crop // 2
  return slice(max(side // 2 - half, 0), side // 2 + half)


def used_pixels(
  size: tuple[int, int], crop: int | None, stride: int
) -> tuple[slice, slice]:
  """Returns the rows and columns of an (H, W) map that are used at all.

  The first pixel of the centre is among them.
  """
  rows, columns = (
    slice(_centre(side, crop).start % stride, None, stride) for side in size
  )
  return rows, columns


def _frame_pixels(
  view: PointView,
  points: np.ndarray,
  confidence: np.ndarray | None,
  world_to_first: np.ndarray,
  options: ReconstructionOptions,
  frame: int,
) -> _Pixels:
  """Returns the pixels of one frame, strided."""
  size = view.valid.shape
  pick = used_pixels(size, options.crop, options.pixel_stride)
  used = view.valid[pick].shape
  if points.shape != (*used, 3) or view.points.shape != (*size, 3):
    raise InputError(
      f"frame {frame}: true points {view.points.shape}, their mask {size} and "
      f"predicted points {points.shape} disagree; of the latter there must be "
      f"{used}"
    )
  central = np.zeros(size, bool)
  central[tuple(_centre(side, options.crop) for side in size)] = True
  mask = view.valid[pick]
  truth = view.points[pick][mask]
  prediction = points[mask].astype(np.float32)
  for name, values in (("true", truth), ("predicted", prediction)):
    bad = np.count_nonzero(~np.isfinite(values).all(axis=1))
    if bad:
      raise InputError(
        f"frame {frame}: {bad} of {mask.sum()} {name} points to score are NaN "
        "or infinite; leave the sequence out"
      )
  confident = np.ones(len(truth), bool)
  if options.min_confidence is not None:
    if confidence is None:
      raise InputError("min_confidence needs confidences")
    confident = confidence[mask] >= options.min_confidence
  truth = transform(world_to_first, truth).astype(np.float32)
  frames = np.full(len(truth), frame)
  return _Pixels(truth, prediction, central[pick][mask], confident, frames)


def _gather(
  views: Iterable[PointView],
  predictions: Iterable[np.ndarray],
  confidences: Iterable[np.ndarray] | None,
  options: ReconstructionOptions,
) -> tuple[_Pixels, np.ndarray, int]:
  """Returns the pixels of all frames, the first pose (4, 4) float64, and T."""
  if confidences is None:
    frames = ((*pair, None) for pair in zip(views, predictions, strict=True))
  else:
    frames = zip(views, predictions, confidences, strict=True)
  pixels, total = [], 0
  first = None
  for frame, (view, points, confidence) in enumerate(frames):
    if first is None:
      first = np.asarray(view.camera_to_world, np.float64)
      if not np.isfinite(first).all():
        raise InputError("the first frame's true pose is NaN or infinite")
      world_to_first = np.linalg.inv(first)
    points = np.asarray(points)
    pixels.append(
      _frame_pixels(view, points, confidence, world_to_first, options, frame)
    )
    total += len(pixels[-1].truth)
    if total > _MOST_POINTS:
      raise InputError(
        f"more than {_MOST_POINTS} points by frame {frame}: use a part of the "
        "pixels (pixel_stride=8 leaves one in 64)"
      )
  if not pixels:
    raise InputError("a reconstruction of no frames has no score")
  joined = _Pixels(*map(np.concatenate, zip(*pixels, strict=True)))
  return joined, first, len(pixels)


def _align_by_medians(
  pixels: _Pixels,
  looked_at: np.ndarray | slice,
  options: ReconstructionOptions,
) -> tuple[_Pixels, MedianAlignment]:
  """Gives the prediction the truth's median depth and extent.

  The scale is about the median depth on the optical axis of the first camera.
  """
  shifts, scales, shifted = [], [], []
  for points in (pixels.truth, pixels.prediction):
    shifts.append(lower_median(points[looked_at][:, 2]))
    points = points - np.array([0, 0, shifts[-1]], np.float32)
    seen = points[looked_at]
    distance = np.linalg.norm(seen - lower_median(seen), axis=1)
    scales.append(lower_median(distance))
    shifted.append(points)
  scales[1] = np.clip(scales[1], options.min_scale, options.max_scale)
  prediction = shifted[1] * (scales[0] / scales[1])
  prediction[:, 2] += shifts[0]
  found = MedianAlignment(*map(float, (*shifts, *scales)))
  return pixels._replace(prediction=prediction), found


def _align_by_similarity(
  pixels: _Pixels, looked_at: np.ndarray | slice
) -> _Pixels:
  """Moves the prediction by the similarity that fits it to the truth best."""
  fit = fit_similarity(pixels.prediction[looked_at], pixels.truth[looked_at])
  prediction = transform(fit.matrix(), pixels.prediction)
  return pixels._replace(prediction=prediction.astype(np.float32))


@dataclasses.dataclass(frozen=True)
class Reconstruction:
  """A predicted cloud on the true one, both in the true world frame, metres.

  Attributes:
    metrics: `accuracy` (predicted points to truth) and `completeness` (true
      points to prediction), mean distances in metres; `nc1` and `nc2`, mean
      |cos| between normals, over predicted and over true points;
      `normal_consistency`, the mean of these two; and `..._median` of each.
    scene_size: diagonal of the true points' bounding box, metres.
    medians: what the alignment by medians found; None without one.
    icp: what iterated closest points found after it.
    true_points: (N, 3) float64.
    predicted_points: (M, 3) float64, fully aligned.
    predicted_distances: (M,) of predicted points to the nearest true one.
    true_distances: (N,) of true points to the nearest predicted one.
    frame_accuracy: (T,) mean of a frame's predicted distances; NaN where none
      of its points is scored.
  """

  metrics: dict[str, float]
  scene_size: float
  medians: MedianAlignment | None
  icp: Icp
  true_points: np.ndarray
  predicted_points: np.ndarray
  predicted_distances: np.ndarray
  true_distances: np.ndarray
  frame_accuracy: np.ndarray


def _compare(
  tree: cKDTree, others: cKDTree, normals: np.ndarray, to: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns (N,) distances to the nearest of others, and |cos| of normals."""
  distance, index = others.query(tree.data, workers=-1)
  return distance, np.abs(np.sum(normals * to[index], axis=1))


def _means(values: np.ndarray, groups: np.ndarray, count: int) -> np.ndarray:
  """Returns the mean of each of the groups of (N,) values; NaN for none."""
  sizes = np.bincount(groups, minlength=count)
  with np.errstate(invalid="ignore"):
    return np.bincount(groups, values, minlength=count) / sizes


def _summary(name: str, values: np.ndarray) -> dict[str, float]:
  return {
    name: float(values.mean()),
    f"{name}_median": float(np.median(values)),
  }


def evaluate_reconstruction(
  views: Iterable[PointView],
  predictions: Iterable[np.ndarray],
  options: ReconstructionOptions = _DEFAULTS,
  confidences: Iterable[np.ndarray] | None = None,
) -> Reconstruction:
  """Aligns predicted points with true ones and scores them.

  Frames are taken one by one; only the strided pixels that have a true point
  stay in memory.

  Args:
    views: T frames' true points.
    predictions: T maps (H', W', 3), in the frame of the first camera: the
      pixels that `used_pixels` names, which are all without a stride.
    options: what decides the numbers.
    confidences: T maps (H', W'); needed for `min_confidence` only.

  Raises:
    InputError: if maps disagree in size, points that count are not finite, or
      none are left.
  """
  pixels, first, frames = _gather(views, predictions, confidences, options)
  if not len(pixels.truth):
    raise InputError("no pixel of the sequence has a true point")
  scored = pixels.central & pixels.confident
  if not scored.any():
    raise InputError(
      "no pixel to score: none in the centre has a true point and confidence"
    )
  looked_at = pixels.central if options.align_centre else slice(None)
  if options.align == "medians":
    pixels, medians = _align_by_medians(pixels, looked_at, options)
  else:
    pixels, medians = _align_by_similarity(pixels, looked_at), None
  truth = transform(first, pixels.truth[pixels.central])
  prediction = transform(first, pixels.prediction[scored])
  true_tree = cKDTree(truth)
  found = icp(
    prediction,
    true_tree,
    options.icp_distance,
    options.icp_iterations,
    options.icp_tolerance,
  )
  tree = cKDTree(transform(found.transformation, prediction))
  normals = estimate_normals(tree, options.normal_neighbors)
  true_normals = estimate_normals(true_tree, options.normal_neighbors)
  accuracy, nc1 = _compare(tree, true_tree, normals, true_normals)
  completeness, nc2 = _compare(true_tree, tree, true_normals, normals)
  metrics = {
    **_summary("accuracy", accuracy),
    **_summary("completeness", completeness),
    **_summary("nc1", nc1),
    **_summary("nc2", nc2),
  }
  for end in ("", "_median"):
    both = metrics[f"nc1{end}"] + metrics[f"nc2{end}"]
    metrics[f"normal_consistency{end}"] = both / 2
  return Reconstruction(
    metrics=metrics,
    scene_size=float(np.linalg.norm(np.ptp(truth, axis=0))),
    medians=medians,
    icp=found,
    true_points=truth,
    predicted_points=tree.data,
    predicted_distances=accuracy,
    true_distances=completeness,
    frame_accuracy=_means(accuracy, pixels.frame[scored], frames),
  )
