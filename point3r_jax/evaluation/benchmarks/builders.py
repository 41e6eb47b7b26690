"""Sequences from lists of files: for depth and for camera poses.

Whatever can be told from headers is checked when a sequence is built; frames
are decoded when they are asked for, and none is kept.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from point3r_jax.data.images import (
  Preparation,
  check_size,
  load_image,
  prepare_image,
)
from point3r_jax.errors import InputError
from point3r_jax.evaluation.benchmarks.files import image_size
from point3r_jax.evaluation.sequences import Sequence, Trajectory


@dataclasses.dataclass(frozen=True)
class DepthOptions:
  """How the depth protocols show images to the network.

  Attributes:
    size: the network's image size. All published numbers are at 512.
    preparation: the published protocols squeeze the whole image into a network
      size ("resize"), which distorts Sintel (218 rows become 208) and KITTI
      (155 become 144). "crop" cuts off the excess instead, and the truth is
      cut to the rectangle that the network saw, to the nearest pixel.
  """

  size: int = 512
  preparation: Literal["resize", "crop"] = "resize"

  def __post_init__(self):
    """Checks the size."""
    check_size(self.size)


@dataclasses.dataclass(frozen=True)
class PoseOptions:
  """Which images the pose protocol shows to the network.

  Attributes:
    size: the network's image size. All published numbers are at 512.
    preparation: the published protocol cuts off what exceeds a network size
      ("crop"); "resize" squeezes the whole image into it, as for depth.
    stride: 2 uses every second frame of a sequence, of the images and of the
      truth, and so on; 1 in all published numbers.
  """

  size: int = 512
  preparation: Literal["resize", "crop"] = "crop"
  stride: int = 1

  def __post_init__(self):
    """Checks the numbers."""
    check_size(self.size)
    require_at_least_1(stride=self.stride)


def require_at_least_1(**numbers: int | None) -> None:
  """Raises `InputError` for options below 1; None passes."""
  for name, number in numbers.items():
    if number is not None and number < 1:
      raise InputError(f"option {name}: {number} is less than 1")


def common_size(
  paths: list[Path], size_of: Callable[[Path], tuple[int, int]]
) -> tuple[int, int]:
  """The (height, width) of all files, or an `InputError` if they differ."""
  first = size_of(paths[0])
  for path in paths[1:]:
    size = size_of(path)
    if size != first:
      raise InputError(
        f"{path}: has {size[1]}x{size[0]} pixels, {paths[0].name} has"
        f" {first[1]}x{first[0]}"
      )
  return first


@dataclasses.dataclass(frozen=True)
class _ImageLoader:
  """Index → (H, W, 3) uint8 as the network sees it.

  Attributes:
    paths: of the images, all of one size.
    size: the network's image size.
    crop: whether excess is cut off.
    preparation: what is done to every image.
  """

  paths: list[Path]
  size: int
  crop: bool
  preparation: Preparation

  @classmethod
  def open(cls, paths: list[Path], size: int, crop: bool) -> _ImageLoader:
    """Finds out from the headers how the images are prepared."""
    height, width = common_size(paths, image_size)
    blank = Image.new("RGB", (width, height))
    try:
      _, preparation = prepare_image(blank, size, crop)
    except InputError as error:
      raise InputError(f"{paths[0]}: {error}") from None
    return cls(paths, size, crop, preparation)

  def __call__(self, index: int) -> np.ndarray:
    """Loads one image."""
    path = self.paths[index]
    image = load_image(path)
    # The header does not tell that a photo is to be turned.
    if (image.height, image.width) != self.preparation.source_size:
      raise InputError(f"{path}: is turned by its EXIF data")
    return prepare_image(image, self.size, self.crop)[0]


def depth_sequence(
  name: str,
  images: list[Path],
  truths: list[Path],
  truth_size: Callable[[Path], tuple[int, int]],
  read_truth: Callable[[Path], np.ndarray],
  options: DepthOptions,
  independent: bool,
) -> Sequence:
  """A sequence with true depth.

  Args:
    name: of the sequence.
    images: in order.
    truths: one for each image, in the same order.
    truth_size: reads (height, width) from the header of a truth.
    read_truth: reads (H0, W0) metres from a truth.
    options: how images are prepared.
    independent: whether every frame is a stream of its own.

  Raises:
    InputError: counts or sizes differ, or a header cannot be read.
  """
  if len(images) != len(truths):
    raise InputError(
      f"{images[0].parent}: has {len(images)} images, but there are"
      f" {len(truths)} depth maps in {truths[0].parent}"
    )
  crop = options.preparation == "crop"
  image = _ImageLoader.open(images, options.size, crop)
  preparation = image.preparation
  common_size(truths, truth_size)
  return Sequence(
    name=name,
    frames=tuple(map(str, images)),
    image_size=preparation.network_size,
    load_image=image,
    independent=independent,
    load_depth=functools.partial(_load_depth, truths, read_truth, preparation),
  )


def pose_sequence(
  name: str,
  images: list[Path],
  read_trajectory: Callable[[], Trajectory],
  options: PoseOptions,
) -> Sequence:
  """A sequence with a true trajectory.

  The trajectory is read once to see that it is good: it is small.

  Args:
    name: of the sequence.
    images: in order.
    read_trajectory: reads one pose for each image.
    options: size and stride.

  Raises:
    InputError: counts or sizes differ, or something cannot be read.
  """
  poses = len(read_trajectory().timestamps)
  if len(images) != poses:
    raise InputError(
      f"{images[0].parent}: has {len(images)} images, but the true trajectory"
      f" has {poses} poses"
    )
  chosen = images[:: options.stride]
  crop = options.preparation == "crop"
  image = _ImageLoader.open(chosen, options.size, crop)
  return Sequence(
    name=name,
    frames=tuple(map(str, chosen)),
    image_size=image.preparation.network_size,
    load_image=image,
    load_trajectory=functools.partial(
      _load_trajectory, read_trajectory, options.stride
    ),
  )


def _load_trajectory(read: Callable[[], Trajectory], stride: int) -> Trajectory:
  """Loads the poses of the frames that are used."""
  timestamps, poses = read()
  return Trajectory(timestamps[::stride], poses[::stride])


def _load_depth(
  paths: list[Path],
  read: Callable[[Path], np.ndarray],
  preparation: Preparation,
  index: int,
) -> np.ndarray:
  """Loads the part of the true depth that the network saw."""
  depth = read(paths[index])
  seen = [
    slice(round(start / whole * side), round((start + length) / whole * side))
    for start, length, whole, side in zip(
      preparation.offset[::-1],
      preparation.network_size,
      preparation.resized_size,
      depth.shape,
      strict=True,
    )
  ]
  return depth[tuple(seen)]
