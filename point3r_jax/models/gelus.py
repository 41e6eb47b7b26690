"""GELUs between the linear maps of an MLP."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from point3r_jax.models.compute import MULTIPLIED
from point3r_jax.models.gpus import HOPPER, compute_capability
from point3r_jax.models.linear import Factors, sum_blocks, sum_rows
from point3r_jax.models.partition import divide_batch
from point3r_jax.models.row_kernels import (
  gelu_gradient,
  gelu_slope,
  suit_rows,
)


def gelu(x: jax.Array) -> jax.Array:
  """Returns x·Φ(x), the GELU of any shape, in x's type.

  By erf: `jax.nn.gelu` takes erfc, two polynomials where this takes one, to
  keep digits of values around 1e-7 that are added to larger ones here.
  """
  # Float32 costs nothing in the kernel that reads the product.
  y = x.astype(jnp.float32)
  return (0.5 * y * (1.0 + jax.lax.erf(y * 0.5**0.5))).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def add_bias_gelu(y: jax.Array, bias: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Adds a bias (C,) to y (…, C) of the same type, and takes the GELU, x·Φ(x).

  In its form with tanh, off by 5e-4 at most, which is what rounding to bfloat16
  does to larger values. cuBLAS has it within the product before, even with a
  backward pass to come. There is no forward-mode derivative.

  Args:
    y: a product.
    bias: of it.
    dtype: to which the sum is rounded, and the result.
  """
  return _add_bias_gelu_forward(y, bias, dtype)[0]


def _add_bias_gelu_forward(y, bias, dtype):
  x = (y + bias).astype(dtype)
  return jax.nn.gelu(x, approximate=True), (x, bias)


def _add_bias_gelu_backward(dtype, saved, gradient):
  x, bias = saved
  if suit_rows(x.shape, dtype):
    of_x, sums = divide_batch(gelu_gradient)(x, gradient)
    of_bias = sum_blocks(sums)
  else:
    slope = gelu_slope(x.astype(jnp.float32))
    of_x = (slope * gradient.astype(jnp.float32)).astype(dtype)
    of_bias = sum_rows(of_x)
  return of_x.astype(bias.dtype), of_bias.astype(bias.dtype)


add_bias_gelu.defvjp(_add_bias_gelu_forward, _add_bias_gelu_backward)


def multiply_gelu(
  y: Factors,
  kernel: jax.Array,
  *,
  bias: jax.Array,
  dtype: jnp.dtype,
  keep: bool = True,
  **options: Any,
) -> jax.Array:
  """Multiplies a product's GELU, see `add_bias_gelu`, by a matrix.

  On Hopper GPUs, with a backward pass to come, the GELU is made within the
  product before, and its gradient within the product that it is of; in 16 bits
  products have no other precision.

  Args:
    y: (…, C).
    kernel: (C, K).
    bias: (C,) of y's type.
    dtype: to which the sum is rounded, and the GELU.
    keep: whether the GELU is kept for a backward pass, not made again.
    **options: of `jnp.matmul`.

  Returns:
    (…, K) of the type that the options say.
  """
  types = {y.preferred_element_type, options["preferred_element_type"], dtype}
  types |= {x.dtype for x in (y.x, y.kernel, kernel)}
  half = all(x == jnp.bfloat16 for x in types)
  if half and _suit_products(y.x, y.kernel, kernel):
    return _multiply_gelu(keep, y.x, y.kernel, bias, kernel)
  return jnp.matmul(add_bias_gelu(y.multiply(), bias, dtype), kernel, **options)


def _suit_products(x: jax.Array, first: jax.Array, second: jax.Array) -> bool:
  """Says whether there are kernels for an MLP of x with these matrices."""
  if compute_capability() != HOPPER:
    return False
  from point3r_jax.models.hopper_product import suits

  of_result = *x.shape[:-1], second.shape[1]
  return suits(x.shape, first.shape[1]) and suits(of_result, second.shape[0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply_gelu(keep, x, first, bias, second):
  del keep
  return add_bias_gelu(x @ first, bias, x.dtype) @ second


def _multiply_gelu_forward(keep, x, first, bias, second):
  from point3r_jax.models.hopper_gelus import product_gelu

  # A leading axis for `divide_batch`, as all devices have all of a matrix.
  hidden, y = divide_batch(product_gelu)(x, first[None], bias[None])
  y = checkpoint_name(y, MULTIPLIED)
  return hidden @ second, (x, first, y, hidden if keep else None, second)


def _multiply_gelu_backward(keep, saved, gradient):
  from point3r_jax.models.hopper_gelus import gelu_gradient_product

  x, first, y, hidden, second = saved
  if not keep:
    hidden = jax.nn.gelu(y, approximate=True)
  of_y, sums = divide_batch(gelu_gradient_product)(gradient, second[None], y)
  _, pull = jax.vjp(lambda second: hidden @ second, second)
  (of_second,) = pull(gradient)
  _, pull = jax.vjp(jnp.matmul, x, first)
  of_x, of_first = pull(of_y)
  return of_x, of_first, sum_blocks(sums).astype(y.dtype), of_second


_multiply_gelu.defvjp(_multiply_gelu_forward, _multiply_gelu_backward)
