"""Depth maps and error maps of a report as small PNG files."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from PIL import Image

from point3r_jax.evaluation.report.figures import DepthFigure
from point3r_jax.export.colors import (
  BROKEN,
  INFERNO,
  NEAR_IS_RED,
  NO_TRUTH,
  is_measure,
  usual_range,
)

MAX_ERROR = 0.25  # Relative; larger errors look the same.
_MAX_WIDTH = 320
_COLORS = 254  # Of a scale; the palette's last two entries are the above.


class Picture(NamedTuple):
  """A picture with its scale of colours.

  Attributes:
    title: what it shows.
    png: the file.
    bar: a PNG of the colours from left to right; None: they mean nothing.
    ends: what the first and the last colour stand for.
  """

  title: str
  png: bytes
  bar: bytes | None = None
  ends: tuple[str, str] = ("", "")


def _palette(table: np.ndarray) -> np.ndarray:
  """Returns (256, 3) uint8: a table's colours, then no truth, then broken."""
  shown = np.rint(np.linspace(0, len(table) - 1, _COLORS)).astype(int)
  special = np.array([NO_TRUTH, BROKEN], np.uint8)
  return np.concatenate([table[shown], special])


def _png(indices: np.ndarray, palette: np.ndarray) -> bytes:
  """Returns an 8-bit PNG of (H, W) uint8 indices into a (256, 3) palette."""
  image = Image.fromarray(indices)
  image.putpalette(palette.tobytes())
  file = io.BytesIO()
  image.save(file, "PNG", optimize=True)
  return file.getvalue()


def _bar(palette: np.ndarray) -> bytes:
  return _png(np.arange(_COLORS, dtype=np.uint8)[None], palette)


def _shrink(values: np.ndarray) -> np.ndarray:
  """Returns means over blocks of (H, W) values, of what is not NaN.

  A sparse map so keeps all of its points. Rows and columns that do not fill a
  block are dropped.
  """
  factor = -(-values.shape[1] // _MAX_WIDTH)
  height, width = (max(n // factor, 1) for n in values.shape)
  values = values[: height * factor, : width * factor]
  blocks = values.reshape(height, -1, width, factor)
  known = np.isfinite(blocks)
  count = known.sum(axis=(1, 3))
  total = np.where(known, blocks, 0).sum(axis=(1, 3))
  return np.where(count, total / np.maximum(count, 1), np.nan)


def _photo(image: np.ndarray) -> bytes:
  """Returns an 8-bit PNG of an (H, W, 3) uint8 image."""
  photo = Image.fromarray(np.asarray(image, np.uint8))
  factor = -(-photo.width // _MAX_WIDTH)
  photo = photo.reduce(factor).quantize(255)
  file = io.BytesIO()
  photo.save(file, "PNG", optimize=True)
  return file.getvalue()


def _measured(values: np.ndarray) -> np.ndarray:
  """Returns depth with NaN where it is none: not finite or not positive."""
  values = np.asarray(values, np.float64)
  return np.where(is_measure(values), values, np.nan)


def _indices(level: np.ndarray, missing: np.ndarray | int) -> np.ndarray:
  """Returns palette indices of levels from 0 to 1, `missing` for NaN."""
  known = np.isfinite(level)
  steps = np.rint((_COLORS - 1) * np.clip(np.where(known, level, 0), 0, 1))
  return np.where(known, steps, missing).astype(np.uint8)


def depth_pictures(content: DepthFigure) -> list[Picture]:
  """Draws a frame: input, predicted and true depth, relative error.

  Both depths have one logarithmic scale, between percentiles 2 and 98 of the
  truth, near is red. Grey: no truth. Magenta: no usable prediction.
  """
  truth, prediction = _measured(content.truth), _measured(content.prediction)
  error = np.abs(prediction - truth) / truth
  known = np.isfinite(truth).any()
  truth, prediction, error = map(_shrink, (truth, prediction, error))
  low, high = usual_range(truth if known else prediction)
  no_truth, broken = _COLORS, _COLORS + 1
  near_is_red, inferno = _palette(NEAR_IS_RED), _palette(INFERNO)
  span = np.log(high / low)
  no_error = np.where(np.isfinite(truth), broken, no_truth)
  ends = (f"{low:.3g} m", f"{high:.3g} m")
  return [
    Picture("input", _photo(content.image)),
    *(
      Picture(
        title,
        _png(_indices(np.log(depth / low) / span, missing), near_is_red),
        _bar(near_is_red),
        ends,
      )
      for title, depth, missing in (
        ("predicted depth", prediction, broken),
        ("true depth", truth, no_truth),
      )
    ),
    Picture(
      "relative error",
      _png(_indices(error / MAX_ERROR, no_error), inferno),
      _bar(inferno),
      ("0", f"{100 * MAX_ERROR:.0f} % and more"),
    ),
  ]
