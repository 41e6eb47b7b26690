"""Scale and shift that bring predicted depth to the truth.

Everything here is about N pixels that count: predictions `d` (N,) float32 and
true depth `g` (N,) in the float type it has. Sums are float64. Medians of an
even count are the lower of the middle two.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from point3r_jax.errors import InputError

_CHUNK = 1 << 20  # Pixels at once where temporaries would add up.
_SAMPLE = 1 << 16  # Pixels from which a large problem gets its start.
_REACH = 50  # Steps of Adam for which far pixels need not be looked at.


@dataclasses.dataclass(frozen=True)
class DepthOptions:
  """What decides the numbers; the defaults are the published ones.

  Attributes:
    max_depth: only true depths below this count, metres; None: all.
    post_clip: aligned predictions are cut down to this, metres; None: not.
    floor: aligned predictions are raised to this, metres, for the logarithmic
      error and the deltas, not for the others.
    robust_rounds: reweightings of the alignment "scale".
    robust_epsilon: added to the residuals that "scale" weighs by, metres.
    min_scale: what "scale" is raised to.
    adam_learning_rate: of "scale_shift". With so small a rate scale and shift
      move by about 0.1 at most: it is median scaling and a little more.
    adam_steps: of "scale_shift", at most.
    adam_tolerance: "scale_shift" stops where a step changes the sum of errors
      by less than this, metres. The sum has the truth's precision, so that of
      many float32 errors may seem not to change.
    lad_tolerance: "lad" stops where the sum of errors provably exceeds the
      smallest possible one by this share at most.
  """

  max_depth: float | None = None
  post_clip: float | None = None
  floor: float = 1e-5
  robust_rounds: int = 10
  robust_epsilon: float = 1e-8
  min_scale: float = 1e-3
  adam_learning_rate: float = 1e-4
  adam_steps: int = 1000
  adam_tolerance: float = 1e-6
  lad_tolerance: float = 1e-9


class Alignment(NamedTuple):
  """What makes predicted depth comparable: scale · depth + shift (metres)."""

  scale: float
  shift: float = 0.0


def in_chunks(*arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
  """Yields the same piece of each (N,) array, piece by piece."""
  for start in range(0, len(arrays[0]), _CHUNK):
    yield tuple(array[start : start + _CHUNK] for array in arrays)


def precise_sum(values: np.ndarray) -> float:
  """Returns the sum of (N,) values."""
  return float(values.sum(dtype=np.float64))


def lower_median(values: np.ndarray) -> np.ndarray:
  """Returns the median along the first axis, the lower one of even counts."""
  middle = (len(values) - 1) // 2
  return np.partition(values, middle, axis=0)[middle]


def _ratio(truth: float, prediction: float) -> float:
  """Returns the scale that makes one number of the prediction the truth's."""
  if prediction == 0:
    raise InputError(
      "the predicted depth is zero on average, so that no scale can be found; "
      "leave the sequence out"
    )
  return truth / prediction


def _median(d: np.ndarray, g: np.ndarray, options: DepthOptions) -> Alignment:
  del options
  return Alignment(_ratio(float(lower_median(g)), float(lower_median(d))))


def _scale(d: np.ndarray, g: np.ndarray, options: DepthOptions) -> Alignment:
  """Least absolute errors by reweighted least squares, a few rounds of it."""
  scale = _ratio(precise_sum(g), precise_sum(d))
  for _ in range(options.robust_rounds):
    # In the inputs' precision as published: errors that vanish in it weigh
    # 1 / epsilon, and there are many more of them than in a higher one.
    weighted = d / (np.abs(scale * d - g) + options.robust_epsilon)
    scale = precise_sum(weighted * g) / precise_sum(weighted * d)
  return Alignment(max(scale, options.min_scale))


class _AbsoluteErrors:
  """Σ|s·d + t − g| and its gradient, for many s and t near each other.

  Pixels whose error cannot change its sign within reach contribute linearly:
  their sums are taken once, and again where s or t leaves the reach. This
  changes nothing but the order of summation.
  """

  def __init__(self, d: np.ndarray, g: np.ndarray, reach: float):
    """Takes (N,) pixels and how far s and t go before sums are taken anew."""
    self._d, self._g, self._reach = d, g, reach
    self._center = (np.inf, np.inf)

  def _gather(self, s: np.float32, t: np.float32) -> None:
    d, g = self._d, self._g
    error = s * d + t - g
    near = np.abs(error) <= self._reach * (np.abs(d) + 1)
    sign = np.where(near, 0, np.sign(error))
    self._far = precise_sum(sign * d), precise_sum(sign), precise_sum(sign * g)
    self._near_d, self._near_g = d[near], g[near]
    self._center = (s, t)

  def __call__(self, s: np.float32, t: np.float32) -> tuple[float, np.ndarray]:
    """Returns the sum in the inputs' precision and its float32 gradient."""
    if max(abs(s - self._center[0]), abs(t - self._center[1])) > self._reach:
      self._gather(s, t)
    error = s * self._near_d + t - self._near_g
    sign = np.sign(error)
    far_d, far, far_g = self._far
    value = (
      float(s) * far_d + float(t) * far - far_g + precise_sum(np.abs(error))
    )
    gradient = [
      far_d + precise_sum(sign * self._near_d),
      far + precise_sum(sign),
    ]
    return error.dtype.type(value), np.array(gradient, np.float32)


