"""The programs of a live stream, compiled in the background."""

from __future__ import annotations

import concurrent.futures
import functools
import logging
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from point3r_jax.config import ModelConfig
from point3r_jax.gpu_options import (
  GPU_OPTIONS,
  GRAPH_COMMANDS,
  GRAPHS,
  leave_out_convolutions,
  suit_devices,
)
from point3r_jax.kernels_ahead import has_kernels
from point3r_jax.lowered_programs import lower_once
from point3r_jax.memory import PointerMemory, grow, init_memory
from point3r_jax.params import JoinedParams, join_params
from point3r_jax.quick_turns import quick_turns
from point3r_jax.streaming import (
  Prediction,
  StepOptions,
  empty_prediction,
  encode_fn,
  interact_fn,
)


@flax.struct.dataclass
class StreamParams:
  """Parameters as the two programs of a stream want them."""

  encoder: JoinedParams
  others: JoinedParams


@flax.struct.dataclass
class EncodedFrames:
  """Frames that were encoded at once, to be taken in turn.

  Attributes:
    tokens: (B, T, N, E) float32.
    next: (B,) int32, which frame comes next, the same for all streams.
  """

  tokens: jax.Array
  next: jax.Array


# (params, frames, images (B, t, H, W, 3) or, if t is 1, (B, H, W, 3)) → frames,
# the first t of which are the images.
Encoder = Callable[..., EncodedFrames]

# (params, memory, last prediction, frames) → (memory, prediction, frames). All
# but the parameters are donated, as are the encoder's frames: what is where it
# was needs no new CUDA graph.
Step = Callable[..., tuple[PointerMemory, Prediction, EncodedFrames]]

# What the encoder is called with. The model's setup asks for the token.
_ENCODER = ("encoder", "pose_token")

# The mesh's axis, along which streams are divided among devices.
_AXIS = "stream"

# Encoder and step are a CUDA graph each. The encoder's kernels follow one
# another.
_ENCODER_OPTIONS = {
  **GPU_OPTIONS,
  GRAPHS: GRAPH_COMMANDS,
  "xla_gpu_command_buffer_scheduling_mode": "SERIALIZE",
}
# The step's has the choice of rows in it, and what does not depend on the other
# runs side by side: both streams of the decoders, the heads. Their buffers
# share no place.
_STEP_OPTIONS = {
  **GPU_OPTIONS,
  GRAPHS: f"{GRAPH_COMMANDS},CONDITIONAL",
  "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
}

# cuDNN wants the kernels of 3×3 convolutions with their output channels first:
# otherwise XLA transposes them every frame.
_KERNEL_LAYOUT = Layout((3, 0, 1, 2))

# Programs are compiled side by side, but those of all streams traced in order:
# JAX before 0.12 counts kernels of ours as it lowers them, and the number is
# part of the persistent cache's key.
_TRACING = concurrent.futures.ThreadPoolExecutor(1, "trace-ahead")


def _warn_of_failure(
  name: int | str | None, program: concurrent.futures.Future
) -> None:
  """Says what else would be known only when the program is needed."""
  if not program.cancelled() and (error := program.exception()):
    logging.getLogger(__name__).warning(
      "the step for %s pointers could not be compiled ahead; it will be tried "
      "again when it is needed: %s",
      name,
      error,
    )


def _graphs_for(
  lowered: jax.stages.Lowered, options: dict[str, str | bool | int]
) -> dict[str, str | bool | int]:
  """Returns XLA's options for a program that may be found compiled."""
  if GRAPHS not in options or has_kernels(lowered):
    return options
  return leave_out_convolutions(options)


def _arrange(x: jax.Array) -> jax.Array:
  """Lays a parameter out on the device as the programs read it."""
  if jax.default_backend() == "gpu" and x.shape[:-2] == (3, 3):
    return jax.device_put(x, Format(_KERNEL_LAYOUT, x.sharding))
  return x


