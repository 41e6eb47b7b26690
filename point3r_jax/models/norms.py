"""LayerNorms, with parameters and without."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from point3r_jax.models.compute import NORMED, Compute
from point3r_jax.models.layouts import row_major
from point3r_jax.models.linear import sum_blocks, sum_rows
from point3r_jax.models.parameter import parameter
from point3r_jax.models.partition import divide_batch
from point3r_jax.models.row_kernels import (
  normalize_rows,
  normalize_rows_gradient,
  suit_rows,
)

_EPSILON = 1e-6  # Of all LayerNorms.


@jax.custom_vjp
def _map_affine(x, scale, bias):
  """Maps x (…, C) by a scale (C,) and a bias (C,), all float32."""
  return x * scale + bias


def _map_affine_forward(x, scale, bias):
  return _map_affine(x, scale, bias), (x, scale)


def _map_affine_backward(saved, gradient):
  x, scale = saved
  return gradient * scale, sum_rows(gradient * x), sum_rows(gradient)


_map_affine.defvjp(_map_affine_forward, _map_affine_backward)


class _AffineNorm(nn.Module):
  """LayerNorm whose parameters' gradients are summed as GPUs do it fastest."""

  compute: Compute

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises x (…, C), in float32."""
    scale = parameter(self, "scale", x.shape[-1:])
    bias = parameter(self, "bias", x.shape[-1:])
    return _map_affine(layer_norm(self.compute, affine=False)(x), scale, bias)


def layer_norm(
  compute: Compute, name: str | None = None, affine: bool = True
) -> nn.Module:
  """LayerNorm with ε = 1e-6, in and out of float32.

  XLA makes this one kernel on GPUs if the variance is E[(x − E[x])²]. With a
  backward pass to come, E[x²] − E[x]² takes fewer; its error is far below that
  of rounded products.
  """
  if affine and compute.trains_in_16_bits:
    return _AffineNorm(compute, name=name)
  return nn.LayerNorm(
    epsilon=_EPSILON,
    dtype=jnp.float32,
    use_scale=affine,
    use_bias=affine,
    use_fast_variance=compute.trains_in_16_bits,
    name=name,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _normalize(x, biases, dtype):
  """LayerNorm (…, C) without an affine map, rounded to a type, and x itself.

  So that gradients of both are added where the norm's is made, and summed for
  the biases (C,) before and after, or None.
  """
  return _normalize_forward(x, biases, dtype)[0]


def _normalize_forward(x, biases, dtype):
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
  return (y, x), (y, scale, biases)


def _normalize_backward(dtype, saved, gradients):
  *normed, biases = saved
  wanted = tuple(bias is not None for bias in biases)
  kernels = suit_rows(normed[0].shape, dtype)
  gradient = _gradient_by_kernel if kernels else _gradient_by_xla
  of_x, sums = gradient(*normed, *gradients, wanted)
  leaves, structure = jax.tree.flatten(biases)
  of_biases = [
    total.astype(bias.dtype) for total, bias in zip(sums, leaves, strict=True)
  ]
  return of_x, structure.unflatten(of_biases)


def _gradient_by_kernel(y, scale, gradient, residual, wanted):
  """Returns the gradient of x and the sums (C,) of it, of the residual's."""
  kernel = functools.partial(normalize_rows_gradient, wanted=wanted)
  of_x, sums = divide_batch(kernel)(y, scale, gradient, residual)
  return of_x, [total for x in sums for total in sum_blocks(x)]


def _gradient_by_xla(y, scale, gradient, residual, wanted):
  """The same without kernels."""
  y, gradient = y.astype(jnp.float32), gradient.astype(jnp.float32)
  mean = gradient.mean(axis=-1, keepdims=True)
  slope = (gradient * y).mean(axis=-1, keepdims=True)
  of_x = scale[..., None] * (gradient - mean - y * slope)
  of_x = (residual.astype(jnp.float32) + of_x).astype(residual.dtype)
  both = zip((of_x, residual), wanted, strict=True)
  return of_x, [sum_rows(x) for x, want in both if want]


_normalize.defvjp(_normalize_forward, _normalize_backward)


def normalize(
  compute: Compute,
  x: jax.Array,
  before: jax.Array | None = None,
  after: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """LayerNorm of x (…, C) without an affine map, for a linear map.

  Computed in float32. In training its result is of the policy's type, otherwise
  float32.

  Of biases only the gradients are made here, in training in 16 bits: sums over
  rows of what the norm's gradient reads and writes anyway. They are right if x
  is read by this norm alone, and x to go on with by the sum alone; who adds
  them adds constants (`linear.add_constant`).

  Args:
    compute: precision, and whether a backward pass is to come.
    x: what is normalised.
    before: a bias (C,) that was added to make x, or None.
    after: one that will be added to x to go on with, or None.

  Returns:
    The normalised x, and x to go on with: in training the gradients of both are
    then added up in one kernel.
  """
  if not compute.trains_in_16_bits:
    return layer_norm(compute, affine=False)(x), x
  return _normalize(x, (before, after), compute.dtype)
