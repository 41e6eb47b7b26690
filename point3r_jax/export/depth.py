"""Depth and confidence maps, a file a frame; all of a file or nothing."""

import os
from typing import NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin

from point3r_jax import files

_PNG_MAX = 65535


class DepthPngCounts(NamedTuple):
  """Pixels of a depth map that its PNG marks as invalid, by reason.

  Attributes:
    invalid: Depth not finite or not positive.
    saturated: Beyond the largest value of 16 bits, at this scale.
    vanished: Positive, but rounds to 0 at this scale.
  """

  invalid: int
  saturated: int
  vanished: int


def write_depth_png(
  path: str | os.PathLike[str], depth: np.ndarray, scale: float
) -> DepthPngCounts:
  """Writes a depth map as a 16-bit PNG of round(depth · scale).

  0 means no depth. What 16 bits cannot hold becomes 0 as well, rather than a
  wrong depth, and is counted. The scale is also in the file, as the text field
  "depth_scale".

  Args:
    path: Name of the file; an existing one is replaced.
    depth: (H, W) z-depth.
    scale: Steps per unit of depth: 1000 stores millimetres of metres.

  Returns:
    How many pixels became 0, and why.
  """
  if not 0 < scale < np.inf:
    raise ValueError(f"scale must be positive, not {scale}.")
  valid = np.isfinite(depth) & (depth > 0)
  steps = np.rint(np.where(valid, depth, 0).astype(np.float64) * scale)
  saturated = steps > _PNG_MAX
  vanished = valid & (steps == 0)
  values = np.where(saturated, 0, steps).astype("<u2")
  text = PngImagePlugin.PngInfo()
  text.add_text("depth_scale", repr(float(scale)))
  # Noise hardly compresses: higher levels take up to 9 times as long for 7 %.
  with files.atomic_file(path) as file:
    Image.fromarray(values).save(file, "PNG", pnginfo=text, compress_level=1)
  return DepthPngCounts(
    invalid=int(np.count_nonzero(~valid)),
    saturated=int(np.count_nonzero(saturated)),
    vanished=int(np.count_nonzero(vanished)),
  )


def write_depth_npz(path: str | os.PathLike[str], depth: np.ndarray) -> None:
  """Writes a depth map as float32, unchanged, under the key "depth".

  Args:
    path: Name of the file, with its suffix; an existing one is replaced.
    depth: (H, W) z-depth in the scale predicted by the model.
  """
  # Not compressed: mantissas are noise, so it would cost time and save little.
  with files.atomic_file(path) as file:
    np.savez(file, depth=np.asarray(depth, np.float32))


def write_confidence_npz(
  path: str | os.PathLike[str], confidence: np.ndarray
) -> None:
  """Writes a confidence map as float32, unchanged, under "confidence".

  Args:
    path: Name of the file, with its suffix; an existing one is replaced.
    confidence: (H, W), unbounded above, so 16 bits of any kind would not do.
  """
  with files.atomic_file(path) as file:
    np.savez(file, confidence=np.asarray(confidence, np.float32))
