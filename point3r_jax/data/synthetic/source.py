"""Made-up sequences as a dataset.

A sequence is a function of a few numbers, its recipe: rendered on the CPU for
the loader's records, or on the devices that train (see `training.feed`).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.struct
import jax
import numpy as np

from point3r_jax.data.record import Record
from point3r_jax.data.synthetic.cameras import PATHS
from point3r_jax.data.synthetic.render import Options, render_sequence
from point3r_jax.errors import InputError

SPLITS = ("train", "test")


@flax.struct.dataclass
class Recipe:
  """What fixes a sequence, beside its size and the source's `Options`.

  Attributes:
    numbers: (3,) uint32: the source's seed, the scene and the path's draw.
    is_metric: () bool, whether its lengths are to be learnt as metres.
  """

  numbers: np.ndarray | jax.Array
  is_metric: np.ndarray | jax.Array


def sequence_keys(numbers: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the keys of a scene and of a path through it.

  Args:
    numbers: (3,) uint32, see `Recipe`.
  """
  seed, number, draw = numbers
  # The kind is named: scenes must not depend on JAX's settings.
  key = jax.random.key(seed, impl="threefry2x32")
  scene_key, camera_key = jax.random.split(jax.random.fold_in(key, number))
  return scene_key, jax.random.fold_in(camera_key, draw)


def render(
  recipe: Recipe, *, views: int, image_size: tuple[int, int], options: Options
) -> dict[str, jax.Array]:
  """Renders a sequence; pure, see `render_sequence`.

  Args:
    recipe: which sequence.
    views: T.
    image_size: (H, W).
    options: what is made up.

  Returns:
    image, depth, intrinsics, camera_to_world and is_metric; see `data.record`.
  """
  keys = sequence_keys(recipe.numbers)
  sequence = render_sequence(
    *keys, views=views, image_size=image_size, options=options
  )
  return sequence | {"is_metric": recipe.is_metric}


_render = jax.jit(render, static_argnames=("views", "image_size", "options"))


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
  """Sequences of synthetic scenes; a `SequenceSource`.

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
    metric: the share of sequences whose lengths are to be learnt as metres; of
      the others the shape alone counts.
  """

  name: ClassVar[str] = "synthetic"

  scenes: int = 10_000
  seed: int = 0
  split: str = "train"
  indoor: float = 0.7
  moving: float = 0.2
  paths: tuple[str, ...] = PATHS
  metric: float = 1.0

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
    if not 0 <= self.metric <= 1:
      raise InputError(f"metric is {self.metric}, but a share is from 0 to 1")
    _ = self.options  # It checks the rest.

  @property
  def options(self) -> Options:
    """What is made up; raises an `InputError` for what cannot be."""
    return Options(
      indoor=self.indoor, moving=self.moving, paths=tuple(self.paths)
    )

  def __len__(self) -> int:
    """Returns the number of scenes."""
    return self.scenes

  def recipe(self, index: int, rng: np.random.Generator) -> Recipe:
    """Draws a path through a scene.

    Args:
      index: of the scene.
      rng: draws the path, and whether the sequence is metric.

    Raises:
      InputError: if there is no such scene.
    """
    if not 0 <= index < self.scenes:
      raise InputError(f"there is no scene {index} among {self.scenes}")
    # Scenes of splits alternate, so that each has its own for any `scenes`.
    number = len(SPLITS) * index + SPLITS.index(self.split)
    draw = rng.integers(2**32)
    return Recipe(
      numbers=np.array([self.seed, number, draw], np.uint32),
      is_metric=np.array(rng.random() < self.metric),
    )

  def sequence(
    self,
    index: int,
    views: int,
    image_size: tuple[int, int],
    rng: np.random.Generator,
  ) -> Record:
    """Renders a path through a scene, on the CPU.

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
    recipe = self.recipe(index, rng)
    if views < 1 or min(image_size) < 1:
      raise InputError(f"cannot render {views} views of size {image_size}")
    cpu = _cpu()
    # A mesh of its own: the caller may have set one of other devices.
    with jax.set_mesh(jax.sharding.Mesh([cpu], "cpu")):
      record = _render(
        jax.device_put(recipe, cpu),
        views=views,
        image_size=tuple(image_size),
        options=self.options,
      )
      # Copied, for what JAX hands out cannot be written to.
      return jax.tree.map(np.array, jax.device_get(record))
