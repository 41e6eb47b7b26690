"""What the readers of image files and of videos share."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import NamedTuple

from point3r_jax.data.images import AnyImage
from point3r_jax.errors import InputError


class RawFrame(NamedTuple):
  """A frame of a source, before it is scaled.

  Attributes:
    load: Makes the upright RGB image; may be called in another thread.
    source: Name of the image file or of the video.
    index: Number of the frame in the source.
    timestamp: Seconds; None for an image file.
  """

  load: Callable[[], AnyImage]
  source: str
  index: int
  timestamp: float | None


@dataclasses.dataclass
class Lost:
  """Frames that the source promised and did not deliver.

  Attributes:
    frames: Their number, counted before striding. For containers that store no
      frame count (mkv, webm) the frames after a premature end are estimated.
    expected: Frames that the source promised, where it is known.
    error: The last thing the decoder complained about.
  """

  frames: int = 0
  expected: int | None = None
  error: str | None = None

  def __str__(self) -> str:
    """Says it in one line."""
    if not self.frames:
      return "no frame lost"
    of = f" of {self.expected}" if self.expected else ""
    why = f" ({self.error})" if self.error else ""
    return f"{self.frames}{of} frames lost{why}"


def select(
  start: int = 0,
  end: int | None = None,
  stride: int = 1,
  max_frames: int | None = None,
) -> range:
  """The frame indices asked for, as if the source were endless.

  Raises:
    InputError: The values contradict one another.
  """
  if start < 0:
    raise InputError(f"start is {start}: it cannot be negative")
  if end is not None and end <= start:
    raise InputError(f"end is {end}: it must be greater than start ({start})")
  if stride < 1:
    raise InputError(f"stride is {stride}: it must be 1 or more")
  if max_frames is not None and max_frames < 1:
    raise InputError(f"max_frames is {max_frames}: it must be 1 or more")
  return range(start, sys.maxsize if end is None else end, stride)[:max_frames]


def clip(wanted: range, count: int) -> range:
  """The indices of `wanted` that a source of `count` frames has."""
  return range(wanted.start, min(wanted.stop, count), wanted.step)
