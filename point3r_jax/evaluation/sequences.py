"""What a benchmark is made of: sequences of images with their truth.

Loaders are called when a frame is needed and may be called from several
threads, so that a sequence of thousands of frames never lies in memory whole.
They raise `InputError` that names the file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Trajectory(NamedTuple):
  """The path of a camera.

  Attributes:
    timestamps: (T,) float64, seconds or frame numbers, increasing.
    camera_to_world: (T, 4, 4) float64, OpenCV axes, any world frame and unit.
  """

  timestamps: np.ndarray
  camera_to_world: np.ndarray


class PointView(NamedTuple):
  """The true points of one frame.

  Attributes:
    points: (H, W, 3) float32 in the world frame, metres.
    valid: (H, W) bool, where there is a point.
    camera_to_world: (4, 4) float32, OpenCV axes.
  """

  points: np.ndarray
  valid: np.ndarray
  camera_to_world: np.ndarray


@dataclasses.dataclass(frozen=True)
class Sequence:
  """Frames to predict as one stream, and what is true of them.

  A sequence has the truth that its task needs; the rest is None.

  Attributes:
    name: unique in its benchmark; `/` separates parts.
    frames: what each frame is called in messages and reports: its file.
    image_size: (H, W) of the network input, the same for all frames.
    load_image: index → (H, W, 3) uint8, the network input.
    independent: whether every frame is a stream of its own.
    load_depth: index → (H0, W0) float, the true z-depth in metres at its own
      resolution; 0 or less where nothing was measured.
    load_trajectory: → the true path, of as many frames as the sequence.
    load_points: index → the true points at the network's resolution.
  """

  name: str
  frames: tuple[str, ...]
  image_size: tuple[int, int]
  load_image: Callable[[int], np.ndarray]
  independent: bool = False
  load_depth: Callable[[int], np.ndarray] | None = None
  load_trajectory: Callable[[], Trajectory] | None = None
  load_points: Callable[[int], PointView] | None = None

  def __len__(self) -> int:
    """The number of frames."""
    return len(self.frames)


class LeftOut(NamedTuple):
  """A sequence that a benchmark should have and that cannot be used.

  Attributes:
    name: the sequence.
    reason: what is missing or broken, with the file.
  """

  name: str
  reason: str
