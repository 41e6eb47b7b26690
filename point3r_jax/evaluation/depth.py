"""How far predicted depth is from the truth, after an alignment.

A sample is one map or all maps of a video: its pixels share one scale and
shift. Pixels count where the truth is positive and below the greatest depth.
Predictions are float32 throughout; the truth keeps the float type it has, and
sums are float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import cv2
import numpy as np

from point3r_jax.errors import InputError
from point3r_jax.evaluation.depth_alignment import (
  Alignment,
  DepthOptions,
  find_alignment,
  in_chunks,
  precise_sum,
)

_FILTERS = {
  "bicubic": cv2.INTER_CUBIC,
  "bilinear": cv2.INTER_LINEAR,
  "nearest": cv2.INTER_NEAREST_EXACT,
}

_DELTAS = ("delta_1_25", "delta_1_25_2", "delta_1_25_3")

_DEFAULTS = DepthOptions()


def resize_depth(
  depth: np.ndarray, size: tuple[int, int], filter: str = "bicubic"
) -> np.ndarray:
  """Resizes a map as OpenCV does, without smoothing before it shrinks.

  Args:
    depth: (H, W) float.
    size: (H', W') to resize to.
    filter: "bicubic" (published; may undershoot zero at edges), "bilinear" or
      "nearest".

  Returns:
    (H', W') float32.
  """
  height, width = size
  return cv2.resize(
    np.asarray(depth, np.float32),
    (width, height),
    interpolation=_FILTERS[filter],
  )


def _stack(maps: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
  """Makes one array of maps, which must agree in size."""
  if not isinstance(maps, np.ndarray):
    sizes = sorted({np.shape(depth) for depth in maps})
    if len(sizes) > 1:
      raise InputError(
        f"depth maps of {len(sizes)} sizes in one sequence: {sizes}; resize "
        "them to one size"
      )
  return np.asarray(maps)


def _pixels(
  prediction: np.ndarray | Sequence[np.ndarray],
  truth: np.ndarray | Sequence[np.ndarray],
  options: DepthOptions,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the pixels that count, (N,) float32 predictions and (N,) truth."""
  prediction, truth = _stack(prediction), _stack(truth)
  if prediction.shape != truth.shape:
    raise InputError(
      f"predicted depth is {prediction.shape} and true depth {truth.shape}; "
      "resize the prediction first"
    )
  mask = truth > 0
  if options.max_depth is not None:
    mask &= truth < options.max_depth
  d = prediction[mask].astype(np.float32, copy=False)
  g = truth[mask]
  if g.dtype not in (np.float32, np.float64):
    g = g.astype(np.float64)
  bad = np.count_nonzero(~np.isfinite(d))
  if bad:
    raise InputError(
      f"{bad} of {d.size} predicted depths to score are NaN or infinite; find "
      "out what the model met there or leave the sequence out"
    )
  bad = np.count_nonzero(np.isinf(g))
  if bad:
    raise InputError(
      f"{bad} of {g.size} true depths are infinite; set them to 0 or give a "
      "greatest depth"
    )
  return d, g


def align_depth(
  prediction: np.ndarray | Sequence[np.ndarray],
  truth: np.ndarray | Sequence[np.ndarray],
  alignment: str,
  options: DepthOptions = _DEFAULTS,
) -> Alignment:
  """Finds the scale and shift that a prediction is scored with.

  Args:
    prediction: (H, W) or (T, H, W) predicted depth; one fit for all of it.
    truth: of the same shape, metres; 0 or less where nothing was measured.
    alignment: "median": the medians agree. "scale": least absolute errors,
      roughly. "scale_shift": the published search by Adam, which hardly leaves
      the medians. "least_squares". "lad": the least absolute errors that a
      scale and shift can reach. "metric": none.
    options: what else decides the numbers.

  Returns:
    The alignment; the identity where no pixel counts.

  Raises:
    InputError: if shapes disagree, numbers that count are not finite, or the
      prediction has no scale.
  """
  d, g = _pixels(prediction, truth, options)
  return find_alignment(d, g, alignment, options)


