"""Linear maps, whose gradients are summed as GPUs do it fastest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from point3r_jax.models.parameter import parameter

# How many rows may be summed at once for the gradient of a weight.
_ROWS = range(64, 1025, 8)


def _rows_at_once(rows: int, about: int) -> int | None:
  """Returns how many of so many rows to sum at once, if they can be divided."""
  divisors = [n for n in _ROWS if rows % n == 0]
  return min(divisors, key=lambda n: abs(n - about), default=None)


def sum_products(x: jax.Array, y: jax.Array) -> jax.Array:
  """Sums products over rows: x (…, K), y (…, n) to xᵀ·y (K, n) float32.

  For small K and n: as many products as there are blocks of rows, and their
  sum, where one product would leave most of a GPU idle.
  """
  x, y = (z.reshape(-1, z.shape[-1]) for z in (x, y))
  rows = _rows_at_once(x.shape[0], 512) or x.shape[0]
  x, y = (z.reshape(-1, rows, z.shape[-1]) for z in (x, y))
  parts = jnp.einsum("brk,brn->bkn", x, y, preferred_element_type=jnp.float32)
  return parts.sum(axis=0)


def sum_rows(x: jax.Array) -> jax.Array:
  """Sums x (…, C) over all but its last axis, to (C,) float32.

  In two steps, apart from each other and from what makes x. XLA would join them
  and run all of it on as many blocks as the sum has: one in ten of what a GPU
  has room for.
  """
  x = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]))
  rows = _rows_at_once(x.shape[0], 256) or x.shape[0]
  x = x.reshape(-1, rows, x.shape[-1]).sum(axis=1, dtype=jnp.float32)
  return sum_blocks(x)


def sum_blocks(sums: jax.Array) -> jax.Array:
  """Sums what kernels have summed over blocks of rows, (blocks, …)."""
  return jax.lax.optimization_barrier(sums).sum(axis=0)


def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
  """Adds a bias (C,) to y (…, C) of the same type.

  In 16 bits the gradient of the bias is summed in two steps, and there is no
  forward-mode derivative.
  """
  return y + bias if y.dtype == jnp.float32 else _add_bias(y, bias)


@jax.custom_vjp
def _add_bias(y, bias):
  return y + bias


def _add_bias_forward(y, bias):
  return y + bias, None


def _add_bias_backward(_, gradient):
  return gradient, sum_rows(gradient).astype(gradient.dtype)


_add_bias.defvjp(_add_bias_forward, _add_bias_backward)


def add_constant(y: jax.Array, bias: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Adds a bias whose gradient is made elsewhere, see `norms.normalize`.

  Args:
    y: (…, C), a product.
    bias: (C,) of y's type.
    dtype: to which the sum is rounded.
  """
  return (y + jax.lax.stop_gradient(bias)).astype(dtype)


class Factors(NamedTuple):
  """A product that is yet to be made, with options of `jnp.matmul`.

  Attributes:
    x: (…, K).
    kernel: (K, C).
    preferred_element_type: of the product.
    precision: of it.
  """

  x: jax.Array
  kernel: jax.Array
  preferred_element_type: jnp.dtype
  precision: str | None = None

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape (…, C) of the product."""
    return *self.x.shape[:-1], self.kernel.shape[-1]

  def multiply(self) -> jax.Array:
    """Makes it."""
    return jnp.matmul(
      self.x,
      self.kernel,
      precision=self.precision,
      preferred_element_type=self.preferred_element_type,
    )


def leave_apart(
  y: jax.Array | Factors, bias: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array | Factors, jax.Array]:
  """Leaves a product and its bias to what comes next, see `Finish`."""
  del dtype
  return y, bias


# Makes a linear map's result of a product (…, C), a bias (C,) of the same type
# and the type that their sum is rounded to.
Finish = Callable[[jax.Array, jax.Array, jnp.dtype], Any]


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
  def __call__(
    self,
    x: jax.Array | Factors,
    finish: Finish | None = None,
    multiply: Callable[..., Any] = jnp.matmul,
  ) -> Any:
    """Maps x (…, in) to (…, features), or to what `finish` makes of that.

    Args:
      x: what is mapped.
      finish: instead of adding the bias.
      multiply: as `jnp.matmul` does, maybe with what is made of x before.
    """
    kernel = parameter(self, "kernel", (x.shape[-1], self.features))
    bias = parameter(self, "bias", (self.features,))
    result = self.result or self.dtype
    sums = self.sums or result
    if not isinstance(x, Factors):
      x = x.astype(self.dtype)
    y = multiply(
      x,
      kernel.astype(self.dtype),
      precision=self.precision,
      preferred_element_type=sums,
    )
    bias = bias.astype(result).astype(sums)  # Rounded, as `cast_params` does.
    if finish is not None:
      return finish(y, bias, result)
    return add_bias(y, bias).astype(result)
