"""Linear maps, whose gradients are summed by matrix products."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

# Rows that are summed at once for the gradient of a weight, best ones first.
_ROWS = (*range(512, 63, -8), *range(520, 1025, 8))


def _rows_at_once(rows: int) -> int | None:
  """Returns how many of so many rows to sum at once, if they can be divided."""
  return next((n for n in _ROWS if rows % n == 0), None)


def sum_products(x: jax.Array, y: jax.Array) -> jax.Array:
  """Sums products over rows: x (…, K), y (…, n) to xᵀ·y (K, n) float32.

  For small K and n: as many products as there are blocks of rows, and their
  sum, where one product would leave most of a GPU idle.
  """
  x, y = (z.reshape(-1, z.shape[-1]) for z in (x, y))
  rows = _rows_at_once(x.shape[0]) or x.shape[0]
  x, y = (z.reshape(-1, rows, z.shape[-1]) for z in (x, y))
  parts = jnp.einsum("brk,brn->bkn", x, y, preferred_element_type=jnp.float32)
  return parts.sum(axis=0)


def _sum_rows(x: jax.Array) -> jax.Array:
  """Sums x (…, C) over all but its last axis, to (C,) float32.

  By a matrix product with ones, eight rows of them, as kernels want it. XLA
  joins a sum over rows with the kernels that make them and then runs all of it
  on as many blocks as the sum has: one in ten of what a GPU has room for.
  """
  x = x.reshape(-1, x.shape[-1])
  rows = _rows_at_once(x.shape[0])
  if rows is None:
    return x.sum(axis=0, dtype=jnp.float32)
  ones = jnp.ones((x.shape[0] // rows, 8, rows), x.dtype)
  sums = jnp.matmul(
    ones,
    x.reshape(-1, rows, x.shape[-1]),
    preferred_element_type=jnp.float32,
  )
  return sums[:, 0].sum(axis=0)


def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
  """Adds a bias (C,) to y (…, C) of the same type.

  In 16 bits the gradient of the bias is summed by a matrix product, and there
  is no forward-mode derivative.
  """
  return y + bias if y.dtype == jnp.float32 else _add_bias(y, bias)


@jax.custom_vjp
def _add_bias(y, bias):
  return y + bias


def _add_bias_forward(y, bias):
  return y + bias, None


def _add_bias_backward(_, gradient):
  return gradient, _sum_rows(gradient).astype(gradient.dtype)


_add_bias.defvjp(_add_bias_forward, _add_bias_backward)


class Linear(nn.Module):
  """A linear map of the last axis, (…, in) to (…, features).

  Attributes:
    features: output channels.
    dtype: type of operands.
    precision: of the product; None: as the policy has it for float32.
    result: type of the result; None: as the operands.
    sums: type in which products are summed; None: as the result.
  """

  features: int
  dtype: jnp.dtype
  precision: str | None = None
  result: jnp.dtype | None = None
  sums: jnp.dtype | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x (…, in) to (…, features)."""
    zeros = nn.initializers.zeros
    kernel = self.param("kernel", zeros, (x.shape[-1], self.features))
    bias = self.param("bias", zeros, (self.features,))
    result = self.result or self.dtype
    sums = self.sums or result
    x, kernel = promote_dtype(x, kernel, dtype=self.dtype)
    y = jnp.matmul(
      x, kernel, precision=self.precision, preferred_element_type=sums
    )
    bias = bias.astype(result).astype(sums)  # Rounded, as `cast_params` does.
    return add_bias(y, bias).astype(result)
