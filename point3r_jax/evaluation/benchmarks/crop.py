"""Crops and scales an image with its depth and camera to a wanted shape.

This is what the published reconstruction protocol does to 7-Scenes and NRGBD:
cut so that the principal point is in the middle, scale to cover the target,
cut what sticks out. Sizes are (height, width); pixel centres lie at integers.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from point3r_jax.errors import InputError

# Keeps a side that is scaled to exactly the target from being rounded below.
_SCALE_EXCESS = 1e-8


class Crop(NamedTuple):
  """How an image becomes another: cut, scaled, cut.

  Attributes:
    source_size: (height, width) that it applies to.
    window: (left, top, right, bottom) of the first cut, in the source.
    scale: by which the window was meant to be scaled.
    scaled_size: (height, width) of the window after scaling.
    offset: (x, y) of the second cut, in the scaled window.
    target_size: (height, width) of the result.
    intrinsics: (3, 3) float64 of the result, pixels.
  """

  source_size: tuple[int, int]
  window: tuple[int, int, int, int]
  scale: float
  scaled_size: tuple[int, int]
  offset: tuple[int, int]
  target_size: tuple[int, int]
  intrinsics: np.ndarray

  def image(self, pixels: np.ndarray) -> np.ndarray:
    """Crops (H, W, 3) uint8, Lanczos to shrink and bicubic to enlarge."""
    self._check(pixels)
    image = Image.fromarray(pixels).crop(self.window)
    filter_ = Image.Resampling.BICUBIC
    if self.scale < 1:
      filter_ = Image.Resampling.LANCZOS
    image = image.resize(self.scaled_size[::-1], filter_)
    return self._target(np.asarray(image))

  def depth(self, depth: np.ndarray) -> np.ndarray:
    """Crops an (H, W) map; every value is that of a source pixel."""
    self._check(depth)
    left, top, right, bottom = self.window
    depth = cv2.resize(
      np.ascontiguousarray(depth[top:bottom, left:right]),
      self.scaled_size[::-1],
      interpolation=cv2.INTER_NEAREST,
    )
    return self._target(depth)

  def _check(self, pixels: np.ndarray) -> None:
    if pixels.shape[:2] != self.source_size:
      raise ValueError(f"{pixels.shape[:2]} is not {self.source_size}")

  def _target(self, pixels: np.ndarray) -> np.ndarray:
    """Makes the second cut."""
    (x, y), (height, width) = self.offset, self.target_size
    return np.ascontiguousarray(pixels[y : y + height, x : x + width])


def plan_crop(
  source_size: tuple[int, int],
  intrinsics: np.ndarray,
  target_size: tuple[int, int],
  margin: int = 0,
  orientation: np.random.Generator | None = None,
) -> Crop:
  """Plans the crop of an image.

  Args:
    source_size: (height, width).
    intrinsics: (3, 3) of the source, pixels.
    target_size: (height, width) to reach.
    margin: pixels by which the scaled image exceeds the target at least; a
      slight zoom for training.
    orientation: lets `orient` turn the target to portrait; None keeps it.

  Raises:
    InputError: The principal point is far from the middle of the image.
  """
  intrinsics = np.array(intrinsics, np.float64)
  left, top, right, bottom = window = _centred(source_size, intrinsics)
  size = bottom - top, right - left
  if orientation is not None:
    target_size = orient(size, target_size, orientation)
  cover = [side + margin for side in target_size]
  scale = max(cover[0] / size[0], cover[1] / size[1]) + _SCALE_EXCESS
  scaled_size = int(size[0] * scale), int(size[1] * scale)
  excess = np.array([size[1], size[0]]) * scale - scaled_size[::-1]
  # Scaled about the image's corner, half a pixel from the first centre; then
  # the part of a pixel that was lost is taken from both sides alike.
  centre = intrinsics[:2, 2] - (left, top)
  centre = (centre + 0.5) * scale - excess / 2 - 0.5
  symmetric = np.subtract(scaled_size, target_size)[::-1] / 2
  # Rounded the long way, so that halves fall as in the published numbers.
  x, y = np.rint(centre - (centre - symmetric)).astype(int).tolist()
  intrinsics[:2] *= scale
  intrinsics[:2, 2] = centre - (x, y)
  return Crop(
    source_size, window, scale, scaled_size, (x, y), target_size, intrinsics
  )


def orient(
  size: tuple[int, int],
  target_size: tuple[int, int],
  rng: np.random.Generator,
) -> tuple[int, int]:
  """Swaps the target for a portrait image, at random for a near-square one.

  Args:
    size: (height, width) of the image.
    target_size: (height, width), landscape or square.
    rng: asked only if the image is within a tenth of a square.

  Returns:
    The target as it is, or with its sides swapped.
  """
  height, width = size
  swap = height > 1.1 * width
  if 0.9 < height / width < 1.1 and target_size[0] != target_size[1]:
    swap = bool(rng.integers(2))
  return target_size[::-1] if swap else target_size


def _centred(
  source_size: tuple[int, int], intrinsics: np.ndarray
) -> tuple[int, int, int, int]:
  """The largest window with the principal point in its middle."""
  height, width = source_size
  x, y = np.rint(intrinsics[:2, 2]).astype(int).tolist()
  half_x, half_y = min(x, width - x), min(y, height - y)
  if half_x <= width / 5 or half_y <= height / 5:
    raise InputError(
      f"the principal point ({x}, {y}) is too far from the middle of an image"
      f" of {width}x{height} pixels"
    )
  return x - half_x, y - half_y, x + half_x, y + half_y
