"""Live streams on the host: hold the memory, make room ahead of need."""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from point3r_jax.config import ModelConfig
from point3r_jax.memory import (
  PointerMemory,
  grow,
  init_memory,
  reset,
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
# The mesh's axis, along which streams are divided among devices.
_AXIS = "stream"


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
    # Of the fullest memory, after the last finished frame that was read.
    self.known = 0
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
      self.known, self.overflow = int(count.max()), int(overflow.sum())


class Stream:
  """Feeds one image after the other to a model, or to several side by side.

  The step is compiled once per capacity. Before a frame could overflow the
  memory it grows by half, without losing a pointer; the larger step has by then
  been compiled in the background. Calls return as soon as the device has the
  work: reading a prediction waits for it. Only where a frame under way might
  fill the memory does a call wait, for that frame's count.

    stream = Stream(config, params, image_size=(384, 512))
    for image in images:
      prediction = stream(image)

  With a `batch_size` of B it is B streams that have nothing to do with each
  other but take their frames at the same time; each may start anew at any of
  them. They share one capacity, the largest that one of them needs.

  Attributes:
    config: the model's sizes.
    options: the step's options.
    image_size: (H, W) of the images.
    batch_size: B, streams side by side.
    memory: the `PointerMemory` after the last frame. The next frame takes over
      its buffers: copy what you want to keep.
    frames: frames seen since all streams were reset.
    compile_seconds: seconds that each capacity's step took to compile.
  """

  config: ModelConfig
  options: StepOptions
  image_size: tuple[int, int]
  batch_size: int
  memory: PointerMemory
  frames: int
  compile_seconds: dict[int, float]

  def __init__(
    self,
    config: ModelConfig,
    params: dict,
    image_size: tuple[int, int],
    *,
    batch_size: int = 1,
    devices: Sequence[jax.Device] | None = None,
    capacity: int | None = None,
    max_capacity: int | None = None,
    **options,
  ):
    """Prepares a stream; compiles at the first image.

    Args:
      config: the model's sizes.
      params: nested dictionary, see `load_checkpoint`.
      image_size: (H, W), multiples of the patch size.
      batch_size: B, streams side by side.
      devices: to divide the streams among, equally many each; None: the default
        device.
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
    self.batch_size = batch_size
    if batch_size < 1 or (devices and batch_size % len(devices)):
      raise ValueError(
        f"{batch_size} streams cannot be divided equally among "
        f"{len(devices or [None])} devices"
      )
    self._split = None
    if devices:
      mesh = jax.make_mesh(
        (len(devices),), (_AXIS,), (AxisType.Auto,), devices=devices
      )
      self._split = NamedSharding(mesh, PartitionSpec(_AXIS))
    self.memory = self._init_memory(capacity)
    if max_capacity is not None and max_capacity < self.memory.capacity:
      raise ValueError(
        f"max_capacity {max_capacity} is below the first capacity "
        f"{self.memory.capacity}"
      )
    self.frames = 0
    self.compile_seconds = {}
    self._max_capacity = max_capacity
    self._params = jax.device_put(
      cast_params(params, self.options.precision),
      self._split and NamedSharding(self._split.mesh, PartitionSpec()),
    )
    self._tokens = self.memory.image_position.shape[1]
    self._step = jax.jit(self._make_step(), donate_argnums=1)
    self._grow = jax.jit(grow, static_argnums=1, out_shardings=self._split)
    self._clear = jax.jit(reset, donate_argnums=0, out_shardings=self._split)
    self._programs = {}
    self._compiler = concurrent.futures.ThreadPoolExecutor(1, "compile-ahead")
    self._counts = _Counts(self._tokens)
    self._warned = False

  def _make_step(self) -> Callable[..., tuple[PointerMemory, Prediction]]:
    """Returns the step; every device takes its own streams through it."""
    step = functools.partial(step_fn, self.config, self.options)
    if self._split is None:
      return step
    return jax.shard_map(
      step,
      mesh=self._split.mesh,
      in_specs=(PartitionSpec(), self._split.spec, self._split.spec),
      out_specs=self._split.spec,
      check_vma=False,
    )

  def _init_memory(self, capacity: int | None) -> PointerMemory:
    memory = init_memory(
      self.config, self.batch_size, self.image_size, capacity
    )
    return jax.device_put(memory, self._split) if self._split else memory

  @property
  def capacity(self) -> int:
    """Pointers there is room for now."""
    return self.memory.capacity

  @property
  def pointer_count(self) -> int:
    """Pointers in memory, the fullest one's; waits for the last frame."""
    return int(np.asarray(self.memory.count).max())

  @property
  def overflow(self) -> int:
    """Pointers merged for lack of room since reset; waits for the frame."""
    return int(np.asarray(self.memory.overflow).sum())

  def reset(self, which: np.ndarray | None = None) -> None:
    """Forgets everything: the next image is a first frame again.

    Args:
      which: (B,) bool, the streams that forget; None: all.

    Raises:
      ValueError: if `which` is not of that shape and type.
    """
    if which is not None:
      which = np.asarray(which)
      if which.shape != (self.batch_size,) or which.dtype != bool:
        raise ValueError(
          f"which must be ({self.batch_size},) bool, got {which.shape} "
          f"{which.dtype}"
        )
      self.memory = self._clear(self.memory, which)
      return
    self.memory = self._init_memory(self.capacity)
    self.frames = 0
    self._counts = _Counts(self._tokens)
    self._warned = False

  def wait_for_compiles(self) -> None:
    """Returns once no step is being compiled in the background."""
    concurrent.futures.wait(self._programs.values())

  def __call__(self, image: np.ndarray | jax.Array) -> Prediction:
    """Takes the next image of each stream.

    Args:
      image: (B, H, W, 3), uint8, or float32 in [-1, 1]; RGB. A single stream
        also takes (H, W, 3).

    Returns:
      The prediction, with a leading axis of B.

    Raises:
      ValueError: if the image does not have the stream's size or a known type.
    """
    image = image[None] if image.ndim == 3 else image
    shape = (self.batch_size, *self.image_size, 3)
    if image.shape != shape:
      raise ValueError(
        f"this stream takes images of shape {shape}, got {tuple(image.shape)}"
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

    def array(shape, dtype):
      return jax.ShapeDtypeStruct(shape, dtype, sharding=self._split)

    def memory(capacity):
      shapes = jax.eval_shape(
        lambda: init_memory(
          self.config, self.batch_size, self.image_size, capacity
        )
      )
      return jax.tree.map(lambda x: array(x.shape, x.dtype), shapes)

    image = array((self.batch_size, *self.image_size, 3), dtype)
    step = self._step.lower(self._params, memory(capacity), image).compile()
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
