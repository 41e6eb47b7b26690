"""Made-up sequences as a dataset, rendered on the CPU."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax
import numpy as np

from point3r_jax.data.errors import InputError
from point3r_jax.data.record import Record
from point3r_jax.data.synthetic.cameras import PATHS
from point3r_jax.data.synthetic.render import Options, render_sequence

SPLITS = ("train", "test")


def sequence_keys(
  seed: jax.Array, number: jax.Array, draw: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the keys of a scene and of a path through it; all are uint32."""
  # The kind is named: scenes must not depend on JAX's settings.
  key = jax.random.key(seed, impl="threefry2x32")
  scene_key, camera_key = jax.random.split(jax.random.fold_in(key, number))
  return scene_key, jax.random.fold_in(camera_key, draw)


@functools.partial(jax.jit, static_argnames=("views", "image_size", "options"))
def _render(seed, number, draw, **how):
  return render_sequence(*sequence_keys(seed, number, draw), **how)


def _cpu() -> jax.Device:
  """Returns the device to render on, whatever else there is."""
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError as error:
    raise InputError(
      "the synthetic dataset renders on the CPU, but JAX was told not to use "
      "it: add it to JAX_PLATFORMS, as in JAX_PLATFORMS=cuda,cpu"
    ) from error


@dataclasses.dataclass(frozen=True)
class SyntheticSource:
  """Sequences of made-up scenes; a `SequenceSource`.

  A scene is a function of (seed, split, index), the camera and its path of that
  and one draw of the generator. The first sequence of an image size and number
  of views takes seconds, for compilation.

  Attributes:
    scenes: how many there are.
    seed: other seeds, other scenes; in [0, 2³²).
    split: "train" or "test", which have no scene in common.
    indoor: the share of rooms and courtyards; the rest is open ground.
    moving: the share of scenes in which objects move.
    paths: the kinds of camera paths, of `cameras.PATHS`, equally often.
  """

  name: ClassVar[str] = "synthetic"

  scenes: int = 10_000
  seed: int = 0
  split: str = "train"
  indoor: float = 0.7
  moving: float = 0.2
  paths: tuple[str, ...] = PATHS

  def __post_init__(self):
    """Checks the values.

    Raises:
      InputError: if one does not suit.
    """
    if not 1 <= self.scenes < 2**31:
      raise InputError(f"scenes is {self.scenes}, but must be 1 to 2^31 - 1")
    if not 0 <= self.seed < 2**32:
      raise InputError(f"seed is {self.seed}, but must be 0 to 2^32 - 1")
    if self.split not in SPLITS:
      raise InputError(f"split is {self.split!r}, but must be one of {SPLITS}")
    self._options()

  def _options(self) -> Options:
    """Returns what is made up; raises an `InputError` for what cannot be."""
    return Options(
      indoor=self.indoor, moving=self.moving, paths=tuple(self.paths)
    )

  def __len__(self) -> int:
    """Returns the number of scenes."""
    return self.scenes

  def sequence(
    self,
    index: int,
    views: int,
    image_size: tuple[int, int],
    rng: np.random.Generator,
  ) -> Record:
    """Renders a path through a scene.

    Args:
      index: of the scene.
      views: T.
      image_size: (H, W).
      rng: draws the path.

    Returns:
      image, depth, intrinsics, camera_to_world and is_metric; see `record`.

    Raises:
      InputError: if there is no such scene, view or image.
    """
    if not 0 <= index < self.scenes:
      raise InputError(f"there is no scene {index} among {self.scenes}")
    if views < 1 or min(image_size) < 1:
      raise InputError(f"cannot render {views} views of size {image_size}")
    numbers = (
      self.seed,
      # Scenes of splits alternate, so that each has its own for any `scenes`.
      len(SPLITS) * index + SPLITS.index(self.split),
      rng.integers(2**32),
    )
    cpu = _cpu()
    # A mesh of its own: the caller may have set one of other devices.
    with jax.set_mesh(jax.sharding.Mesh([cpu], "cpu")):
      arguments = jax.device_put([np.uint32(n) for n in numbers], cpu)
      record = _render(
        *arguments,
        views=views,
        image_size=tuple(image_size),
        options=self._options(),
      )
      # Copied, for what JAX hands out cannot be written to.
      return jax.tree.map(np.array, jax.device_get(record))
