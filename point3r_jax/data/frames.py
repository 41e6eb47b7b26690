"""A stream of network-sized frames from a video, a folder, a glob or images.

Frames are read as they are asked for and only a few are held, so a long video
costs no more memory than a short one. `prefetch.prefetch` moves the reading to
a thread:

  frames = open_frames("walk.mp4", stride=2)
  for frame in prefetch(frames):
    prediction = stream(frame.image)
  print(frames.lost)
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from point3r_jax.data import images
from point3r_jax.data import paths as paths_lib
from point3r_jax.data.prefetch import ordered_map
from point3r_jax.data.reading import Lost, RawFrame, clip, select
from point3r_jax.data.resampling import DeviceResize
from point3r_jax.data.video import VideoFile
from point3r_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Frame:
  """One frame, ready for the network.

  Attributes:
    image: uint8 (H, W, 3) pixels.
    preparation: How they were made from the source image.
    source: The image file, relative to the folder that holds all the input
      images; or the name of the video.
    index: Number of the frame in the source, before striding.
    timestamp: Seconds in the video, later than those of the frames before;
      None for an image file.
  """

  image: np.ndarray
  preparation: images.Preparation
  source: str
  index: int
  timestamp: float | None


class Reader(Protocol):
  """Where frames come from; what `VideoFile` and `ImageFiles` have in common.

  Attributes:
    expected_frames: How many frames will come, or None.
    lost: What the latest pass over the frames did not get.
  """

  expected_frames: int | None
  lost: Lost

  def first(self) -> RawFrame:
    """A frame that stands for the size of all."""

  def frames(self) -> Iterator[RawFrame]:
    """A fresh pass over the frames."""


class ImageFiles:
  """Image files as a `Reader`. One that cannot be read is an `InputError`."""

  def __init__(
    self, files: Sequence[Path], wanted: range, shuffle_seed: int | None = None
  ):
    """Chooses the files to read; the seed puts these into random order."""
    indices = list(clip(wanted, len(files)))
    if not indices:
      raise InputError(
        f"{files[0].parent}: has {len(files)} images, none left from"
        f" {wanted.start}"
      )
    if shuffle_seed is not None:
      random.Random(shuffle_seed).shuffle(indices)
    names = paths_lib.relative_names(files)
    self._chosen = [(index, files[index], names[index]) for index in indices]
    self.expected_frames = len(indices)
    self.lost = Lost(expected=len(indices))

  def first(self) -> RawFrame:
    """Names the first file."""
    return next(self.frames())

  def frames(self) -> Iterator[RawFrame]:
    """Names one file after the other."""
    for index, path, name in self._chosen:
      load = functools.partial(images.load_image, path)
      yield RawFrame(load, name, index, None)


class FrameSource:
  """Frames of one size, read anew in every iteration.

  Attributes:
    image_size: (height, width) of all frames, from the first image of the
      source. Images of other shapes are scaled and cropped to it.
    expected_frames: How many frames will come, for a progress bar: exact for
      images, an estimate for videos, None if unknown.
    mixed_sizes: Frames of the latest iteration that had to be conformed to
      `image_size`.
  """

  def __init__(
    self, reader: Reader, size: int, crop: bool, on_device: bool = False
  ):
    """Reads the first image; see `open_frames`."""
    self._reader = reader
    self._size = size
    self._crop = crop
    self._resize = DeviceResize() if on_device else images.resize
    first = reader.first()
    self.image_size = self._own_size(first.source, first.load())
    self.expected_frames = reader.expected_frames
    self.mixed_sizes = 0

  @property
  def lost(self) -> Lost:
    """What the latest iteration could not read; complete at its end."""
    return self._reader.lost

  def __iter__(self) -> Iterator[Frame]:
    """Reads and prepares the frames, a few at a time, in their order."""
    self.mixed_sizes = 0
    with contextlib.closing(self._reader.frames()) as frames:
      for frame, mixed in ordered_map(self._prepare, frames):
        self.mixed_sizes += mixed
        yield frame

  def _prepare(self, raw: RawFrame) -> tuple[Frame, bool]:
    """Makes a frame; also returns whether it had another size."""
    image = raw.load()
    mixed = self._own_size(raw.source, image) != self.image_size
    pixels, preparation = images.prepare_image(
      image,
      self._size,
      self._crop,
      self.image_size if mixed else None,
      self._resize,
    )
    frame = Frame(pixels, preparation, raw.source, raw.index, raw.timestamp)
    return frame, mixed

  def _own_size(self, name: str, image: images.AnyImage) -> tuple[int, int]:
    """The network size that the image would have alone."""
    try:
      return images.network_size(images.image_size(image), self._size)
    except InputError as error:
      raise InputError(f"{name}: {error}") from None


def open_frames(
  inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
  *,
  size: int = 512,
  crop: bool = True,
  stride: int = 1,
  start: int = 0,
  end: int | None = None,
  max_frames: int | None = None,
  shuffle_seed: int | None = None,
  on_device: bool = False,
) -> FrameSource:
  """Opens a video, or the images of a folder, a glob or a list.

  Args:
    inputs: One or more names; see `paths.find_files`.
    size: Network size; see `images.prepare_image`.
    crop: Whether to crop rather than squeeze to the network size.
    stride: Take every `stride`-th frame.
    start: Index of the first frame.
    end: Index after the last frame; may lie beyond the source's end.
    max_frames: How many frames to take at most.
    shuffle_seed: Puts the frames so chosen into a random order that depends
      on the seed alone. Not for videos.
    on_device: Whether a GPU scales a video's frames, if JAX's default device is
      one. They come out the same; see `resampling.DeviceResize`.

  Returns:
    The frames, to be iterated over as often as needed.

  Raises:
    InputError: The input cannot be read, or the values make no sense. Reading
      on may raise it too: nothing is skipped in silence.
  """
  images.check_size(size)
  wanted = select(start, end, stride, max_frames)
  files = paths_lib.find_files(inputs)
  if not paths_lib.is_video(files[0]):
    return FrameSource(ImageFiles(files, wanted, shuffle_seed), size, crop)
  if shuffle_seed is not None:
    raise InputError(
      f"{files[0]}: a video cannot be shuffled; extract its frames to a folder"
      " first"
    )
  return FrameSource(VideoFile(files[0], wanted), size, crop, on_device)
