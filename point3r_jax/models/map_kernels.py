"""Kernels over maps for NVIDIA GPUs: doubled, halved, read out backward.

They are bound by the bytes that they read and write. XLA gathers what each
pixel needs by tables; here a pixel's neighbours are read once for the four that
it becomes. Written in Pallas for Triton, as `row_kernels`, whose `suit_rows`
says where these are for `MAP_CHANNELS`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp

from point3r_jax.models.row_kernels import compiler_params, flatten, triton

# Channels of a block; all kernels take multiples of so many.
MAP_CHANNELS = 128

# Pixels of a row that are doubled at a time, or read out.
_PIXELS = 16

# Pixels of a block that is read out, whose columns are summed.
_READ_PIXELS = 512


def _behind(index: jax.Array, size: int) -> jax.Array:
  """How far before line i line 2i of twice as many lies."""
  return index.astype(jnp.float32) / (2 * size - 1)


def _ahead(index: jax.Array, size: int) -> jax.Array:
  """How far behind line i line 2i + 1 lies."""
  return (size - 1 - index).astype(jnp.float32) / (2 * size - 1)


def _near(index: jax.Array, size: int) -> list[jax.Array]:
  """Returns line i with those around it, or again itself at an end."""
  return [jnp.maximum(index - 1, 0), index, jnp.minimum(index + 1, size - 1)]


def _double(
  lines: list[jax.Array], behind: jax.Array, ahead: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Makes two lines of one and those around it."""
  before, own, after = lines
  return own + behind * (before - own), own + ahead * (after - own)


def _taps(index: jax.Array, size: int) -> list[tuple[jax.Array, jax.Array]]:
  """Returns which of twice as many lines are made of line i, and how much."""
  before, after = 2 * index - 1, 2 * index + 2
  return [
    (jnp.maximum(before, 0), jnp.where(index > 0, _ahead(index - 1, size), 0)),
    (2 * index, 1 - _behind(index, size)),
    (2 * index + 1, 1 - _ahead(index, size)),
    (
      jnp.minimum(after, 2 * size - 1),
      jnp.where(index < size - 1, _behind(index + 1, size), 0),
    ),
  ]


