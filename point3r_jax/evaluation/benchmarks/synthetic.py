"""Synthetic scenes that no training has seen; needs no data on disk.

Scenes are those of `data.synthetic`, split "test", rendered when they are first
asked for: a sequence of 24 views at 128×96 takes less than a second and 3 MB.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from pathlib import Path

import numpy as np

from point3r_jax.data.record import Record
from point3r_jax.data.synthetic.cameras import PATHS
from point3r_jax.data.synthetic.source import SyntheticSource
from point3r_jax.errors import InputError
from point3r_jax.evaluation.benchmarks.base import Layout
from point3r_jax.evaluation.clouds import transform
from point3r_jax.evaluation.sequences import PointView, Sequence, Trajectory


@dataclasses.dataclass(frozen=True)
class SyntheticOptions:
  """Which scenes are made up.

  Attributes:
    sequences: how many.
    frames: views of each.
    height: of images in pixels, a multiple of 16.
    width: likewise.
    seed: other seeds, other scenes.
    indoor: share of rooms and courtyards.
    moving: share of scenes in which objects move.
    paths: kinds of camera paths, equally often.
  """

  sequences: int = 64
  frames: int = 24
  height: int = 96
  width: int = 128
  seed: int = 0
  indoor: float = 0.7
  moving: float = 0.2
  paths: tuple[str, ...] = PATHS

  def __post_init__(self):
    """Checks the sizes; the source checks the rest."""
    if self.sequences < 1 or self.frames < 3:
      raise InputError("at least 1 sequence of 3 frames is needed")
    if min(self.height, self.width) < 16 or (self.height | self.width) % 16:
      raise InputError(
        f"{self.width}x{self.height} pixels are not multiples of 16"
      )


class Scene:
  """A sequence that is rendered when it is first needed."""

  def __init__(self, source: SyntheticSource, index: int, options):
    """Notes down what to render."""
    self._source = source
    self._index = index
    self._options = options
    self._lock = threading.Lock()
    self._record = None

  @property
  def record(self) -> Record:
    """What `data.record` describes, with exact depth and cameras."""
    with self._lock:
      if self._record is None:
        options = self._options
        self._record = self._source.sequence(
          self._index,
          options.frames,
          (options.height, options.width),
          np.random.default_rng([options.seed, self._index]),
        )
      return self._record

  def image(self, index: int) -> np.ndarray:
    """Returns an image (H, W, 3) uint8."""
    return self.record["image"][index]

  def depth(self, index: int) -> np.ndarray:
    """Returns the depth (H, W) float32, metres; negative for sky."""
    return self.record["depth"][index]

  def trajectory(self) -> Trajectory:
    """Returns the camera's path."""
    poses = self.record["camera_to_world"].astype(np.float64)
    return Trajectory(np.arange(len(poses), dtype=np.float64), poses)

  def points(self, index: int) -> PointView:
    """Returns the points of a view, sky left out."""
    record = self.record
    depth, pose = record["depth"][index], record["camera_to_world"][index]
    rays = viewing_rays(record["intrinsics"][index], depth.shape)
    points = transform(pose, depth[..., None] * rays)
    return PointView(points.astype(np.float32), depth > 0, pose)


def viewing_rays(
  intrinsics: np.ndarray, image_size: tuple[int, int]
) -> np.ndarray:
  """Returns (H, W, 3) points at depth 1 in the camera's frame."""
  v, u = np.mgrid[: image_size[0], : image_size[1]]
  pixels = np.stack([u, v, np.ones_like(u)], axis=-1)
  return (pixels @ np.linalg.inv(intrinsics).T).astype(np.float32)


def layout(root: Path | None, options: SyntheticOptions) -> Layout:
  """Lists the scenes; a root is not needed."""
  source = SyntheticSource(
    scenes=options.sequences,
    seed=options.seed,
    split="test",
    indoor=options.indoor,
    moving=options.moving,
    paths=options.paths,
  )
  builders = {
    f"scene_{index:03d}": functools.partial(_sequence, source, index, options)
    for index in range(options.sequences)
  }
  return Layout(builders)


def _sequence(
  source: SyntheticSource, index: int, options: SyntheticOptions
) -> Sequence:
  scene = Scene(source, index, options)
  return Sequence(
    name=f"scene_{index:03d}",
    frames=tuple(f"view {frame}" for frame in range(options.frames)),
    image_size=(options.height, options.width),
    load_image=scene.image,
    load_depth=scene.depth,
    load_trajectory=scene.trajectory,
    load_points=scene.points,
  )
