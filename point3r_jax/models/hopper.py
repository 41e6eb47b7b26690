"""What our kernels for NVIDIA's Hopper GPUs (compute capability 9) share."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

# Of the largest Hopper GPUs, if the device is none.
_MULTIPROCESSORS = 132

# How threads hold what matrix units give, and one value for each column of it.
TILE = plgpu.Layout.WGMMA
COLUMN = TILE.reduce(0)
COMPILER = plgpu.CompilerParams(
  approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
)


def divide(x: jax.Array, by: int) -> tuple[jax.Array, jax.Array]:
  """Returns quotient and remainder of an int32 that is not negative.

  For kernels, which take up to twice as long to lower with `//` and `%`.
  """
  return lax.div(x, jnp.int32(by)), lax.rem(x, jnp.int32(by))


def divide_up(x: jax.Array, by: int) -> jax.Array:
  """Returns the quotient, rounded up, of an int32 that is not negative."""
  return divide(x + (by - 1), by)[0]


def slot(number: jax.Array, places: int) -> jax.Array:
  """Returns which of places that are taken in turn is that of a number."""
  return lax.rem(number, jnp.int32(places))


def multiprocessors() -> int:
  """Returns how many multiprocessors there are."""
  return getattr(jax.devices()[0], "core_count", _MULTIPROCESSORS)


def tile_channels(channels: int, bits: int, swizzle: int | None = None) -> int:
  """Returns how many channels a row of a tile has; see `shared_tiles`."""
  return 8 * (swizzle or plgpu.find_swizzle(channels * bits)) // bits


def shared_tiles(
  shape: tuple[int, ...], dtype: jnp.dtype, swizzle: int | None = None
) -> plgpu.SMEM:
  """Returns shared memory that matrix units can read.

  Args:
    shape: of all tiles, the last two axes of one.
    dtype: of 16 bits.
    swizzle: bytes of a row within which these are exchanged; None: as many as
      divide it.
  """
  bits = jnp.finfo(dtype).bits
  channels = tile_channels(shape[-1], bits, swizzle)
  tiling = plgpu.TilingTransform((8, channels))
  swizzling = plgpu.SwizzleTransform(channels * bits // 8)
  return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzling))


def bind(kernel: Callable[..., None], **options) -> Callable[..., None]:
  """Returns a kernel with options, which profiles show under its name."""
  bound = functools.partial(kernel, **options)
  return functools.update_wrapper(bound, kernel, ("__name__",), ())


def barriers(number: int, arrivals: int = 1) -> plgpu.Barrier:
  """Returns barriers that so many arrivals open."""
  return plgpu.Barrier(num_barriers=number, num_arrivals=arrivals)