class StreamPrograms:
  """Compiles what a stream of one image size runs, each program once.

  Attributes:
    split: how arrays with a leading axis of B live on several devices; None: on
      the default device.
    seconds: that programs took to compile: steps by capacity, and the
      "encoder", one for each number of frames and type of images.
    copy: copies a prediction, whose buffers the next step takes over.
  """

  split: NamedSharding | None
  seconds: dict[int | str, float]
  copy: Callable[[Prediction], Prediction]

  def __init__(
    self,
    config: ModelConfig,
    options: StepOptions,
    image_size: tuple[int, int],
    batch_size: int,
    look_ahead: int,
    devices: Sequence[jax.Device] | None = None,
  ):
    """Compiles nothing yet.

    Args:
      config: the model's sizes.
      options: the step's options.
      image_size: (H, W), multiples of the patch size.
      batch_size: B, streams side by side.
      look_ahead: T, the most frames that are encoded at once.
      devices: to divide the streams among; None: the default device.
    """
    self._config = config
    self._options = options
    self._image_shape = (batch_size, *image_size, 3)
    self._look_ahead = look_ahead
    self._grid = config.grid(image_size)
    self.split = None
    if devices:
      mesh = jax.make_mesh(
        (len(devices),), (_AXIS,), (AxisType.Auto,), devices=devices
      )
      self.split = NamedSharding(mesh, PartitionSpec(_AXIS))
    self.seconds = {}
    self.copy = jax.jit(
      functools.partial(jax.tree.map, jnp.copy), out_shardings=self.split
    )
    self._futures = {}
    self._compiling = concurrent.futures.ThreadPoolExecutor(2, "compile-ahead")

  def put(self, params: dict) -> StreamParams:
    """Moves parameters to where the programs want them, and as they do."""
    everywhere = self.split and NamedSharding(self.split.mesh, PartitionSpec())
    encoder = {name: params[name] for name in _ENCODER}
    others = {name: x for name, x in params.items() if name != "encoder"}
    join = functools.partial(join_params, biases=jax.default_backend() == "gpu")
    joined = StreamParams(join(encoder), join(others))
    return jax.tree.map(_arrange, jax.device_put(joined, everywhere))

  def init_memory(self, capacity: int | None) -> PointerMemory:
    """Returns an empty memory; see `memory.init_memory`."""
    memory = init_memory(
      self._config, self._image_shape[0], self._image_shape[1:3], capacity
    )
    return self._place(memory)

  def init_prediction(self) -> Prediction:
    """Returns buffers for the first step's prediction."""
    return self._place(empty_prediction(self._options, self._image_shape))

  def init_frames(self) -> EncodedFrames:
    """Returns buffers for encoded frames."""
    height, width = self._grid
    batch, encoder_width = self._image_shape[0], self._config.encoder_width
    shape = (batch, self._look_ahead, height * width, encoder_width)
    return self._place(
      EncodedFrames(jnp.zeros(shape, jnp.float32), jnp.zeros(batch, jnp.int32))
    )

  def memory_shapes(self, capacity: int) -> PointerMemory:
    """Returns the memory of a capacity, as shapes with shardings."""
    return self._shapes(lambda: self.init_memory(capacity))

  def step(
    self,
    params: JoinedParams,
    capacity: int,
    unread: int,
    ahead: bool = False,
  ) -> concurrent.futures.Future[Step]:
    """Returns the step for a capacity, compiled or being compiled.

    Args:
      params: what the step will be called with.
      capacity: of the memory it will be called with.
      unread: rows at the memory's end that will hold no pointers before.
      ahead: whether it is not needed yet: what failed is not tried again.
    """

    def step(params, memory, last, frames):
      del last  # Its buffers are for the new prediction.
      tokens = jax.lax.dynamic_index_in_dim(
        frames.tokens, frames.next[0], axis=1, keepdims=False
      )
      memory, prediction = interact_fn(
        self._config,
        self._options,
        params.split(),
        memory,
        tokens,
        grid=self._grid,
        unread=unread,
        choose_rows=True,
      )
      return memory, prediction, frames.replace(next=frames.next + 1)

    key = (capacity, unread)

    def lower():
      memory = self.memory_shapes(capacity)
      last = self._shapes(self.init_prediction)
      kept = (memory, last, self._shapes(self.init_frames))
      return self._lower(key, step, (params, *kept), kept, donate=(1, 2, 3))

    return self._submit(key, capacity, lower, _STEP_OPTIONS, ahead)

  def enlarge(
    self, before: int, capacity: int
  ) -> concurrent.futures.Future[Callable[[PointerMemory], PointerMemory]]:
    """Returns what copies a memory into one of a larger capacity."""

    def lower():
      run = jax.jit(grow, static_argnums=1, out_shardings=self.split)
      return run.lower(self.memory_shapes(before), capacity)

    return self._submit((before, "to", capacity), None, lower, GPU_OPTIONS)

  def encoder(
    self, params: JoinedParams, count: int, dtype: np.dtype
  ) -> concurrent.futures.Future[Encoder]:
    """Returns the encoder, compiled or being compiled.

    Args:
      params: what it will be called with.
      count: frames that are encoded at once, T at most.
      dtype: of the images.
    """
    batch, *image = self._image_shape
    shape = (batch, count, *image) if count > 1 else self._image_shape

    def encode(params, frames, images):
      images = images.reshape(-1, *image)
      tokens = encode_fn(self._config, self._options, params.split(), images)
      tokens = tokens.reshape(-1, count, *tokens.shape[1:])
      return EncodedFrames(
        frames.tokens.at[:, :count].set(tokens), jnp.zeros_like(frames.next)
      )

    key = ("encoder", count, dtype)

    def lower():
      frames = self._shapes(self.init_frames)
      operands = (params, frames, self._array(shape, dtype))
      return self._lower(key, encode, operands, frames, donate=(1,))

    return self._submit(key, "encoder", lower, _ENCODER_OPTIONS)

  def wait(self) -> None:
    """Returns once nothing is being compiled."""
    concurrent.futures.wait(self._futures.values())

  def _place(self, tree: Any) -> Any:
    """Divides arrays with a leading axis of B among the devices."""
    return jax.device_put(tree, self.split) if self.split else tree

  def _shapes(self, make: Callable[[], Any]) -> Any:
    """Returns what a function makes, as shapes with shardings."""
    shapes = jax.eval_shape(make)
    return jax.tree.map(lambda x: self._array(x.shape, x.dtype), shapes)

  def _array(self, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=self.split)

  def _lower(
    self,
    key: Hashable,
    program: Callable,
    operands: tuple,
    result: Any,
    donate: tuple[int, ...],
  ) -> jax.stages.Lowered:
    """Lowers (params, …) → …; each device takes its own streams of it.

    All but the parameters, which come first, and the result have a leading axis
    of B. See `lower_once` for the arguments.
    """
    made_for = (self._config, self._options, self._image_shape)
    name = repr((*made_for, self._look_ahead, key))
    if self.split:
      program = jax.shard_map(
        program,
        mesh=self.split.mesh,
        in_specs=(PartitionSpec(), *(len(operands) - 1) * [self.split.spec]),
        out_specs=self.split.spec,
        check_vma=False,
      )
    return lower_once(
      program, operands, name=name, result=result, donate=donate
    )

  def _submit(
    self,
    key: Hashable,
    name: int | str | None,
    lower: Callable[[], jax.stages.Lowered],
    gpu_options: dict[str, str | bool | int],
    ahead: bool = False,
  ) -> concurrent.futures.Future:
    """Compiles in the background what was not, or failed to be, compiled.

    How long it took is noted under the name, if it has one. What is not needed
    yet and failed is said once and left for then.
    """

    def trace():
      started = time.perf_counter()
      with quick_turns:
        return lower(), time.perf_counter() - started

    def compile_traced(traced):
      lowered, elapsed = traced.result()
      started = time.perf_counter()
      options = None
      if jax.default_backend() == "gpu":
        options = _graphs_for(lowered, gpu_options)
        devices = self.split.mesh.size if self.split else 1
        options = suit_devices(options, devices)
      with quick_turns:
        program = lowered.compile(options)
      if name is not None:
        elapsed += time.perf_counter() - started
        self.seconds[name] = self.seconds.get(name, 0.0) + elapsed
      return program

    future = self._futures.get(key)
    failed = future and future.done() and future.exception()
    # What failed may have been out of memory.
    if future is None or (failed and not ahead):
      traced = _TRACING.submit(trace)
      future = self._compiling.submit(compile_traced, traced)
      self._futures[key] = future
      if ahead:
        future.add_done_callback(functools.partial(_warn_of_failure, name))
    return future
