"""What streams are timed with: images, and a memory whose count stays."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from point3r_jax.config import ModelConfig
from point3r_jax.data.synthetic.source import SyntheticSource
from point3r_jax.errors import InputError
from point3r_jax.memory import (
  PointerMemory,
  default_capacity,
  init_memory,
  next_capacity,
)

# Pointers that hold the count lie within this, in the model's unit.
REACH = 1000.0


def live_capacity(
  config: ModelConfig,
  image_size: tuple[int, int],
  pointers: int,
  under_way: int,
) -> int:
  """Returns room that a stream that grew to so many pointers has.

  That is for those of the next frame and of so many frames under way.
  """
  height, width = config.grid(image_size)
  capacity = default_capacity(config, image_size)
  while capacity < pointers + (under_way + 1) * height * width:
    capacity = next_capacity(capacity, height * width)
  return capacity


def fill_memory(
  config: ModelConfig,
  streams: int,
  image_size: tuple[int, int],
  capacity: int,
  pointers: int,
) -> PointerMemory:
  """Returns a memory in the middle of a stream whose pointers stay so many.

  The first pointer is at the origin, the second and third at opposite corners
  of a cube, the others anywhere in it. New pointers within a tenth of `REACH`
  are nearer to the first than fusion's distance, and it to them ever after.

  Args:
    config: the model's sizes.
    streams: B.
    image_size: (H, W).
    capacity: C.
    pointers: valid ones of each stream, from 3 to C.

  Raises:
    InputError: if there is no room for them, or too few to hold the count.
  """
  if not 3 <= pointers <= capacity:
    raise InputError(
      f"there are {pointers} pointers to be, but must be from 3 to the "
      f"capacity, {capacity}"
    )
  memory = init_memory(config, streams, image_size, capacity)
  rng = np.random.default_rng(0)
  position = np.zeros(memory.position.shape, np.float32)
  position[:, 1] = -REACH
  position[:, 2] = REACH
  position[:, 3:pointers] = rng.uniform(
    -REACH, REACH, (streams, pointers - 3, 3)
  )
  feature = np.zeros(memory.feature.shape, np.float32)
  feature[:, :pointers] = rng.normal(size=feature[:, :pointers].shape)

  def normal(like, scale):
    return jnp.asarray(scale * rng.normal(size=like.shape), like.dtype)

  return memory.replace(
    position=jnp.asarray(position),
    feature=jnp.asarray(feature),
    count=jnp.full_like(memory.count, pointers),
    pose_slots=normal(memory.pose_slots, 0.2),
    image_position=normal(memory.image_position, 1.0),
    frame=jnp.full_like(memory.frame, 100),
  )


def noise(count: int, *shape: int) -> np.ndarray:
  """Draws uint8 images (count, *shape, 3)."""
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (count, *shape, 3), dtype=np.uint8)


def scene(image_size: tuple[int, int], views: int) -> np.ndarray:
  """Renders a path through a synthetic room, as uint8 images (T, H, W, 3)."""
  source = SyntheticSource(split="test", indoor=1.0, moving=0.0)
  return source.sequence(0, views, image_size, np.random.default_rng(0))[
    "image"
  ]


def to_and_fro(length: int, frame: int) -> int:
  """Returns which of a path's images a frame is, walked up and down."""
  turn = max(2 * (length - 1), 1)
  return length - 1 - abs(length - 1 - frame % turn)
