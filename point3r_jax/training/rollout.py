"""The recurrent model over whole sequences, as training runs it.

Frames do not depend on each other in the encoder, so all of them are encoded at
once; then `lax.scan` carries the pointer memory through them; then all of them
are given to the camera head, which the memory does not depend on.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from typing import Any

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
    remat_frames: keep the memory and what the camera head reads between frames
      only, and run each frame again in the backward pass: memory that hardly
      grows with T.
    truncate: stop gradients between chunks of this many frames; 0: never.
    sizes: in how many sizes, at most, the valid part of the memory is compiled.
      A frame cannot see more pointers than the frames before it left, so early
      frames need not compute on the whole capacity.
    unroll: frames in a row that see the same size are a loop if they are more
      than this; so many are written out, and what the backward pass needs of
      them is not copied into stacks.
  """

  step: StepOptions
  capacity: int | None = None
  remat_frames: bool = False
  truncate: int = 0
  sizes: int = 8
  unroll: int = 1

  def __post_init__(self):
    """Refuses numbers without meaning."""
    if self.truncate < 0 or self.sizes < 1 or self.unroll < 1:
      raise ValueError(
        f"truncate must be at least 0, sizes and unroll at least 1, got "
        f"{self.truncate}, {self.sizes} and {self.unroll}"
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


def _write_out(
  body: Callable[[dict, Any, Any], tuple[Any, Any]],
  params: Iterable[dict],
  carry: Any,
  inputs: Any,
) -> tuple[Any, Any]:
  """Does what `jax.lax.scan` does, one turn after the other.

  Each of them has its own parameters.

  With `unroll`, too, a scan gives its last carry a gradient, zeros if nothing
  reads it. So the last frame would be made pointers of, and backward as well.
  """
  results = []
  for turn, own in enumerate(params):
    carry, result = body(own, carry, jax.tree.map(itemgetter(turn), inputs))
    results.append(result)
  return carry, jax.tree.map(lambda *x: jnp.stack(x), *results)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _copies(x: jax.Array, number: int) -> tuple[jax.Array, ...]:
  """Returns an array several times, whose gradients are added up in one order.

  From the last one's on, each to the left of the sum so far: then XLA has the
  product that makes it add the sum.
  """
  return (x,) * number


def _copies_forward(x, number):
  return _copies(x, number), None


def _copies_backward(number, _, gradients):
  del number
  *others, total = gradients
  for gradient in reversed(others):
    total = gradient + total
  return (total,)


_copies.defvjp(_copies_forward, _copies_backward)


def _hand_out(params: dict, turns: int) -> Iterator[dict]:
  """Yields the same parameters for each of some turns, see `_copies`."""
  # Leaf by leaf, so that those without a gradient, frozen ones, stay so.
  leaves, tree = jax.tree.flatten(params)
  for own in zip(*(_copies(x, turns) for x in leaves), strict=True):
    yield tree.unflatten(own)


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
  recurrent = build_model(
    config, dataclasses.replace(options.step, heads="world")
  )
  if memory is None:
    capacity = options.capacity or frames * num_tokens
    memory = init_memory(config, batch, image_size, capacity)
    parts = list(segments(frames, num_tokens, capacity, options.sizes))
  else:
    parts = [(0, frames, memory.capacity)]

  index = jnp.arange(frames)

  def is_looped(start: int, stop: int) -> bool:
    return stop - start > options.unroll

  turns = sum(
    1 if is_looped(*part[:2]) else part[1] - part[0] for part in parts
  )
  handed_out = _hand_out(params, turns)

  def run(visible: int, looped: bool):
    def frame(params, memory, inputs):
      tokens, index = inputs
      if options.truncate:
        cut = index % options.truncate == 0
        memory = jax.tree.map(
          lambda x: jnp.where(cut, jax.lax.stop_gradient(x), x), memory
        )
      unread = memory.capacity - visible
      context = read_memory(memory, unread, model.compute.token_block)
      output = recurrent.apply({"params": params}, tokens, context, grid)
      memory, prediction = advance(memory, output, options.step)
      return memory, (prediction, output.maps[1:])

    if options.remat_frames:
      # Only outside of loops could the compiler merge what is run again with
      # its first run.
      return jax.checkpoint(frame, prevent_cse=not looped)
    return frame

  def camera_points(maps):
    return model.apply({"params": params}, maps, grid, method="camera_points")

  results = []
  with jax.default_matmul_precision(options.step.precision.matmul):
    tokens = model.apply(
      {"params": params},
      images.reshape(batch * frames, *image_size, 3),
      method="encode",
    )
    tokens = tokens.reshape(batch, frames, *tokens.shape[1:]).swapaxes(0, 1)
    for start, stop, visible in parts:
      inputs = tokens[start:stop], index[start:stop]
      if is_looped(start, stop):
        body = functools.partial(run(visible, looped=True), next(handed_out))
        memory, result = jax.lax.scan(body, memory, inputs)
      else:
        own = itertools.islice(handed_out, stop - start)
        body = run(visible, looped=False)
        memory, result = _write_out(body, own, memory, inputs)
      results.append(result)
    predictions, maps = jax.tree.map(lambda *x: jnp.concatenate(x), *results)
    if options.step.heads == "world":
      return memory, predictions
    maps = (tokens, *maps)
    if options.remat_frames:
      remat = jax.checkpoint(camera_points, prevent_cse=False)
      points, confidence = jax.lax.map(remat, maps)
    else:
      maps = (x.reshape(-1, *x.shape[2:]) for x in maps)
      points, confidence = (
        x.reshape(frames, batch, *x.shape[1:])
        for x in camera_points(tuple(maps))
      )
  return memory, predictions.replace(
    points_camera=points, confidence_camera=confidence
  )
