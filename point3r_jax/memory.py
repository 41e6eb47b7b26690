"""The pointer memory: an explicit, padded pytree and its masked fusion.

Everything here is written for one sample and mapped over the batch, so that
samples never mix and, sharded over the batch, memory never crosses devices.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from point3r_jax.config import ModelConfig

# Attention kernels like token counts that are multiples of this.
BLOCK = 128


@flax.struct.dataclass
class PointerMemory:
  """What is remembered of a batch of streams. Padded rows are zeros.

  Attributes:
    position: (B, C, 3) float32, pointer positions in the global frame: that of
      the stream's first camera, OpenCV axes, the model's unit (metres where the
      scale is metric).
    feature: (B, C, D) float32, pointer features.
    updated: (B, C) int32, the frame at which a pointer was last written.
    count: (B,) int32, valid pointers; they are a prefix.
    overflow: (B,) int32, pointers since reset that found no free row and were
      merged into their nearest instead.
    pose_slots: (B, S, 2D) float32, the pose memory.
    image_position: (B, N, 3) float32, the previous frame's patch positions.
    frame: (B,) int32, frames seen since reset.
  """

  position: jax.Array
  feature: jax.Array
  updated: jax.Array
  count: jax.Array
  overflow: jax.Array
  pose_slots: jax.Array
  image_position: jax.Array
  frame: jax.Array

  @property
  def capacity(self) -> int:
    """C, the pointers there is room for."""
    return self.position.shape[1]


def round_capacity(pointers: int) -> int:
  """Returns the smallest capacity that kernels like and that holds them."""
  return -(-pointers // BLOCK) * BLOCK


def default_capacity(config: ModelConfig, image_size: tuple[int, int]) -> int:
  """Room for four frames' worth of pointers: what indoor scenes settle at."""
  height, width = config.grid(image_size)
  return round_capacity(4 * height * width)


