"""LayerNorms, with parameters and without."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from point3r_jax.models.compute import NORMED, Compute
from point3r_jax.models.layouts import row_major
from point3r_jax.models.partition import divide_batch
from point3r_jax.models.row_kernels import (
  normalize_rows,
  normalize_rows_gradient,
  suit_rows,
)

_EPSILON = 1e-6  # Of all LayerNorms.


def layer_norm(
  compute: Compute, name: str | None = None, affine: bool = True
) -> nn.LayerNorm:
  """LayerNorm with ε = 1e-6, in and out of float32.

  XLA makes this one kernel on GPUs if the variance is E[(x − E[x])²]. With a
  backward pass to come, E[x²] − E[x]² takes fewer; its error is far below that
  of rounded products.
  """
  return nn.LayerNorm(
    epsilon=_EPSILON,
    dtype=jnp.float32,
    use_scale=affine,
    use_bias=affine,
    use_fast_variance=not compute.forward_only and compute.dtype != jnp.float32,
    name=name,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _normalize(x, dtype):
  """LayerNorm (…, C) without an affine map, rounded to a type, and x itself.

  So that gradients of both are added where the norm's is made.
  """
  return _normalize_forward(x, dtype)[0]


def _normalize_forward(x, dtype):
  if suit_rows(x.shape, dtype):
    y, scale = divide_batch(
      functools.partial(normalize_rows, dtype=dtype, epsilon=_EPSILON)
    )(x)
  else:
    # On GPUs XLA would lay channels out before tokens, and copy to and fro.
    x = row_major(x)
    wide = x.astype(jnp.float32)
    mean = wide.mean(axis=-1, keepdims=True)
    square = jnp.square(wide).mean(axis=-1, keepdims=True)
    variance = jnp.maximum(square - jnp.square(mean), 0)
    scale = jax.lax.rsqrt(variance + _EPSILON)
    # Or XLA would keep x to make y again, and copy it to add to it.
    y, scale = jax.lax.optimization_barrier(
      (((wide - mean) * scale).astype(dtype), scale[..., 0])
    )
  y, scale = checkpoint_name(y, NORMED), checkpoint_name(scale, NORMED)
  return (y, x), (y, scale)


def _normalize_backward(dtype, saved, gradients):
  y, scale = saved
  gradient, residual = gradients
  if suit_rows(y.shape, dtype):
    rows_gradient = divide_batch(normalize_rows_gradient)
    return (rows_gradient(y, scale, gradient, residual),)
  y, gradient = y.astype(jnp.float32), gradient.astype(jnp.float32)
  mean = gradient.mean(axis=-1, keepdims=True)
  slope = (gradient * y).mean(axis=-1, keepdims=True)
  of_x = scale[..., None] * (gradient - mean - y * slope)
  return ((residual.astype(jnp.float32) + of_x).astype(residual.dtype),)


_normalize.defvjp(_normalize_forward, _normalize_backward)


def normalize(compute: Compute, x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """LayerNorm of x (…, C) without an affine map, for a linear map.

  Computed in float32. In training its result is of the policy's type, otherwise
  float32.

  Returns:
    The normalised x, and x to go on with: in training the gradients of both are
    then added up in one kernel.
  """
  if compute.forward_only or compute.dtype == jnp.float32:
    return layer_norm(compute, affine=False)(x), x
  return _normalize(x, compute.dtype)
