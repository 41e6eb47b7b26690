"""A video file, decoded one frame at a time through PyAV."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import struct
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from PIL import Image

from point3r_jax.data.images import LANCZOS, AnyImage, resize
from point3r_jax.data.reading import Lost, RawFrame, clip
from point3r_jax.errors import InputError, one_line

_log = logging.getLogger(__name__)

# How much earlier than announced a healthy stream may end: its own duration is
# exact to a frame or so, that of the container covers the sound as well.
_STREAM_TOLERANCE_FRAMES = 2.0
_CONTAINER_TOLERANCE_SECONDS = 0.5

# Formats that say when a packet is decoded, not when its frame is shown: what
# FFmpeg makes up for that is wrong wherever an encoder has reordered frames.
_DECODING_TIMES = frozenset({"avi", "asf"})
_USUAL_RATE = 25  # Where a file does not tell; it is FFmpeg's choice, too.


class VideoFile:
  """The wanted frames of a video, upright and in square pixels.

  Frames are decoded in order from the first one, so indices are exact (unless
  the container has lost packets without trace), and nothing but the decoder's
  own few frames is held in memory. What does not decode is skipped and counted.
  Timestamps always increase; where those of the file do not, they go on at the
  frame rate.

  Attributes:
    expected_frames: About how many frames will come, or None.
    lost: What the latest pass over the frames did not get.
  """

  def __init__(self, path: str | os.PathLike[str], wanted: range):
    """Opens the video and closes it again.

    Args:
      path: The file.
      wanted: Indices of the frames to deliver; may reach beyond the end.

    Raises:
      InputError: The file is no readable video, or ends before `wanted`.
    """
    self.path = os.fspath(path)
    self.lost = Lost()
    self._wanted = wanted
    with _open(self.path) as (container, stream):
      self._count = _stored_count(container, stream)
      estimate = self._count or _estimated_count(container, stream)
    self.expected_frames = None
    if estimate is not None:
      self.expected_frames = len(clip(wanted, estimate))
    if self._count and wanted.start >= self._count:
      raise self._too_short(self._count)

  def first(self) -> RawFrame:
    """Decodes the first frame that can be decoded."""
    with _open(self.path) as (_, stream):
      for index, frame, time in _decode(stream, Lost()):
        return self._raw(index, frame, time, _display(frame, stream))
    raise InputError(f"{self.path}: none of its frames can be decoded")

  def frames(self) -> Iterator[RawFrame]:
    """Decodes the wanted frames in a fresh pass.

    Raises:
      InputError: The video ends before the first of them.
    """
    self.lost = lost = Lost(expected=self._count)
    decoded, delivered, time, display = 0, 0, None, None
    with _open(self.path) as (container, stream):
      clock = _Clock(self.path, stream.average_rate or stream.guessed_rate)
      for index, frame, stored in _decode(stream, lost):
        decoded, time = decoded + 1, clock.read(index, stored)
        display = display or _display(frame, stream)
        if index in self._wanted:
          yield self._raw(index, frame, time, display)
          delivered += 1
        if index >= self._wanted[-1]:
          return
      seen = decoded + lost.frames
      missing = _missing_at_end(container, stream, time)
      if self._count:
        missing = self._count - seen
      missing = max(0, min(missing, self._wanted.stop - seen))
      if missing:
        lost.frames += missing
        lost.error = lost.error or "the file ends early"
    if not delivered:
      raise self._too_short(decoded)

  def _raw(
    self,
    index: int,
    frame: av.VideoFrame,
    time: float | None,
    display: _Display,
  ) -> RawFrame:
    load = functools.partial(_to_image, frame, display)
    return RawFrame(load, os.path.basename(self.path), index, time)

  def _too_short(self, count: int) -> InputError:
    lost = f" ({self.lost})" if self.lost.frames else ""
    return InputError(
      f"{self.path}: has {count} frames{lost}, none left from"
      f" {self._wanted.start}"
    )


# Titles in an unknown encoding are no reason to fail; from PyAV 19 they aren't.
_LENIENT = (
  {"metadata_errors": "replace"}
  if int(av.__version__.split(".")[0]) < 19
  else {}
)


@contextlib.contextmanager
def _open(
  path: str,
) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
  """Opens a video and finds its main video stream."""
  try:
    # The prefix keeps FFmpeg from reading a protocol into the file's name.
    container = av.open(f"file:{path}", **_LENIENT)
  except (av.FFmpegError, OSError) as error:
    raise InputError(
      f"{path}: cannot open the video ({_reason(error)}); is the file complete?"
    ) from error
  with container:
    stream = container.streams.best("video")
    if stream is None:
      raise InputError(f"{path}: has no video stream")
    if stream.codec_context is None:
      raise InputError(f"{path}: is in a format that FFmpeg cannot decode")
    stream.thread_type = "AUTO"
    yield container, stream


def _decode(
  stream: av.VideoStream, lost: Lost
) -> Iterator[tuple[int, av.VideoFrame, float | None]]:
  """Decodes all intact frames and counts the others as lost.

  Yields:
    Index, frame, and the timestamp that the file has for it in seconds, if any.
  """
  decoded, decoding_times = 0, {}
  formats = stream.container.format.name.split(",")
  has_decoding_times = not _DECODING_TIMES.isdisjoint(formats)
  for number, packet in enumerate(_packets(stream, lost)):
    if has_decoding_times and packet is not None:
      decoding_times[number] = packet.dts
    try:
      # With frame threads a packet cut short costs its neighbours too.
      if packet is not None and packet.is_corrupt:
        raise av.InvalidDataError(0, "truncated packet")
      frames = stream.decode(packet)
    except av.FFmpegError as error:
      lost.frames += 1
      lost.error = _reason(error)
      continue
    for frame in frames:
      if frame.is_corrupt:
        lost.frames += 1
        lost.error = "damaged frame"
      else:
        index, ticks = decoded + lost.frames, frame.pts
        if has_decoding_times:  # The n-th frame shown has the n-th of them.
          ticks = decoding_times.pop(index, None)
        time = None if ticks is None else float(ticks * stream.time_base)
        yield index, frame, time
        decoded += 1


def _packets(stream: av.VideoStream, lost: Lost) -> Iterator[av.Packet | None]:
  """The packets of a stream as far as they can be read, None to flush."""
  try:
    yield from (p for p in stream.container.demux(stream) if p.size)
  except av.FFmpegError as error:
    lost.error = _reason(error)
  yield None


class _Clock:
  """Timestamps that increase, whatever the file says.

  Where one is missing or does not increase, time goes on from the last good one
  at the frame rate. So of shuffled ones those later than all before are kept,
  and what follows a jump back is not squeezed together.
  """

  def __init__(self, path: str, rate: Fraction | None):
    """Starts before the first frame; the path is for the warning."""
    self._path = path
    self._rate = float(rate or _USUAL_RATE)
    self._good = 0, 0.0  # Index and time.
    self._last = -math.inf
    self._warned = False

  def read(self, index: int, stored: float | None) -> float:
    """The time of the next frame, for which the file has `stored`: seconds."""
    if stored is not None and stored > self._last:
      self._good = index, stored
    elif not self._warned:
      self._warned = True
      _log.warning(
        "%s: the timestamp of frame %d is missing or does not increase; such "
        "ones are made up, from %g frames a second",
        *(self._path, index, self._rate),
      )
    good_index, good_time = self._good
    self._last = good_time + (index - good_index) / self._rate
    return self._last


class _Display(NamedTuple):
  """How the frames of a stream are meant to be shown."""

  pixel_aspect: float
  matrix: bytes | None


def _display(frame: av.VideoFrame, stream: av.VideoStream) -> _Display:
  """Reads it off one frame.

  Once a stream is enough, and asking every frame for its side data would make
  reference cycles that keep the frames alive until the garbage collector runs.
  """
  matrix = frame.side_data.get("DISPLAYMATRIX")
  aspect = float(stream.sample_aspect_ratio or 1)
  return _Display(aspect, None if matrix is None else bytes(matrix))


def _to_image(frame: av.VideoFrame, display: _Display) -> AnyImage:
  """Converts a frame to RGB with square pixels, turned as it is displayed."""
  image, aspect = frame.to_ndarray(format="rgb24"), display.pixel_aspect
  if abs(aspect - 1) > 0.01:  # Less is rounding by the encoder.
    height, width = image.shape[:2]
    size = round(height / min(aspect, 1)), round(width * max(aspect, 1))
    image = resize(image, size, LANCZOS)
  return _turned(image, display.matrix) if display.matrix else image


def _turned(image: AnyImage, matrix: bytes) -> Image.Image:
  """Applies a display matrix: x' = a x + c y, y' = b x + d y, y downwards."""
  if isinstance(image, np.ndarray):
    image = Image.fromarray(image)
  a, b, _, c, d = struct.unpack("=5i", matrix[:20])
  if abs(a) < abs(b):
    image = image.transpose(Image.Transpose.TRANSPOSE)
    a, d = c, b
  if a < 0:
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  if d < 0:
    image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
  return image


def _stored_count(
  container: av.container.InputContainer, stream: av.VideoStream
) -> int | None:
  """The number of frames that the container states."""
  if "mov" in container.format.name.split(","):
    # The header counts what an edit list has cut off, the index does not
    # (which PyAV tells from version 17 on).
    index = getattr(stream, "index_entries", ())
    shown = sum(not entry.is_discard for entry in index)
    if 0 < shown < stream.frames:
      return shown
  return stream.frames or None


def _estimated_count(
  container: av.container.InputContainer, stream: av.VideoStream
) -> int | None:
  """The number of frames by duration and rate."""
  duration = _own_duration(stream) or _duration(container)
  rate = stream.average_rate
  return round(duration * float(rate)) or None if duration and rate else None


def _missing_at_end(
  container: av.container.InputContainer,
  stream: av.VideoStream,
  last: float | None,
) -> int:
  """Estimates from timestamps how many frames a cut has cost."""
  if last is None or not stream.average_rate:
    return 0
  rate = float(stream.average_rate)
  tolerance = _STREAM_TOLERANCE_FRAMES / rate
  duration = _own_duration(stream)
  if not duration:
    duration, tolerance = _duration(container), _CONTAINER_TOLERANCE_SECONDS
  start = (container.start_time or 0) / av.time_base
  gap = start + duration - last - 1 / rate
  return round(gap * rate) if gap > tolerance else 0


def _own_duration(stream: av.VideoStream) -> float:
  """Seconds that the stream itself states, or 0."""
  if stream.duration:
    return float(stream.duration * stream.time_base)
  # Matroska keeps it as a tag: 00:01:02.500000000.
  fields = stream.metadata.get("DURATION", "").split(":")
  try:
    hours, minutes, seconds = map(float, fields)
  except ValueError:
    return 0.0
  return 3600 * hours + 60 * minutes + seconds


def _duration(container: av.container.InputContainer) -> float:
  """Seconds that the container states, or 0."""
  return (container.duration or 0) / av.time_base


def _reason(error: BaseException) -> str:
  """What FFmpeg says, without error number and file name."""
  return getattr(error, "strerror", None) or one_line(error)