def _aligned(
  d: np.ndarray, fit: Alignment, options: DepthOptions
) -> np.ndarray:
  """Returns aligned depth in the precision of the prediction."""
  aligned = np.float32(fit.scale) * d + np.float32(fit.shift)
  if options.post_clip is not None:
    aligned = np.minimum(aligned, options.post_clip)
  return aligned


def _mean_errors(
  aligned: np.ndarray, g: np.ndarray, options: DepthOptions
) -> np.ndarray:
  """Returns the means over (N,) pixels that the metrics are made of."""
  error = np.abs(aligned - g)
  floored = np.maximum(aligned, options.floor)
  ratio = np.maximum(floored / g, g / floored)
  each = (
    error / g,
    error * error / g,
    error * error,
    (np.log(floored) - np.log(g)) ** 2,
    *(ratio < 1.25**power for power in (1, 2, 3)),
  )
  return np.array([precise_sum(values) / g.size for values in each])


def depth_metrics(
  prediction: np.ndarray | Sequence[np.ndarray],
  truth: np.ndarray | Sequence[np.ndarray],
  alignment: str | Alignment,
  options: DepthOptions = _DEFAULTS,
) -> dict[str, float]:
  """Scores predicted depth as one sample.

  Args:
    prediction: as for `align_depth`.
    truth: as for `align_depth`.
    alignment: as for `align_depth`, or what it returned.
    options: what else decides the numbers.

  Returns:
    `abs_rel`, `sq_rel` (metres), `rmse` (metres), `log_rmse`, `delta_1_25`,
    `delta_1_25_2`, `delta_1_25_3` (shares of pixels) and `valid_pixels`; all
    zero where no pixel counts.

  Raises:
    InputError: as `align_depth`.
  """
  d, g = _pixels(prediction, truth, options)
  fit = find_alignment(d, g, alignment, options)
  means = np.zeros(7)
  for part_d, part_g in in_chunks(d, g):
    part = _mean_errors(_aligned(part_d, fit, options), part_g, options)
    means += part * (part_g.size / g.size)
  abs_rel, sq_rel, square, log_square, *deltas = means.tolist()
  return {
    "abs_rel": abs_rel,
    "sq_rel": sq_rel,
    "rmse": square**0.5,
    "log_rmse": log_square**0.5,
    **dict(zip(_DELTAS, deltas, strict=True)),
    "valid_pixels": float(d.size),
  }


def frame_abs_rel(
  prediction: np.ndarray | Sequence[np.ndarray],
  truth: np.ndarray | Sequence[np.ndarray],
  alignment: Alignment,
  options: DepthOptions = _DEFAULTS,
) -> np.ndarray:
  """Returns `abs_rel` of each frame under one alignment of all.

  Args:
    prediction: (T, H, W) or T maps.
    truth: of the same shape.
    alignment: of the whole, from `align_depth`.
    options: as they were for the whole.

  Returns:
    (T,) float64; NaN for frames in which no pixel counts.
  """
  errors = []
  for maps in zip(prediction, truth, strict=True):
    d, g = _pixels(*maps, options)
    error = np.abs(_aligned(d, alignment, options) - g) / g
    errors.append(precise_sum(error) / g.size if g.size else np.nan)
  return np.array(errors)


def weighted_mean(
  metrics: Sequence[Mapping[str, float]],
  weights: Sequence[float] | None = None,
) -> dict[str, float]:
  """Averages metrics over samples.

  Args:
    metrics: of each sample, the same names in all.
    weights: of each sample, as a rule its `valid_pixels`; None: all alike.

  Returns:
    The averages, except that `valid_pixels` are summed.
  """
  if weights is None:
    weights = np.ones(len(metrics))
  if not np.sum(weights):
    raise InputError("nothing to average: no sample has a pixel that counts")
  means = {}
  for name in metrics[0]:
    values = [sample[name] for sample in metrics]
    total = name == "valid_pixels"
    means[name] = float(
      sum(values) if total else np.average(values, 0, weights)
    )
  return means
