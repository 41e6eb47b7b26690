"""Kernels over rows for NVIDIA GPUs in training: norms, GELUs, sums of blocks.

These are bound by the bytes that they read. XLA reads rows once to sum over
them and again for what it makes of the sums, and sums of columns are kernels of
their own; here all is done while a block of rows is in registers. Written in
Pallas for Triton. Plans for devices that are not there have XLA's forms.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp

from point3r_jax.models.gpus import compute_capability

try:
  from jax.experimental.pallas import triton
except ImportError:  # JAX means to drop it.
  triton = None

# All kernels take multiples of so many rows.
_ROWS = 8

# Rows of a norm's block, or that it takes at a time where columns are summed:
# then there are at most so many blocks, as an H200 has room for at a time.
_NORM_ROWS = 4
_NORM_BLOCKS = 528

# So many channels are spread over all threads, 16 bytes for each.
_SPREAD_CHANNELS = 1024

# Rows of a GELU's block, whose columns are summed, and how many rows and
# channels it takes at a time.
_GELU_BLOCK = 64
_GELU_TILE = (_ROWS, 256)

# Channels at a time of blocks that are added up.
_ADDED_CHANNELS = 256

# The least compute capability that Triton multiplies bfloat16 for.
_CAPABILITY = 8.0

# GELU's form with tanh: x·Φ(x), Φ(x) = ½(1 + tanh(SCALE·(x + CUBIC·x³))).
GELU_SCALE, GELU_CUBIC = (2 / math.pi) ** 0.5, 0.044715


def suit_rows(
  shape: tuple[int, ...], dtype: jnp.dtype, width: int = _GELU_TILE[1]
) -> bool:
  """Says whether the default device has these kernels for rows (…, C).

  Args:
    shape: of the rows: multiples of 8, and of `width` channels.
    dtype: of what is computed: bfloat16.
    width: what the kernel wants multiples of; that of GELUs does for all but
      those of `map_kernels`.
  """
  capability = compute_capability()
  return (
    triton is not None
    # Only that of CUDA devices is a number.
    and capability.replace(".", "").isdigit()
    and float(capability) >= _CAPABILITY
    and dtype == jnp.bfloat16
    and math.prod(shape[:-1]) % _ROWS == 0
    and shape[-1] % width == 0
  )


def compiler_params() -> triton.CompilerParams:
  """Returns how the kernels are compiled."""
  return triton.CompilerParams(num_warps=4, num_stages=1)


def flatten(*arrays: jax.Array) -> list[jax.Array]:
  """Makes (n, C) of arrays (…, C); raises ValueError unless n is in eights."""
  flat = [x.reshape(-1, x.shape[-1]) for x in arrays]
  rows = len(flat[0])
  if rows % _ROWS:  # `suit_rows` sees those of all devices of a mesh.
    raise ValueError(
      f"kernels over rows take a multiple of {_ROWS} of them on each device, "
      f"got {rows}; give each device more samples"
    )
  return flat


def _parts(channels: int) -> list[slice]:
  """Splits channels into powers of two, as Triton wants them."""
  parts, start = [], 0
  while left := channels - start:
    size = 1 << (left.bit_length() - 1)
    parts.append(slice(start, start + size))
    start += size
  return parts


def _read(
  rows: jax.Array, at: slice | pl.Slice = slice(None)
) -> list[jax.Array]:
  """Reads some of rows (n, C) as float32, in parts of their channels."""
  return [rows[at, part].astype(jnp.float32) for part in _parts(rows.shape[1])]


def _normalize_kernel(x, y, scale, *, epsilon):
  """Normalises a block; references of x and y (n, C) and scales (n,)."""
  channels, parts = x.shape[1], _read(x)
  mean = sum(part.sum(axis=1) for part in parts) / channels
  square = sum((part * part).sum(axis=1) for part in parts) / channels
  variance = jnp.maximum(square - mean * mean, 0)
  factor = jax.lax.rsqrt(variance + epsilon)
  for where, part in zip(_parts(channels), parts, strict=True):
    normed = (part - mean[:, None]) * factor[:, None]
    y[:, where] = normed.astype(y.dtype)
  scale[:] = factor


def _normalize_tile_gradient(y, scale, gradient, residual, result, at):
  """The same backward, of some rows of a block.

  References (n, C), but of scales (n,). Returns the gradient and that of what
  went on, float32 in parts of their channels.
  """
  channels, parts = y.shape[1], _read(y, at)
  gradients, residuals = _read(gradient, at), _read(residual, at)
  mean = sum(part.sum(axis=1) for part in gradients) / channels
  slope = sum(
    (part * of_part).sum(axis=1)
    for part, of_part in zip(parts, gradients, strict=True)
  )
  slope /= channels
  factor, of_x = scale[at][:, None], []
  for where, part, of_part, rest in zip(
    _parts(channels), parts, gradients, residuals, strict=True
  ):
    of_part = of_part - mean[:, None] - part * slope[:, None]
    of_x.append(rest + factor * of_part)
    result[at, where] = of_x[-1].astype(result.dtype)
  return of_x, residuals


def _sum_tile(part: jax.Array) -> jax.Array:
  """Sums rows (n, c) if they are so wide that a thread has some of each.

  Others stay apart until the end of a block: threads would wait for each other.
  """
  return part.sum(axis=0) if part.shape[1] >= _SPREAD_CHANNELS else part


def _normalize_gradient_kernel(*references, rows, wanted):
  """The same of a block, and sums (1, k, C) of what is wanted, if anything is.

  References of `_normalize_tile_gradient`, and of the sums.
  """
  if not any(wanted):
    _normalize_tile_gradient(*references, slice(None))
    return
  *references, sums = references
  block, channels = references[0].shape
  left, parts = rows - pl.program_id(0) * block, _parts(channels)

  def add_tile(tile, totals):
    at = pl.ds(tile * _NORM_ROWS, _NORM_ROWS)
    both = _normalize_tile_gradient(*references, at)
    summed = [x for x, want in zip(both, wanted, strict=True) if want]
    return jax.tree.map(lambda x, y: x + _sum_tile(y), totals, summed)

  widths = [part.stop - part.start for part in parts]
  zeros = [jnp.zeros((_NORM_ROWS, width), jnp.float32) for width in widths]
  start = sums.shape[1] * [[_sum_tile(x) for x in zeros]]
  tiles = jnp.minimum(left, block) // _NORM_ROWS
  totals = jax.lax.fori_loop(0, tiles, add_tile, start)
  for number, total in enumerate(totals):
    for where, part in zip(parts, total, strict=True):
      sums[0, number, where] = jnp.atleast_2d(part).sum(axis=0)


def _norm_specs(
  channels: int, rows: int = _NORM_ROWS
) -> tuple[pl.BlockSpec, pl.BlockSpec]:
  """Returns the blocks of arrays (n, C) and (n,)."""
  return (
    pl.BlockSpec((rows, channels), lambda i: (i, 0)),
    pl.BlockSpec((rows,), lambda i: (i,)),
  )


def normalize_rows(
  x: jax.Array, dtype: jnp.dtype, epsilon: float, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
  """Normalises rows x (…, C) in float32; `suit_rows` says which.

  Args:
    x: rows.
    dtype: of the result.
    epsilon: added to the variance.
    interpret: whether to run without a GPU.

  Returns:
    (…, C), and what differences from a row's mean were multiplied by, (…)
    float32.
  """
  (flat,) = flatten(x)
  rows, channels = flat.shape
  block, scales = _norm_specs(channels)
  y, scale = pl.pallas_call(
    functools.partial(_normalize_kernel, epsilon=epsilon),
    grid=(rows // _NORM_ROWS,),
    in_specs=[block],
    out_specs=(block, scales),
    out_shape=(
      jax.ShapeDtypeStruct(flat.shape, dtype),
      jax.ShapeDtypeStruct((rows,), jnp.float32),
    ),
    compiler_params=compiler_params(),
    name="normalize_rows",
    interpret=interpret,
  )(flat)
  return y.reshape(x.shape), scale.reshape(x.shape[:-1])


def normalize_rows_gradient(
  y: jax.Array,
  scale: jax.Array,
  gradient: jax.Array,
  residual: jax.Array,
  wanted: tuple[bool, bool] = (False, False),
  interpret: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """Returns the gradient of what was normalised and went on as it was.

  Args:
    y: (…, C) and
    scale: (…) of `normalize_rows`.
    gradient: of y.
    residual: (…, C), gradient of what went on.
    wanted: whether the result is summed, and whether `residual` is.
    interpret: whether to run without a GPU.

  Returns:
    (…, C) in the type of `residual`; and, if any are wanted, k sums over blocks
    of rows (blocks, k, C) float32, that of the result taken before it was
    rounded.
  """
  shape, count = y.shape, sum(wanted)
  y, gradient, residual = flatten(y, gradient, residual)
  rows, channels = y.shape
  height = _ROWS if count else _NORM_ROWS
  while count and pl.cdiv(rows, height) > _NORM_BLOCKS:
    height *= 2
  blocks = pl.cdiv(rows, height)
  block, scales = _norm_specs(channels, height)
  out_specs = [block]
  out_shape = [jax.ShapeDtypeStruct(y.shape, residual.dtype)]
  if count:
    size = count, channels
    out_specs.append(pl.BlockSpec((1, *size), lambda i: (i, 0, 0)))
    out_shape.append(jax.ShapeDtypeStruct((blocks, *size), jnp.float32))
  of_x, *sums = pl.pallas_call(
    functools.partial(_normalize_gradient_kernel, rows=rows, wanted=wanted),
    grid=(blocks,),
    in_specs=[block, scales, block, block],
    out_specs=out_specs,
    out_shape=out_shape,
    compiler_params=compiler_params(),
    name="normalize_rows_gradient",
    interpret=interpret,
  )(y, scale.reshape(-1), gradient, residual)
  return of_x.reshape(shape), tuple(sums)


def gelu_slope(x: jax.Array) -> jax.Array:
  """Derivative of GELU's form with tanh, of x float32 of any shape."""
  # ½(1 + tanh(z)) is the logistic function of 2z.
  normal = jax.nn.sigmoid(2 * GELU_SCALE * (x + GELU_CUBIC * x * x * x))
  steepness = 2 * GELU_SCALE * (1 + 3 * GELU_CUBIC * x * x)
  return normal * (1 + x * steepness * (1 - normal))


