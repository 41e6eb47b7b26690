"""Sequences with true points, from colour, depth and poses (mv_recon)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np

from point3r_jax.data.images import PATCH, check_size
from point3r_jax.errors import InputError
from point3r_jax.evaluation.benchmarks.builders import (
  common_size,
  require_at_least_1,
)
from point3r_jax.evaluation.benchmarks.crop import Crop, plan_crop
from point3r_jax.evaluation.benchmarks.files import (
  image_size,
  png16_size,
  read_png16,
  read_rgb,
)
from point3r_jax.evaluation.sequences import PointView, Sequence

_MIN_DEPTH = 1e-3


@dataclasses.dataclass(frozen=True)
class RgbdOptions:
  """What the two datasets of multi-view reconstruction have in common.

  Attributes:
    size: long side of the network input, 4:3. 224 is the middle of the input
      at 512. All published numbers are at 512.
    setting: "sparse" takes the few frames of the published evaluation code,
      from the whole sequence. "long" is our reading of the dense setting of
      the paper (second version on arXiv: 500 to 1000 frames a sequence), which
      the code does not have: every frame from the first on.
    stride: from one frame to the next; None is that of the setting: 1 if long;
      if sparse, 200 for 7-Scenes and min(500, n // 2) for the n frames of an
      NRGBD scene.
    max_frames: a sequence of the long setting ends here.
    max_depth: metres; what is farther counts as not measured.
    focal: of both axes, pixels. One constant for all frames, as published;
      7-Scenes has no calibration of its own.
    principal_point: (x, y), pixels, likewise.
    seed: of the choice of portrait or landscape for frames that are nearly
      square. Those of these datasets, 640x480, are not.
  """

  size: int = 512
  setting: Literal["sparse", "long"] = "sparse"
  stride: int | None = None
  max_frames: int = 1000
  max_depth: float = 10.0
  focal: float = 525.0
  principal_point: tuple[float, float] = (320.0, 240.0)
  seed: int = 0

  def __post_init__(self):
    """Checks the numbers."""
    check_size(self.size)
    require_at_least_1(stride=self.stride, max_frames=self.max_frames)

  @property
  def intrinsics(self) -> np.ndarray:
    """(3, 3) pixels, of the source frames."""
    (x, y), f = self.principal_point, self.focal
    return np.array([[f, 0, x], [0, f, y], [0, 0, 1]], np.float64)

  def choose(self, count: int, sparse_stride: int) -> range:
    """The frames to use, out of `count`."""
    if self.setting == "long":
      return range(0, count, self.stride or 1)[: self.max_frames]
    return range(0, count, self.stride or sparse_stride)


class RgbdFrame(NamedTuple):
  """One frame on disk.

  Attributes:
    color: image of 8 bits a channel.
    depth: 16-bit PNG, millimetres.
    camera_to_world: (4, 4) float64, OpenCV axes, metres.
  """

  color: Path
  depth: Path
  camera_to_world: np.ndarray


def rgbd_sequence(
  name: str, frames: list[RgbdFrame], options: RgbdOptions
) -> Sequence:
  """A sequence with true points.

  Raises:
    InputError: sizes differ, or a header cannot be read.
  """
  colors = [frame.color for frame in frames]
  common_size(colors, image_size)
  depths = [frame.depth for frame in frames]
  views = _Views(frames, common_size(depths, png16_size), options)
  try:
    views.crop(0)
  except InputError as error:
    raise InputError(f"{depths[0]}: {error}") from None
  return Sequence(
    name=name,
    frames=tuple(map(str, colors)),
    image_size=views.network_size,
    load_image=views.image,
    load_points=views.points,
  )


@dataclasses.dataclass(frozen=True)
class _Views:
  """Loads frames at the network's resolution.

  Attributes:
    frames: on disk.
    source_size: (height, width) of the depth maps; images are brought to it.
    options: how to prepare them.
  """

  frames: list[RgbdFrame]
  source_size: tuple[int, int]
  options: RgbdOptions

  @property
  def network_size(self) -> tuple[int, int]:
    """The (height, width) of the network input."""
    size = self.options.size
    return (224, 224) if size == 224 else self._target_size

  @property
  def _target_size(self) -> tuple[int, int]:
    """The (height, width) to crop to, landscape."""
    size = 512 if self.options.size == 224 else self.options.size
    return max(size * 3 // 4 // PATCH, 1) * PATCH, size

  def crop(self, index: int) -> Crop:
    """How a frame is cropped."""
    rng = np.random.default_rng([self.options.seed, index])
    return plan_crop(
      self.source_size,
      self.options.intrinsics,
      self._target_size,
      orientation=rng,
    )

  def image(self, index: int) -> np.ndarray:
    """Loads (H, W, 3) uint8, the network input."""
    pixels = read_rgb(self.frames[index].color)
    if pixels.shape[:2] != self.source_size:
      pixels = cv2.resize(pixels, self.source_size[::-1])  # Bilinear.
    return self._finish(self.crop(index).image(pixels))

  def points(self, index: int) -> PointView:
    """Loads the true points."""
    frame, crop = self.frames[index], self.crop(index)
    depth = crop.depth(_metres(frame.depth, self.options.max_depth))
    points = unproject(depth, crop.intrinsics, frame.camera_to_world)
    return PointView(
      self._finish(points),
      self._finish(depth > 0),
      frame.camera_to_world.astype(np.float32),
    )

  def _finish(self, pixels: np.ndarray) -> np.ndarray:
    """Lays portrait on its side, and cuts what 224 asks for."""
    if pixels.shape[0] > pixels.shape[1]:
      pixels = np.swapaxes(pixels, 0, 1)
    height, width = self.network_size
    y = pixels.shape[0] // 2 - height // 2
    x = pixels.shape[1] // 2 - width // 2
    return np.ascontiguousarray(pixels[y : y + height, x : x + width])


def unproject(
  depth: np.ndarray, intrinsics: np.ndarray, camera_to_world: np.ndarray
) -> np.ndarray:
  """Lifts a depth map to points in the world frame.

  Args:
    depth: (H, W) float32 z-depth.
    intrinsics: (3, 3) without skew, pixels.
    camera_to_world: (4, 4), OpenCV axes.

  Returns:
    (H, W, 3) float32, in the depth's unit.
  """
  k, pose = np.float32(intrinsics), np.float32(camera_to_world)
  v, u = np.indices(depth.shape, np.float32)
  x = (u - k[0, 2]) * depth / k[0, 0]
  y = (v - k[1, 2]) * depth / k[1, 1]
  return np.stack([x, y, depth], axis=-1) @ pose[:3, :3].T + pose[:3, 3]


def _metres(path: Path, max_depth: float) -> np.ndarray:
  """Reads (H, W) float32 metres; 0 where nothing was measured."""
  raw = read_png16(path)
  depth = raw.astype(np.float32) / 1000
  # 65535 is what a depth camera writes where it sees nothing.
  bad = (raw == 65535) | (depth > max_depth) | (depth < _MIN_DEPTH)
  return np.where(bad, np.float32(0), depth)
