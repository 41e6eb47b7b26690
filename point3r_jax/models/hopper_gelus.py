"""GELUs and their gradients within products, for NVIDIA's Hopper GPUs.

XLA takes cuBLAS's GELU within the product before it, though that is not as fast
as the product alone; but it has no call for its gradient within the product
that it is of. Apart from it the gradient would be read and written once more,
and so it would be for a bias, which it is summed for.
"""

from __future__ import annotations

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from point3r_jax.models.hopper import COLUMN, TILE
from point3r_jax.models.hopper_product import (
  BLOCKS,
  COMPUTING,
  DEPTH,
  HALF,
  SIDE,
  multiply_linear,
  multiply_tiles,
  run,
  run_linear,
  span,
)
from point3r_jax.models.row_kernels import GELU_CUBIC, GELU_SCALE


def _gelu(x: jax.Array) -> jax.Array:
  """The GELU of x float32, in its form with tanh, in few instructions.

  A GPU's own tanh is off by a two-thousandth.
  """
  half, cubic = 0.5 * x, GELU_SCALE * GELU_CUBIC
  return half * jnp.tanh(x * (cubic * (x * x) + GELU_SCALE)) + half


def _slope(x: jax.Array) -> jax.Array:
  """Derivative of `_gelu`, of x float32; `gelu_slope` takes more."""
  linear = GELU_SCALE * x
  inner = linear * (GELU_CUBIC * (x * x) + 1)
  tanh = jnp.tanh(inner)
  return (tanh * tanh - 1) * (linear - 1.5 * inner) + (0.5 * tanh + 0.5)


def _sum_rows(x: jax.Array, scratch: plgpu.SMEM) -> jax.Array:
  """Sums a tile's rows, by way of shared memory of the warpgroup's own.

  Pallas has one place for all warpgroups, which do not wait for each other.
  """

  @plgpu.inline_mgpu(
    arg_types=(TILE, plgpu.RefType()),
    return_type=plgpu.ShapeDtypeStruct(x.shape[1:], x.dtype, layout=COLUMN),
  )
  def run(_, x, scratch):
    return x.reduce("add", 0, scratch)

  return run(x, scratch)


def _gelu_kernel(x, kernel, bias, result, product, *, result_tiles, **own):
  """Multiplies rows x, adds the bias, and takes the GELU.

  References in global memory, then room for half of a tile's results for each
  warpgroup.
  """

  def finish(tile):
    for number in range(2):
      half = tile.half(number)
      for value, to in ((half, product), (_gelu(half), result)):
        tile.send(value, number, result_tiles, [to])

  multiply_linear(x, kernel, bias, finish, **own)


def _gelu_gradient_kernel(
  gradient, kernel, x, result, sums, *, result_tiles, scratch, **own
):
  """Multiplies rows of a gradient, and by slopes at x; sums tiles' rows.

  References in global memory, then for each warpgroup: room for half of a
  tile's results, and for what is summed.
  """

  def last(row, column):
    return tuple(x.at[span(row), span(column, number)] for number in range(2))

  def finish(tile):
    for number, x_half in enumerate(tile.last):
      half = tile.half(number) * _slope(x_half.astype(jnp.float32))
      tile.send(half, number, result_tiles, [result])
      total = _sum_rows(half, scratch.at[tile.warpgroup])
      sums[tile.row, span(tile.column, number)] = total

  def columns(column, depth):
    return kernel.at[span(column), depth]

  across = kernel.shape[0] // SIDE
  multiply_tiles(
    gradient, across, columns, finish, last=last, transposed=True, **own
  )


# Calls of like shapes share what takes seconds to compile.
@jax.jit
def product_gelu(
  x: jax.Array, kernel: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The GELU, in its form with tanh, of a product and a bias.

  Args:
    x: (…, K) bfloat16; `suits` says which.
    kernel: (1, K, C) of the same type; 1 for `divide_batch`.
    bias: (1, C) of the same type.

  Returns:
    (…, C) in their type, and x·kernel + bias, the same.
  """
  _, depth, columns = kernel.shape
  shape = *x.shape[:-1], columns
  x = x.reshape(-1, depth)
  result = jax.ShapeDtypeStruct((len(x), columns), x.dtype)
  results = run_linear(_gelu_kernel, (x, kernel[0], bias[0]), (result, result))
  return tuple(x.reshape(shape) for x in results)


@jax.jit
def gelu_gradient_product(
  gradient: jax.Array, kernel: jax.Array, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Gradient of what a GELU was taken of, whose result was multiplied.

  Args:
    gradient: (…, K) bfloat16 of the product GELU(x)·kernel; `suits` says
      which.
    kernel: (1, C, K) of the same type; 1 for `divide_batch`.
    x: (…, C) of the same type.

  Returns:
    (…, C) in their type, and sums of its rows (blocks, C) float32, taken before
    it was rounded.
  """
  shape, depth, columns = x.shape, gradient.shape[-1], x.shape[-1]
  gradient, x = gradient.reshape(-1, depth), x.reshape(-1, columns)
  blocks = BLOCKS * pl.cdiv(len(x), BLOCKS * SIDE)
  of_x, sums = run(
    _gelu_gradient_kernel,
    (gradient, kernel[0], x),
    columns,
    (SIDE, DEPTH),
    (
      jax.ShapeDtypeStruct(x.shape, x.dtype),
      jax.ShapeDtypeStruct((blocks, columns), jnp.float32),
    ),
    # For each warp what it has summed.
    scratch=plgpu.SMEM((COMPUTING, 4 * HALF), jnp.float32),
  )
  return of_x.reshape(shape), sums
