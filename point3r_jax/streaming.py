"""The step of a stream and the scan over a sequence: pure functions.

`step(config, params, memory, images)` is the heart of the project; `scan` is
`lax.scan` over it. Both are jitted and compile once per shape and option set.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from point3r_jax.config import ModelConfig
from point3r_jax.memory import PointerMemory, check_mask, fuse, reset
from point3r_jax.models.attention import IMPLEMENTATIONS
from point3r_jax.models.compute import REMAT, Compute
from point3r_jax.models.point3r import HEADS, Context, FrameOutput, Point3R
from point3r_jax.params import check_params, check_rounding
from point3r_jax.precision import Precision, get_precision

# Shares of a memory's rows, if there are at least so many, on which decoders
# may run instead of all; in blocks that divide evenly among a Hopper GPU's
# multiprocessors, when 16 heads attend, 64 rows a warpgroup.
_ROW_SHARES = (0.7, 0.85)
_ROW_BLOCK = 512
_MANY_ROWS = 1024
# Floats beyond are no images: resampling may leave [-1, 1], but not so far.
_BRIGHTEST = 2.0


@flax.struct.dataclass
class Prediction:
  """What a frame gives. Under `scan` every field has a leading T.

  OpenCV axes (x right, y down, z forward). The global frame is the camera of
  the stream's first frame; units are the model's (metres where it is metric).

  Attributes:
    points_camera: (B, H, W, 3) float32 in the frame's camera; None if not asked
      for. Its z is the depth.
    confidence_camera: (B, H, W) float32, 1 or more; None if not asked for.
    points_world: (B, H, W, 3) float32 in the global frame; None if not asked
      for.
    confidence_world: (B, H, W) float32, 1 or more; None if not asked for.
    pose: (B, 7) float32 camera-to-world: translation, unit quaternion wxyz.
    pointer_count: (B,) int32, pointers in memory after the frame.
    overflow: (B,) int32, pointers since reset that found no free row and were
      merged into their nearest instead.
  """

  points_camera: jax.Array | None
  confidence_camera: jax.Array | None
  points_world: jax.Array | None
  confidence_world: jax.Array | None
  pose: jax.Array
  pointer_count: jax.Array
  overflow: jax.Array


@dataclasses.dataclass(frozen=True)
class StepOptions:
  """How to run a step; the keyword options of `step`, `scan` and `Stream`.

  Attributes:
    precision: "float32", "tf32", "bfloat16", "mixed" or a `Precision`; None:
      float32 on a CPU, bfloat16 on accelerators.
    attention: "auto", "xla", "blocks", "cudnn", "hopper" or "tpu", see
      `models.attention`.
    fusion: False keeps all pointers (the paper's first training stage).
    fusion_divisor: the scene's extent over this is the fusion distance.
    rotary: False leaves out the 3D rotary embedding (for ablations).
    heads: "both", "camera" or "world": which point maps to return. "world"
      saves the camera head; "camera" saves nothing but the copy, for pointers
      are made of world points.
    remat: for training, what the backward pass computes again instead of
      keeping it: "none", "elementwise" (all of a block but linear maps, what
      attends, cuDNN's attention and norms without parameters) or "blocks" (all
      but the blocks' inputs, and the dense heads). None is for inference: there
      are derivatives, but slower ones.
  """

  precision: str | Precision | None = None
  attention: str = "auto"
  fusion: bool = True
  fusion_divisor: float = 20.0
  rotary: bool = True
  heads: str = "both"
  remat: str | None = None

  def __post_init__(self):
    """Fills the default precision and refuses unknown names."""
    object.__setattr__(self, "precision", get_precision(self.precision))
    if self.attention not in IMPLEMENTATIONS:
      raise ValueError(
        f"unknown attention {self.attention!r}; there are {IMPLEMENTATIONS}"
      )
    if self.heads not in HEADS:
      raise ValueError(f"unknown heads {self.heads!r}; there are {HEADS}")
    if self.remat not in (None, *REMAT):
      raise ValueError(f"unknown remat {self.remat!r}; there are {REMAT}")
    if not self.fusion_divisor > 0:
      raise ValueError(
        f"fusion_divisor must be positive, got {self.fusion_divisor}"
      )


def step_options(**options) -> StepOptions:
  """Returns options by name.

  Raises:
    ValueError: for unknown names or values.
  """
  known = [field.name for field in dataclasses.fields(StepOptions)]
  for name in options:
    if name not in known:
      raise ValueError(f"unknown option {name!r}; there are {', '.join(known)}")
  return StepOptions(**options)


def empty_prediction(
  options: StepOptions, image_shape: tuple[int, int, int, int]
) -> Prediction:
  """Returns zeros in the shapes of what images (B, H, W, 3) give."""
  batch, *image_size, _ = image_shape

  def maps(wanted):
    if not wanted:
      return None, None
    shapes = (batch, *image_size, 3), (batch, *image_size)
    return tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)

  camera, world = (maps(options.heads in ("both", x)) for x in HEADS[1:])
  return Prediction(
    *camera,
    *world,
    pose=jnp.zeros((batch, 7), jnp.float32),
    pointer_count=jnp.zeros((batch,), jnp.int32),
    overflow=jnp.zeros((batch,), jnp.int32),
  )


def build_model(config: ModelConfig, options: StepOptions) -> Point3R:
  """Returns the network that runs under these options."""
  return Point3R(
    config,
    Compute(options.precision, options.attention, options.remat),
    rotary=options.rotary,
    camera_head=options.heads != "world",
  )


def read_memory(
  memory: PointerMemory, unread: int = 0, block: int = 1
) -> Context:
  """Returns what the network reads of a memory.

  Args:
    memory: of B streams.
    unread: rows at its end that are known to hold no pointers.
    block: the others are read in multiples of this, see `Compute.token_block`.
  """
  rows = memory.capacity - unread
  rows = min(rows + -rows % block, memory.capacity)
  return Context(
    position=memory.position[:, :rows],
    feature=memory.feature[:, :rows],
    count=memory.count,
    pose_slots=memory.pose_slots,
    image_position=memory.image_position,
    first=memory.frame == 0,
  )


def advance(
  memory: PointerMemory, output: FrameOutput, options: StepOptions
) -> tuple[PointerMemory, Prediction]:
  """Moves the memory past a frame that the network has seen."""
  memory = fuse(
    memory,
    output.position,
    output.feature,
    divisor=options.fusion_divisor,
    fusion=options.fusion,
  ).replace(
    pose_slots=output.pose_slots,
    image_position=output.position,
    frame=memory.frame + 1,
  )
  world = options.heads != "camera"
  return memory, Prediction(
    points_camera=output.points_camera,
    confidence_camera=output.confidence_camera,
    points_world=output.points_world if world else None,
    confidence_world=output.confidence_world if world else None,
    pose=output.pose,
    pointer_count=memory.count,
    overflow=memory.overflow,
  )


def encode_fn(
  config: ModelConfig, options: StepOptions, params: dict, images: jax.Array
) -> jax.Array:
  """Encodes frames, each by itself: (B, H, W, 3) images to (B, N, E) tokens."""
  model = build_model(config, options)
  with jax.default_matmul_precision(options.precision.matmul):
    return model.apply({"params": params}, images, method=model.encode)


def row_choices(capacity: int) -> tuple[int, ...]:
  """Returns on how many rows of a memory decoders may run, ascending.

  Of a small one on all of them: each choice is a program to compile.
  """
  if capacity < _MANY_ROWS:
    return (capacity,)
  blocks = {round(share * capacity / _ROW_BLOCK) for share in _ROW_SHARES}
  fewer = (_ROW_BLOCK * number for number in sorted(blocks))
  return (*(rows for rows in fewer if rows < capacity), capacity)


def interact_fn(
  config: ModelConfig,
  options: StepOptions,
  params: dict,
  memory: PointerMemory,
  tokens: jax.Array,
  grid: tuple[int, int],
  unread: int = 0,
  choose_rows: bool = False,
) -> tuple[PointerMemory, Prediction]:
  """What a step does with an encoded frame.

  Args:
    config: the model's sizes.
    options: the step's options.
    params: nested dictionary.
    memory: of B streams.
    tokens: (B, N, E) float32.
    grid: (h, w) with h·w = N.
    unread: see `read_memory`.
    choose_rows: whether the device chooses on how many rows of pointers the
      decoders run, out of `row_choices`: the host knows too late how many
      pointers there are. Outside of a CUDA graph a GPU's host waits for it.

  Returns:
    The memory after the frame, and the prediction.
  """
  model = build_model(config, options)
  context = read_memory(memory, unread, model.compute.token_block)
  capacity = context.feature.shape[1]

  def apply(method, *operands):
    return model.apply({"params": params}, *operands, method=method)

  def decode(rows):
    # Each choice reads for itself: nothing has to be copied for all of them.
    read = read_memory(memory, memory.capacity - rows)
    return apply(model.decode, begun, read)

  with jax.default_matmul_precision(options.precision.matmul):
    begun = apply(model.begin, tokens, context, grid)
    choices = row_choices(capacity) if choose_rows else (capacity,)
    fewer = np.array(choices[:-1], np.int32)
    decoded = jax.lax.switch(
      (begun.count.max() > fewer).sum(),
      [functools.partial(decode, rows) for rows in choices],
    )
    output = apply(model.finish, tokens, begun, decoded, grid)
    return advance(memory, output, options)


def step_fn(
  config: ModelConfig,
  options: StepOptions,
  params: dict,
  memory: PointerMemory,
  images: jax.Array,
  unread: int = 0,
) -> tuple[PointerMemory, Prediction]:
  """`step` before jit: to be traced inside a larger program."""
  check_params(config, params)
  check_rounding(params, options.precision)
  tokens = encode_fn(config, options, params, images)
  grid = config.grid(images.shape[1:3])
  return interact_fn(config, options, params, memory, tokens, grid, unread)


def scan_fn(
  config: ModelConfig,
  options: StepOptions,
  params: dict,
  memory: PointerMemory,
  images: jax.Array,
  resets: jax.Array | None,
) -> tuple[PointerMemory, Prediction]:
  """`scan` before jit: to be traced inside a larger program."""

  def body(memory, frame):
    images, resets = frame
    if resets is not None:
      memory = reset(memory, resets)
    return step_fn(config, options, params, memory, images)

  return jax.lax.scan(body, memory, (images, resets))


_step = jax.jit(step_fn, static_argnums=(0, 1))
_scan = jax.jit(scan_fn, static_argnums=(0, 1))


def take_images(images: ArrayLike) -> np.ndarray | jax.Array:
  """Returns images as an array that no one else writes to.

  JAX may read a NumPy array after the call that it was given to: so cameras
  that fill one buffer again and again need a copy.

  Args:
    images: of any shape; JAX arrays are returned as they are.

  Raises:
    ValueError: for types that images cannot have, and for values of theirs that
      are far out of range or not finite, which would stay in the memory. On a
      device they are not looked at.
  """
  on_host = not isinstance(images, jax.Array)
  images = np.array(images) if on_host else images
  if images.dtype not in (jnp.uint8, jnp.float32):
    raise ValueError(
      f"images must be uint8, or float32 in [-1, 1], not {images.dtype}"
    )
  if on_host and images.dtype != jnp.uint8 and images.size:
    low, high = images.min(), images.max()
    if not (np.isfinite(low) and np.isfinite(high)):
      raise ValueError("images must be finite, but hold NaN or infinity")
    if max(-low, high) > _BRIGHTEST:
      raise ValueError(
        "images must be uint8, or float32 in [-1, 1], but these are float32 "
        f"from {low:g} to {high:g}; divide 0 to 255 by 127.5 and subtract 1"
      )
  return images


def _check_images(
  memory: PointerMemory,
  config: ModelConfig,
  images: jax.Array,
  axes: str,
) -> None:
  """Raises ValueError where images do not suit the memory."""
  if images.ndim != len(axes) or images.shape[-1] != 3:
    raise ValueError(
      f"images must have the axes ({', '.join(axes)}) with 3 channels, got "
      f"shape {tuple(images.shape)}"
    )
  batch, (height, width) = images.shape[-4], config.grid(images.shape[-3:-1])
  widths = memory.feature.shape[-1], memory.pose_slots.shape[-2:]
  wanted = config.decoder_width, (config.pose_slots, 2 * config.decoder_width)
  if widths != wanted:
    raise ValueError(
      "the memory is of a model of other sizes; make it with init_memory for "
      "this config"
    )
  if memory.image_position.shape[:2] != (batch, height * width):
    raise ValueError(
      f"the memory is of {memory.image_position.shape[0]} streams with "
      f"{memory.image_position.shape[1]} tokens a frame, the images of {batch} "
      f"with {height * width}; make it with init_memory(config, {batch}, "
      f"{tuple(images.shape[-3:-1])})"
    )


def step(
  config: ModelConfig,
  params: dict,
  memory: PointerMemory,
  images: ArrayLike,
  **options,
) -> tuple[PointerMemory, Prediction]:
  """Takes one frame a sample: predicts, then extends and fuses the memory.

  Pure and jitted. The memory is not donated; in a loop of one's own,
  `jax.jit(functools.partial(step, config), donate_argnums=1)` reuses its
  buffers. `Stream` does that and more.

  Args:
    config: the model's sizes.
    params: nested dictionary, see `load_checkpoint`.
    memory: of B streams, see `init_memory`. Streams are independent and may be
      at different frames.
    images: (B, H, W, 3) uint8, or float32 in [-1, 1]; RGB.
    **options: fields of `StepOptions`.

  Returns:
    The memory after the frame, and the prediction.

  Raises:
    ValueError: for images that do not suit the memory or are not finite,
      parameters of another model or rounded to more than the precision does,
      or unknown options.
  """
  images = take_images(images)
  _check_images(memory, config, images, "BHWC")
  return _step(config, step_options(**options), params, memory, images)


def scan(
  config: ModelConfig,
  params: dict,
  memory: PointerMemory,
  images: ArrayLike,
  *,
  resets: ArrayLike | None = None,
  **options,
) -> tuple[PointerMemory, Prediction]:
  """Takes a sequence of frames: `lax.scan` over `step`, jitted.

  The capacity is fixed: read `overflow` of the returned memory, which counts
  the pointers that found no free row and were merged instead.

  Args:
    config: the model's sizes.
    params: nested dictionary, see `load_checkpoint`.
    memory: of B streams, see `init_memory`.
    images: (T, B, H, W, 3) uint8, or float32 in [-1, 1]; RGB.
    resets: (T, B) bool, streams to empty before a frame, or None.
    **options: fields of `StepOptions`.

  Returns:
    The memory after the last frame, and predictions with a leading T.

  Raises:
    ValueError: for images that do not suit the memory or are not finite,
      parameters of another model or rounded to more than the precision does,
      or unknown options.
  """
  images = take_images(images)
  _check_images(memory, config, images, "TBHWC")
  if resets is not None:
    resets = jnp.asarray(resets)
    check_mask("resets", resets, images.shape[:2])
  options = step_options(**options)
  return _scan(config, options, params, memory, images, resets)
