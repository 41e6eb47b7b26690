"""The recurrent model over whole sequences, as training runs it.

Frames do not depend on each other in the encoder, so all of them are encoded at
once; then `lax.scan` carries the pointer memory through them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from point3r_jax.config import ModelConfig
from point3r_jax.memory import PointerMemory, init_memory
from point3r_jax.streaming import (
  Prediction,
  StepOptions,
  advance,
  build_model,
  read_memory,
)


@dataclasses.dataclass(frozen=True)
class RolloutOptions:
  """How to run a sequence.

  Attributes:
    step: options of each step.
    capacity: C, room for pointers; None: for all that T frames can leave, so
      that none is ever merged for lack of room.
    remat_frames: keep the memory between frames only, and run each frame again
      in the backward pass: memory that hardly grows with T.
    truncate: stop gradients between chunks of this many frames; 0: never.
    sizes: in how many sizes, at most, the valid part of the memory is compiled.
      A frame cannot see more pointers than the frames before it left, so early
      frames need not compute on the whole capacity.
  """

  step: StepOptions
  capacity: int | None = None
  remat_frames: bool = False
  truncate: int = 0
  sizes: int = 8

  def __post_init__(self):
    """Refuses numbers without meaning."""
    if self.truncate < 0 or self.sizes < 1:
      raise ValueError(
        f"truncate must be at least 0 and sizes at least 1, got "
        f"{self.truncate} and {self.sizes}"
      )


def segments(
  frames: int, tokens: int, capacity: int, sizes: int
) -> Iterator[tuple[int, int, int]]:
  """Yields (start, stop, visible): frames that see so many rows of the memory.

  Args:
    frames: T.
    tokens: N of a frame; a frame leaves no more pointers than that.
    capacity: C.
    sizes: how many different `visible` there may be.
  """

  def visible(frame: int) -> int:
    # A first frame sees its own tokens instead of a memory.
    return min(max(frame, 1) * tokens, capacity)

  largest = visible(frames - 1)
  distinct = -(-largest // tokens)
  step = -(-distinct // sizes) * tokens
  start = 0
  while start < frames:
    size = min(-(-visible(start) // step) * step, largest)
    stop = start + 1
    while stop < frames and visible(stop) <= size:
      stop += 1
    yield start, stop, size
    start = stop


def rollout(
  config: ModelConfig,
  options: RolloutOptions,
  params: dict,
  images: jax.Array,
  memory: PointerMemory | None = None,
) -> tuple[PointerMemory, Prediction]:
  """Takes a batch of sequences.

  The same function as `streaming.scan`; differentiable.

  Args:
    config: the model's sizes.
    options: how to run.
    params: in the config's layout.
    images: (B, T, H, W, 3) uint8, or float32 in [-1, 1]; RGB.
    memory: where the sequences go on; None: they start, with `capacity`.

  Returns:
    The memory after the last frame, and predictions with leading axes T, B.
  """
  batch, frames = images.shape[:2]
  image_size = images.shape[2:4]
  grid = config.grid(image_size)
  num_tokens = grid[0] * grid[1]
  model = build_model(config, options.step)
  if memory is None:
    capacity = options.capacity or frames * num_tokens
    memory = init_memory(config, batch, image_size, capacity)
    parts = segments(frames, num_tokens, capacity, options.sizes)
  else:
    parts = [(0, frames, memory.capacity)]

  index = jnp.arange(frames)

  def run(visible: int, scanned: bool):
    def frame(memory, inputs):
      tokens, index = inputs
      if options.truncate:
        cut = index % options.truncate == 0
        memory = jax.tree.map(
          lambda x: jnp.where(cut, jax.lax.stop_gradient(x), x), memory
        )
      context = read_memory(memory)
      context = context.replace(
        position=context.position[:, :visible],
        feature=context.feature[:, :visible],
      )
      output = model.apply({"params": params}, tokens, context, grid)
      return advance(memory, output, options.step)

    if options.remat_frames:
      # The compiler may merge what is run again with its first run only where
      # a loop of one turn becomes none.
      return jax.checkpoint(frame, prevent_cse=not scanned)
    return frame

  predictions = []
  with jax.default_matmul_precision(options.step.precision.matmul):
    tokens = model.apply(
      {"params": params},
      images.reshape(batch * frames, *image_size, 3),
      method="encode",
    )
    tokens = tokens.reshape(batch, frames, *tokens.shape[1:]).swapaxes(0, 1)
    for start, stop, visible in parts:
      memory, prediction = jax.lax.scan(
        run(visible, stop - start > 1),
        memory,
        (tokens[start:stop], index[start:stop]),
      )
      predictions.append(prediction)
  return memory, jax.tree.map(lambda *x: jnp.concatenate(x), *predictions)