def _here(width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns a program's row, and columns (pixels, 1) with those that exist."""
  column = pl.program_id(0) * _PIXELS + jax.lax.iota(jnp.int32, _PIXELS)
  return pl.program_id(1), column[:, None], (column < width)[:, None]


def _place(x: Any, row: jax.Array, column: jax.Array) -> Any:
  """Returns where pixels of a row of x (rows, columns, c) are, a reference."""
  return x.at[row, column, jax.lax.iota(jnp.int32, x.shape[-1])[None]]


def _read(
  x: Any, valid: jax.Array, row: jax.Array, column: jax.Array
) -> jax.Array:
  place = _place(x, row, column)
  return triton.load(place, mask=valid, other=0.0).astype(jnp.float32)


def _double_kernel(x, y):
  """Doubles some pixels of a row; references (h, w, c) and (2h, 2w, c)."""
  height, width, _ = x.shape
  row, column, valid = _here(width)
  read = functools.partial(_read, x, valid)
  of_row = _behind(row, height), _ahead(row, height)
  of_column = _behind(column, width), _ahead(column, width)
  lines = [
    _double([read(near, at) for near in _near(row, height)], *of_row)
    for at in _near(column, width)
  ]
  for down in range(2):
    pixels = _double([line[down] for line in lines], *of_column)
    for across, pixel in enumerate(pixels):
      place = _place(y, 2 * row + down, 2 * column + across)
      triton.store(place, pixel.astype(y.dtype), mask=valid)


def _halve_kernel(gradient, result):
  """The same backward; references (2h, 2w, c) and (h, w, c)."""
  height, width, _ = result.shape
  row, column, valid = _here(width)
  read = functools.partial(_read, gradient, valid)
  total = sum(
    across * sum(down * read(line, at) for line, down in _taps(row, height))
    for at, across in _taps(column, width)
  )
  place = _place(result, row, column)
  triton.store(place, total.astype(result.dtype), mask=valid)


def _run(
  kernel: Callable[..., None],
  x: jax.Array,
  size: tuple[int, int],
  result: tuple[int, int],
  name: str,
  interpret: bool,
) -> jax.Array:
  """Runs a kernel for each row of a map of some size."""
  parts = x.shape[-1] // MAP_CHANNELS

  def block(height, width):
    return pl.BlockSpec(
      (None, height, width, MAP_CHANNELS),
      lambda j, i, b: (b // parts, 0, 0, b % parts),
    )

  return pl.pallas_call(
    kernel,
    grid=(pl.cdiv(size[1], _PIXELS), size[0], len(x) * parts),
    in_specs=[block(*x.shape[1:3])],
    out_specs=block(*result),
    out_shape=jax.ShapeDtypeStruct((len(x), *result, x.shape[-1]), x.dtype),
    compiler_params=compiler_params(),
    name=name,
    interpret=interpret,
  )(x)


def double_map(x: jax.Array, interpret: bool = False) -> jax.Array:
  """Doubles a map bilinearly with corners aligned, see `dpt.upsample`.

  Args:
    x: (B, h, w, C); `suit_rows` says which, C in `MAP_CHANNELS`.
    interpret: whether to run without a GPU.

  Returns:
    (B, 2h, 2w, C), interpolated in float32.
  """
  height, width = size = x.shape[1:3]
  doubled = 2 * height, 2 * width
  return _run(_double_kernel, x, size, doubled, "double_map", interpret)


def halve_map(gradient: jax.Array, interpret: bool = False) -> jax.Array:
  """Returns the gradient of what was doubled.

  Args:
    gradient: (B, 2h, 2w, C); `suit_rows` says which, C in `MAP_CHANNELS`.
    interpret: whether to run without a GPU.

  Returns:
    (B, h, w, C), summed in float32.
  """
  height, width = gradient.shape[1:3]
  size = height // 2, width // 2
  return _run(_halve_kernel, gradient, size, size, "halve_map", interpret)


def _read_out_gradient_kernel(x, gradient, kernel, result, sums, *, rows):
  """Makes a block of it; references (n, c), (n, features), (features, c).

  And of sums (1, c).
  """
  block, channels = x.shape
  height = math.gcd(rows, _PIXELS)
  left = rows - pl.program_id(1) * block
  columns = [kernel[i, :][None] for i in range(kernel.shape[0])]

  def add_tile(tile, total):
    at = pl.ds(tile * height, height)
    of_x = sum(
      gradient[at, i][:, None] * column for i, column in enumerate(columns)
    )
    of_x = jnp.where(x[at, :] != 0, of_x, 0)
    result[at, :] = of_x.astype(result.dtype)
    return total + of_x

  tiles = jnp.minimum(left, block) // height
  start = jnp.zeros((height, channels), jnp.float32)
  sums[0, :] = jax.lax.fori_loop(0, tiles, add_tile, start).sum(axis=0)


def read_out_gradient(
  x: jax.Array, gradient: jax.Array, kernel: jax.Array, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
  """Gradient of what was rectified and multiplied by a few columns.

  Args:
    x: the rectified rows (…, C); `suit_rows` says which, C in `MAP_CHANNELS`.
    gradient: (…, features) float32 of the product.
    kernel: (1, C, features) float32, the columns; 1 for `divide_batch`.
    interpret: whether to run without a GPU.

  Returns:
    (…, C) in the type of x, zero where x is, and sums of its rows (blocks, C)
    float32, taken before it was rounded.
  """
  shape, features = x.shape, kernel.shape[-1]
  x, gradient = flatten(x, gradient)
  rows, channels = x.shape
  blocks = pl.cdiv(rows, _READ_PIXELS)
  tile = pl.BlockSpec((_READ_PIXELS, MAP_CHANNELS), lambda j, i: (i, j))
  of_x, sums = pl.pallas_call(
    functools.partial(_read_out_gradient_kernel, rows=rows),
    grid=(channels // MAP_CHANNELS, blocks),
    in_specs=[
      tile,
      pl.BlockSpec((_READ_PIXELS, features), lambda j, i: (i, 0)),
      pl.BlockSpec((features, MAP_CHANNELS), lambda j, i: (0, j)),
    ],
    out_specs=(tile, pl.BlockSpec((1, MAP_CHANNELS), lambda j, i: (i, j))),
    out_shape=(
      jax.ShapeDtypeStruct(x.shape, x.dtype),
      jax.ShapeDtypeStruct((blocks, channels), jnp.float32),
    ),
    compiler_params=compiler_params(),
    name="read_out_gradient",
    interpret=interpret,
  )(x, gradient, kernel[0].T)
  return of_x.reshape(shape), sums