def _gelu_gradient_kernel(x, gradient, result, sums, *, rows):
  """Multiplies a block by slopes; references (n, c), and of sums (1, c)."""
  height, width = _GELU_TILE
  left = rows - pl.program_id(1) * _GELU_BLOCK

  def add_tile(tile, total):
    at = pl.ds(tile * height, height), slice(None)
    slope = gelu_slope(x[at].astype(jnp.float32))
    of_x = slope * gradient[at].astype(jnp.float32)
    result[at] = of_x.astype(result.dtype)
    return total + of_x.sum(axis=0)

  tiles = jnp.minimum(left, _GELU_BLOCK) // height
  start = jnp.zeros((width,), jnp.float32)
  sums[0, :] = jax.lax.fori_loop(0, tiles, add_tile, start)


def gelu_gradient(
  x: jax.Array, gradient: jax.Array, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
  """Gradient of GELU, in its form with tanh, and sums over blocks of rows.

  Args:
    x: rows (…, C) that GELU was taken of; `suit_rows` says which.
    gradient: (…, C) of GELU.
    interpret: whether to run without a GPU.

  Returns:
    (…, C) in the type of x, and sums of its rows (blocks, C) float32, taken
    before it was rounded.
  """
  shape = x.shape
  x, gradient = flatten(x, gradient)
  rows, channels = x.shape
  width = _GELU_TILE[1]
  blocks = pl.cdiv(rows, _GELU_BLOCK)
  block = pl.BlockSpec((_GELU_BLOCK, width), lambda j, i: (i, j))
  of_x, sums = pl.pallas_call(
    functools.partial(_gelu_gradient_kernel, rows=rows),
    # Channels first: what is computed at a time is close together in memory.
    grid=(channels // width, blocks),
    in_specs=[block, block],
    out_specs=(block, pl.BlockSpec((1, width), lambda j, i: (i, j))),
    out_shape=(
      jax.ShapeDtypeStruct(x.shape, x.dtype),
      jax.ShapeDtypeStruct((blocks, channels), jnp.float32),
    ),
    compiler_params=compiler_params(),
    name="gelu_gradient",
    interpret=interpret,
  )(x, gradient)
  return of_x.reshape(shape), sums


def _add_blocks_kernel(counts, lengths, blocks, result):
  """Adds up a tile; references (B,), (B,), (blocks, n, c) and (n, c)."""
  # Not within the loop, where the interpreter does not know them.
  sample, first = pl.program_id(2), pl.program_id(1) * _ROWS
  length = lengths[sample]
  number = jnp.where(first < length, counts[sample], 0)

  def add(block, total):
    return total + blocks[block].astype(jnp.float32)

  zeros = jnp.zeros(result.shape, jnp.float32)
  total = jax.lax.fori_loop(0, number, add, zeros)
  row = first + jax.lax.iota(jnp.int32, _ROWS)
  result[:, :] = jnp.where(row[:, None] < length, total, 0).astype(result.dtype)


def add_blocks(
  blocks: jax.Array,
  counts: jax.Array,
  lengths: jax.Array,
  interpret: bool = False,
) -> jax.Array:
  """Adds up what counts of some blocks, which alone is read.

  Args:
    blocks: (blocks, B, N, C); `suit_rows` says which, N in eights.
    counts: (B,) int32, how many blocks there are of each sample.
    lengths: (B,) int32, the prefix of rows that counts.
    interpret: whether to run without a GPU.

  Returns:
    The sum (B, N, C) in their type, zeros beyond the lengths.
  """
  number, batch, rows, channels = blocks.shape
  width = _ADDED_CHANNELS
  # Pallas does not lower choices of weakly typed numbers for Triton.
  counts, lengths = (
    jax.lax.convert_element_type(x, jnp.int32) for x in (counts, lengths)
  )
  return pl.pallas_call(
    _add_blocks_kernel,
    grid=(channels // width, rows // _ROWS, batch),
    in_specs=[
      pl.BlockSpec((batch,), lambda j, i, b: (0,)),
      pl.BlockSpec((batch,), lambda j, i, b: (0,)),
      pl.BlockSpec((number, None, _ROWS, width), lambda j, i, b: (0, b, i, j)),
    ],
    out_specs=pl.BlockSpec((None, _ROWS, width), lambda j, i, b: (b, i, j)),
    out_shape=jax.ShapeDtypeStruct(blocks.shape[1:], blocks.dtype),
    compiler_params=compiler_params(),
    name="add_blocks",
    interpret=interpret,
  )(counts, lengths, blocks)
