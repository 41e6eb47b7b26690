"""A live stream on the host: holds the memory, makes room ahead of need."""

from __future__ import annotations

import collections
import concurrent.futures
import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from point3r_jax.config import ModelConfig
from point3r_jax.memory import (
  PointerMemory,
  grow,
  init_memory,
  round_capacity,
)
from point3r_jax.params import cast_params
from point3r_jax.streaming import (
  Prediction,
  StepOptions,
  check_image_type,
  step_fn,
)

# How full the memory is when the next capacity is compiled in the background.
_COMPILE_AHEAD = 0.5


class _Program(NamedTuple):
  """What is compiled for one capacity.

  Attributes:
    step: (params, memory, image) → (memory, prediction).
    enlarge: memory of the capacity before → memory of this one; None for the
      capacity that the stream has already.
  """

  step: Callable[..., tuple[PointerMemory, Prediction]]
  enlarge: Callable[[PointerMemory], PointerMemory] | None


class _Counts:
  """Pointer counts as the host knows them: some frames behind the device."""

  def __init__(self, tokens: int):
    self.known = 0  # Pointers after the last finished frame that was read.
    self.overflow = 0
    self._tokens = tokens
    self._pending = collections.deque()

  @property
  def bound(self) -> int:
    """The most pointers that the next frame can lead to."""
    return self.known + self._tokens * (len(self._pending) + 1)

  def add(self, prediction: Prediction) -> None:
    """Takes note of a frame under way."""
    counts = (prediction.pointer_count, prediction.overflow)
    for count in counts:
      count.copy_to_host_async()
    self._pending.append(counts)

  def read(self, limit: int | None) -> None:
    """Reads what is finished; waits until `bound` is within the limit.

    It waits for as few frames as it must, oldest first; without a limit for
    none.
    """
    while self._pending and (
      self._pending[0][0].is_ready()
      or (limit is not None and self.bound > limit)
    ):
      # Not count[0]: on the device that would queue behind later frames.
      count, overflow = (np.asarray(x) for x in self._pending.popleft())
      self.known, self.overflow = int(count[0]), int(overflow[0])