def _scale_shift(
  d: np.ndarray, g: np.ndarray, options: DepthOptions
) -> Alignment:
  """Adam on the sum of absolute errors, in float32 and PyTorch's order."""
  rate, beta1, beta2, epsilon = options.adam_learning_rate, 0.9, 0.999, 1e-8
  errors = _AbsoluteErrors(d, g, _REACH * rate)
  parameters = np.array(_median(d, g, options), np.float32)
  mean, square = np.zeros((2, 2), np.float32)
  previous = np.inf
  for step in range(1, options.adam_steps + 1):
    value, gradient = errors(*parameters)
    mean = mean + (gradient - mean) * (1 - beta1)
    square = square * beta2 + gradient * gradient * (1 - beta2)
    deviation = np.sqrt(square) / (1 - beta2**step) ** 0.5
    update = mean / (deviation + epsilon)
    parameters = parameters - rate / (1 - beta1**step) * update
    if abs(previous - value) < options.adam_tolerance:
      break
    previous = value
  return Alignment(*parameters.tolist())


def _require_spread(d: np.ndarray) -> None:
  if d.min() == d.max():
    raise InputError(
      "the predicted depth is the same everywhere, so that no scale and shift "
      "can be told apart; align by median or leave the sequence out"
    )


def _least_squares(
  d: np.ndarray, g: np.ndarray, options: DepthOptions
) -> Alignment:
  del options
  _require_spread(d)
  mean_d, mean_g = precise_sum(d) / d.size, precise_sum(g) / g.size
  centered = np.subtract(d, mean_d, dtype=np.float64)
  scale = precise_sum(centered * g) / precise_sum(centered * centered)
  return Alignment(scale, mean_g - scale * mean_d)


class _Tangent(NamedTuple):
  """A line that nowhere exceeds the least sum of errors for each scale."""

  scale: float
  shift: float  # The best for this scale.
  value: float
  slope: float


def _errors(scale: float, d: np.ndarray, g: np.ndarray) -> np.ndarray:
  """Returns g − scale·d in float64."""
  product = np.multiply(d, scale, dtype=np.float64)
  return np.subtract(g, product, out=product)


def _tangent(scale: float, d: np.ndarray, g: np.ndarray) -> _Tangent:
  """Returns the tangent at a scale."""
  errors = _errors(scale, d, g)
  middle = (errors.size - 1) // 2
  errors.partition(middle)
  shift = float(errors[middle])
  value = signs = signs_d = ties = ties_d = 0.0
  for part_d, part_g in in_chunks(d, g):
    error = _errors(scale, part_d, part_g) - shift
    sign, tie = np.sign(error), error == 0
    value += precise_sum(np.abs(error))
    signs += precise_sum(sign)
    signs_d += precise_sum(sign * part_d)
    ties += precise_sum(tie)
    ties_d += precise_sum(part_d[tie])
  # Any sign in [-1, 1] will do for pixels on the line. This one balances the
  # others, so that the gradient by the shift is zero.
  slope = signs / ties * ties_d - signs_d
  return _Tangent(scale, shift, value, slope)


def _bracket(
  d: np.ndarray, g: np.ndarray, start: float, step: float
) -> tuple[_Tangent, _Tangent]:
  """Returns tangents at both sides of the optimum; both at it, if it is met."""
  here = there = _tangent(start, d, g)
  while here.slope * there.slope > 0:
    here = there
    there = _tangent(here.scale - math.copysign(step, here.slope), d, g)
    step *= 4
  if there.slope == 0:
    return there, there
  return (here, there) if here.slope < 0 else (there, here)


def _lad(d: np.ndarray, g: np.ndarray, options: DepthOptions) -> Alignment:
  """Least absolute errors, truly.

  With the best shift for each scale, a median, the sum of errors is a convex
  function of the scale, of straight pieces. Two tangents at both sides of its
  minimum bound it from below; where they meet is the next scale to look at.
  """
  _require_spread(d)
  start, step = 0.0, float(np.abs(g).max() / (d.max() - d.min()))
  every = -(-d.size // _SAMPLE)
  sample = d[::every]
  if every > 1 and sample.min() < sample.max():
    start, step = _lad(sample, g[::every], options).scale, step / 256
  low, high = _bracket(d, g, start, step)
  rounding = 1e-13 * precise_sum(np.abs(g))
  width = np.inf
  while True:
    best = min(low, high, key=lambda tangent: tangent.value)
    enough = options.lad_tolerance * best.value + rounding
    previous, width = width, high.scale - low.scale
    if width == 0:
      break
    fall = high.value - low.value - high.slope * width
    meeting = fall / (low.slope - high.slope)  # From the lower scale.
    if best.value - (low.value + low.slope * meeting) <= enough:
      break
    if width > previous / 2:  # Progress from one side only.
      meeting = width / 2
    new = _tangent(low.scale + meeting, d, g)
    if new.scale in (low.scale, high.scale):  # Neighbours in float64.
      break
    if new.slope == 0:
      low = high = new
    elif new.slope < 0:
      low = new
    else:
      high = new
  return Alignment(best.scale, best.shift)


def _metric(d: np.ndarray, g: np.ndarray, options: DepthOptions) -> Alignment:
  del d, g, options
  return Alignment(1.0)


_ALIGNERS = {
  "median": _median,
  "scale": _scale,
  "scale_shift": _scale_shift,
  "least_squares": _least_squares,
  "lad": _lad,
  "metric": _metric,
}
ALIGNMENTS = tuple(_ALIGNERS)


def find_alignment(
  d: np.ndarray,
  g: np.ndarray,
  alignment: str | Alignment,
  options: DepthOptions,
) -> Alignment:
  """Returns the alignment of (N,) pixels; what is known already as it is."""
  if isinstance(alignment, Alignment):
    return alignment
  if alignment not in _ALIGNERS:
    raise InputError(
      f"unknown alignment {alignment!r}; there are {', '.join(ALIGNMENTS)}"
    )
  return _ALIGNERS[alignment](d, g, options) if d.size else Alignment(1.0)
