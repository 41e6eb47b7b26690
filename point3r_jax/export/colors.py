"""Colours of depth, error and confidence, the same in all pictures.

Depth and confidence have logarithmic scales: the same relative difference is
the same step in colour, near and far. Depth runs from red (near) to blue.
"""

from __future__ import annotations

import numpy as np

NO_TRUTH = (72, 72, 72)  # There is nothing to compare with.
BROKEN = (255, 0, 255)  # Predictions that are not finite or not positive.


def color_table(stops: str) -> np.ndarray:
  """Returns (256, 3) uint8 through colours at equal distances.

  Args:
    stops: two or more colours in hexadecimal, such as "000000 ff8000".
  """
  colors = np.array([list(bytes.fromhex(stop)) for stop in stops.split()])
  x = np.linspace(0, len(colors) - 1, 256)
  channels = [np.interp(x, np.arange(len(colors)), c) for c in colors.T]
  return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


TURBO = color_table(
  "30123b 4040a2 466be3 4294ff 28bceb 18ddc2 32f298 6dfe62 a4fc3c cbed34 ecd13a"
  " fdae35 fb8122 ec530f d23105 ac1701 7a0403"
)
INFERNO = color_table(
  "000004 0b0724 210c4a 3d0965 57106e 71196e 8a226a a32c61 bc3754 d04545 e35933"
  " f1711f f98c0a fcaa0f f9c932 f2e865 fcffa4"
)
VIRIDIS = color_table(
  "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c 1f9f88 27ad81"
  " 3dbc74 5cc863 81d34d aadc32 d5e21a fde725"
)
NEAR_IS_RED = TURBO[::-1]


def colorize(level: np.ndarray, table: np.ndarray) -> np.ndarray:
  """Returns (..., 3) uint8 colours of levels; outside 0 to 1 the end colours.

  Args:
    level: (...), without NaN.
    table: (256, 3) uint8.
  """
  return table[np.rint(255 * np.clip(level, 0, 1)).astype(np.uint8)]


def is_measure(values: np.ndarray) -> np.ndarray:
  """Returns where a depth or a confidence is one: positive and finite."""
  return np.isfinite(values) & (values > 0)


def usual_range(values: np.ndarray) -> tuple[float, float]:
  """Returns percentiles 2 and 98, apart from each other; (1, 2) of nothing.

  Args:
    values: (...); only what is positive and finite counts.
  """
  values = values[is_measure(values)]
  if not values.size:
    return 1.0, 2.0
  low, high = np.percentile(values, [2, 98])
  return float(low), float(max(high, 1.001 * low))


def log_colors(
  values: np.ndarray,
  ends: tuple[float, float],
  table: np.ndarray,
  missing: tuple[int, int, int] = BROKEN,
) -> np.ndarray:
  """Returns (..., 3) uint8 colours on a logarithmic scale.

  Args:
    values: (...); what is not positive and finite is missing.
    ends: what the first and the last colour stand for, positive.
    table: (256, 3) uint8.
    missing: the colour of what is.
  """
  known, (low, high) = is_measure(values), ends
  level = np.log(np.where(known, values, low) / low) / np.log(high / low)
  colors = colorize(level, table)
  colors[~known] = missing
  return colors


def error_colors(
  predicted: np.ndarray, true: np.ndarray, greatest: float
) -> np.ndarray:
  """Returns (..., 3) uint8 colours of relative errors of depth.

  Args:
    predicted: (...) depth, in the unit of the true one. Where it is not
      positive and finite, the colour is `BROKEN`.
    true: (...) depth. Where it is not, the colour is `NO_TRUTH`.
    greatest: the relative error of the last colour; larger ones look the same.
  """
  has_truth, has_depth = is_measure(true), is_measure(predicted)
  error = np.abs(
    np.where(has_depth, predicted, 0) - np.where(has_truth, true, 0)
  )
  error = error / np.where(has_truth, true, 1)
  colors = colorize(error / greatest, INFERNO)
  colors[~has_depth] = BROKEN
  colors[~has_truth] = NO_TRUTH
  return colors