class Stream:
  """Feeds one image after the other to a model; batch 1.

  The step is compiled once per capacity. Before a frame could overflow the
  memory it grows by half, without losing a pointer; the larger step has by then
  been compiled in the background. Calls return as soon as the device has the
  work: reading a prediction waits for it. Only where a frame under way might
  fill the memory does a call wait, for that frame's count.

    stream = Stream(config, params, image_size=(384, 512))
    for image in images:
      prediction = stream(image)

  Attributes:
    config: the model's sizes.
    options: the step's options.
    image_size: (H, W) of the images.
    memory: the `PointerMemory` after the last frame. The next frame takes over
      its buffers: copy what you want to keep.
    frames: images seen since the last reset.
    compile_seconds: seconds that each capacity's step took to compile.
  """

  config: ModelConfig
  options: StepOptions
  image_size: tuple[int, int]
  memory: PointerMemory
  frames: int
  compile_seconds: dict[int, float]

  def __init__(
    self,
    config: ModelConfig,
    params: dict,
    image_size: tuple[int, int],
    *,
    capacity: int | None = None,
    max_capacity: int | None = None,
    **options,
  ):
    """Prepares a stream; compiles at the first image.

    Args:
      config: the model's sizes.
      params: nested dictionary, see `load_checkpoint`.
      image_size: (H, W), multiples of the patch size.
      capacity: pointers to start with room for; default: four frames' tokens.
      max_capacity: where growth stops; pointers beyond are merged into their
        nearest, counted in `overflow` and warned about. None: no limit.
      **options: fields of `StepOptions`.

    Raises:
      ValueError: for sizes that do not suit or unknown options.
    """
    self.config = config
    self.options = StepOptions(**options)
    self.image_size = tuple(image_size)
    self.memory = init_memory(config, 1, self.image_size, capacity)
    if max_capacity is not None and max_capacity < self.memory.capacity:
      raise ValueError(
        f"max_capacity {max_capacity} is below the first capacity "
        f"{self.memory.capacity}"
      )
    self.frames = 0
    self.compile_seconds = {}
    self._max_capacity = max_capacity
    self._params = jax.device_put(cast_params(params, self.options.precision))
    self._tokens = self.memory.image_position.shape[1]
    self._step = jax.jit(step_fn, static_argnums=(0, 1), donate_argnums=3)
    self._grow = jax.jit(grow, static_argnums=1)
    self._programs = {}
    self._compiler = concurrent.futures.ThreadPoolExecutor(1, "compile-ahead")
    self._counts = _Counts(self._tokens)
    self._warned = False

  @property
  def capacity(self) -> int:
    """Pointers there is room for now."""
    return self.memory.capacity

  @property
  def pointer_count(self) -> int:
    """Pointers in memory; waits for the last frame."""
    return int(np.asarray(self.memory.count)[0])

  @property
  def overflow(self) -> int:
    """Pointers merged for lack of room since reset; waits for the frame."""
    return int(np.asarray(self.memory.overflow)[0])

  def reset(self) -> None:
    """Forgets everything: the next image is a first frame again."""
    self.memory = init_memory(self.config, 1, self.image_size, self.capacity)
    self.frames = 0
    self._counts = _Counts(self._tokens)
    self._warned = False

  def wait_for_compiles(self) -> None:
    """Returns once no step is being compiled in the background."""
    concurrent.futures.wait(self._programs.values())

  def __call__(self, image: np.ndarray | jax.Array) -> Prediction:
    """Takes the next image.

    Args:
      image: (H, W, 3) or (1, H, W, 3), uint8, or float32 in [-1, 1]; RGB.

    Returns:
      The prediction, with a leading axis of 1.

    Raises:
      ValueError: if the image does not have the stream's size or a known type.
    """
    image = image[None] if image.ndim == 3 else image
    if image.shape != (1, *self.image_size, 3):
      raise ValueError(
        f"this stream takes images of shape {(*self.image_size, 3)}, got "
        f"{tuple(image.shape)}"
      )
    check_image_type(image.dtype)
    self._make_room(image.dtype)
    program = self._program(self.capacity, image.dtype).result()
    self.memory, prediction = program.step(self._params, self.memory, image)
    self._counts.add(prediction)
    self.frames += 1
    return prediction

  def _program(self, capacity: int, dtype) -> concurrent.futures.Future:
    """Returns the programs for a capacity, compiled or being compiled."""
    key = (capacity, np.dtype(dtype))
    future = self._programs.get(key)
    failed = future and future.done() and future.exception()
    if future is None or failed:  # What failed may have been out of memory.
      future = self._compiler.submit(self._compile, *key, self.capacity)
      self._programs[key] = future
    return future

  def _compile(self, capacity: int, dtype: np.dtype, before: int) -> _Program:
    start = time.perf_counter()

    def memory(capacity):
      return jax.eval_shape(
        lambda: init_memory(self.config, 1, self.image_size, capacity)
      )

    image = jax.ShapeDtypeStruct((1, *self.image_size, 3), dtype)
    step = self._step.lower(
      self.config, self.options, self._params, memory(capacity), image
    ).compile()
    enlarge = None
    if capacity != before:
      enlarge = self._grow.lower(memory(before), capacity).compile()
    self.compile_seconds[capacity] = time.perf_counter() - start
    return _Program(step, enlarge)

  def _next_capacity(self) -> int:
    """Returns half as much room again, at least a frame's, within limits."""
    larger = max(self.capacity * 3 // 2, self.capacity + self._tokens)
    if self._max_capacity is not None:
      return min(round_capacity(larger), self._max_capacity)
    return round_capacity(larger)

  def _make_room(self, dtype) -> None:
    """Grows the memory if the next frame might not fit."""
    larger = self._next_capacity()
    if larger == self.capacity:
      self._counts.read(limit=None)
      self._warn_once()
      return
    self._counts.read(limit=self.capacity)
    if self._counts.bound > self.capacity:
      program = self._program(larger, dtype).result()
      self.memory = program.enlarge(self.memory)
    elif self._counts.known > _COMPILE_AHEAD * self.capacity:
      self._program(larger, dtype)

  def _warn_once(self) -> None:
    """Says that pointers find no room, as soon as the host knows."""
    if self._counts.overflow and not self._warned:
      self._warned = True
      logging.getLogger(__name__).warning(
        "the pointer memory is full at its maximal capacity of %d: new "
        "pointers are merged into their nearest (%d so far)",
        self.capacity,
        self._counts.overflow,
      )