def next_capacity(capacity: int, tokens: int) -> int:
  """Returns room for an eighth more, or for a frame's tokens if more."""
  return round_capacity(capacity + max(capacity // 8, tokens))


def init_memory(
  config: ModelConfig,
  batch_size: int,
  image_size: tuple[int, int],
  capacity: int | None = None,
) -> PointerMemory:
  """Returns an empty memory.

  Args:
    config: the model's sizes.
    batch_size: B, independent streams.
    image_size: (H, W) of the frames to come, multiples of the patch size. They
      all have it; of what a memory is given only the number of tokens is
      checked, so (W, H) would pass.
    capacity: C, at least the tokens of a frame; default: four frames' tokens.

  Raises:
    ValueError: if the image size or the capacity does not suit.
  """
  height, width = config.grid(image_size)
  tokens = height * width
  if capacity is None:
    capacity = default_capacity(config, image_size)
  if capacity < tokens:
    raise ValueError(
      f"capacity {capacity} cannot hold the {tokens} pointers of one frame of "
      f"{image_size[0]}x{image_size[1]}; ask for at least {tokens}"
    )
  width = config.decoder_width

  def zeros(*shape, dtype=jnp.float32):
    return jnp.zeros((batch_size, *shape), dtype)

  return PointerMemory(
    position=zeros(capacity, 3),
    feature=zeros(capacity, width),
    updated=zeros(capacity, dtype=jnp.int32),
    count=zeros(dtype=jnp.int32),
    overflow=zeros(dtype=jnp.int32),
    pose_slots=zeros(config.pose_slots, 2 * width),
    image_position=zeros(tokens, 3),
    frame=zeros(dtype=jnp.int32),
  )


def check_mask(
  name: str, mask: np.ndarray | jax.Array, shape: tuple[int, ...]
) -> None:
  """Raises ValueError unless a mask is of this shape, and bool."""
  if (tuple(mask.shape), mask.dtype) != (tuple(shape), bool):
    raise ValueError(
      f"{name} must be {tuple(shape)} bool, got {tuple(mask.shape)} "
      f"{mask.dtype}"
    )


def reset(
  memory: PointerMemory, mask: jax.Array | None = None
) -> PointerMemory:
  """Empties the memory of some samples; their next frame is a first frame.

  Args:
    memory: of B samples.
    mask: (B,) bool, which to empty; None: all.

  Raises:
    ValueError: if the mask is not of that shape and type.
  """
  if mask is None:
    return jax.tree.map(jnp.zeros_like, memory)
  mask = jnp.asarray(mask)
  check_mask("the mask", mask, memory.count.shape)

  def clear(x):
    return jnp.where(mask.reshape(-1, *[1] * (x.ndim - 1)), 0, x)

  return jax.tree.map(clear, memory)


def grow(memory: PointerMemory, capacity: int) -> PointerMemory:
  """Returns the same memory with room for more pointers; nothing is lost."""
  extra = capacity - memory.capacity
  if extra < 0:
    raise ValueError(
      f"cannot shrink a memory of capacity {memory.capacity} to {capacity}"
    )

  def pad(x):
    return jnp.pad(x, ((0, 0), (0, extra)) + ((0, 0),) * (x.ndim - 2))

  return memory.replace(
    position=pad(memory.position),
    feature=pad(memory.feature),
    updated=pad(memory.updated),
  )


def _distances(new: jax.Array, old: jax.Array, count: jax.Array) -> jax.Array:
  """Returns (N, C) distances; infinite to rows that hold no pointer."""
  # Differences, not the expanded square: no cancellation, and ties stay ties.
  square = jnp.sum((new[:, None] - old[None]) ** 2, axis=-1)
  return jnp.where(jnp.arange(old.shape[0]) < count, jnp.sqrt(square), jnp.inf)


def _threshold(
  new: jax.Array, old: jax.Array, count: jax.Array, divisor: float
) -> jax.Array:
  """Returns the distance from which a pointer is new: extent / divisor."""
  valid = (jnp.arange(old.shape[0]) < count)[:, None]
  high = jnp.where(valid, old, -jnp.inf).max(0)
  low = jnp.where(valid, old, jnp.inf).min(0)
  extent = jnp.maximum(high, new.max(0)) - jnp.minimum(low, new.min(0))
  return jnp.linalg.norm(extent / divisor)


def _fuse_sample(
  memory: PointerMemory,
  position: jax.Array,
  feature: jax.Array,
  divisor: float,
  fusion: bool,
) -> PointerMemory:
  """Fuses N new pointers into one sample's memory (no batch axis)."""
  count, capacity = memory.count, memory.position.shape[0]
  distance = jax.lax.stop_gradient(_distances(position, memory.position, count))
  nearest = jnp.argmin(distance, axis=1)
  if fusion:
    threshold = _threshold(position, memory.position, count, divisor)
    append = distance.min(axis=1) >= threshold
  else:
    append = jnp.ones(position.shape[0], bool)

  # Appended pointers take the next rows in order; without a free row they merge
  # into their nearest like the others. So every new pointer has one target row,
  # and a target row becomes the mean of the new pointers that chose it.
  row = count + jnp.cumsum(append) - 1
  target = jnp.where(append & (row < capacity), row, nearest)
  hits = jnp.zeros(capacity, jnp.float32).at[target].add(1.0)

  def replace(old, new):
    total = jnp.zeros_like(old).at[target].add(new)
    # In place: of the old ones, nothing but the rows of targets is touched.
    return old.at[target].set(total[target] / hits[target, None])

  appended = jnp.sum(append)
  fits = jnp.minimum(appended, capacity - count)
  return memory.replace(
    position=replace(memory.position, position),
    feature=replace(memory.feature, feature),
    updated=memory.updated.at[target].set(memory.frame),
    count=(count + fits).astype(jnp.int32),
    overflow=(memory.overflow + appended - fits).astype(jnp.int32),
  )


def fuse(
  memory: PointerMemory,
  position: jax.Array,
  feature: jax.Array,
  *,
  divisor: float = 20.0,
  fusion: bool = True,
) -> PointerMemory:
  """Adds a frame's pointers (paper, section 3.4: memory fusion).

  With P pointers in memory, the threshold is the length of the extent of all
  P+N positions, divided by `divisor`. A new pointer whose nearest old one is at
  least that far is appended; otherwise it is assigned to it (the lowest index
  among equals). An old pointer that was assigned to becomes the mean of the
  assigned new ones, in position and feature; its old value does not count.

  A pointer to append that finds no free row is merged into its nearest instead,
  and `overflow` counts it.

  Args:
    memory: of B samples.
    position: (B, N, 3) float32, N ≤ C.
    feature: (B, N, D) float32.
    divisor: larger keeps more pointers.
    fusion: False appends every pointer (the paper's first training stage).

  Returns:
    The memory with new pointers, counts, overflow and `updated`; what it says
    of frames and poses is left to the caller.
  """
  return jax.vmap(lambda m, p, f: _fuse_sample(m, p, f, divisor, fusion))(
    memory, position, feature
  )
