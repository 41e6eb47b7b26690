"""Linear maps that are one product: taken apart, queries and keys rotated."""

from __future__ import annotations

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp

from point3r_jax.models.linear import add_bias, sum_blocks
from point3r_jax.models.partition import divide_batch
from point3r_jax.models.rotary import RotaryTable, apply_rotary
from point3r_jax.models.rotary_kernels import join_gradients
from point3r_jax.models.row_kernels import suit_rows


@flax.struct.dataclass
class Part:
  """One of several linear maps of the same width that are one product.

  Attributes:
    heads: of attention.
    rotary: table of the tokens' positions to rotate queries or keys by, or
      None.
    value: whether these are values.
  """

  heads: int = flax.struct.field(pytree_node=False)
  rotary: RotaryTable | None = None
  value: bool = flax.struct.field(pytree_node=False, default=False)


def take_apart(
  y: jax.Array,
  bias: jax.Array,
  dtype: jnp.dtype,
  *,
  parts: Sequence[Part],
  values_stay: bool = False,
) -> list[jax.Array]:
  """Finishes a product of P parts, see `linear.Finish`.

  On GPUs that have the kernel for its gradient (`suit_rows`), tables get none.
  In 16 bits there is no forward-mode derivative.

  Args:
    y: (B, N, P·D), the parts one after the other.
    bias: (P·D,) of y's type, to be added.
    dtype: to which the sum is rounded.
    parts: what they are.
    values_stay: whether values are left where they are, for attention without a
      backward pass.

  Returns:
    Each part (B, N, heads, d), rotated. Values that stay are all of the product
    (B, N, P·heads, d).
  """
  parts = tuple(parts)
  if not values_stay and y.dtype == dtype and suit_rows(y.shape, dtype):
    return _take_apart(y, bias, parts)
  return _rotated_parts(add_bias(y, bias).astype(dtype), parts, values_stay)


def _rotated_parts(
  y: jax.Array, parts: Sequence[Part], values_stay: bool = False
) -> list[jax.Array]:
  tokens, count = y.shape[:2], len(parts)
  # Along an axis of parts, whose gradients are joined then, not added.
  split = jnp.split(y.reshape(*tokens, count, -1), count, axis=2)
  taken = []
  for part, x in zip(parts, split, strict=True):
    if part.value and values_stay:
      taken.append(y.reshape(*tokens, count * part.heads, -1))
    else:
      x = x.reshape(*tokens, part.heads, -1)
      taken.append(apply_rotary(x, part.rotary))
  return taken


@jax.custom_vjp
def _take_apart(y, bias, parts):
  return _rotated_parts(y + bias, parts)


def _take_apart_forward(y, bias, parts):
  return _take_apart(y, bias, parts), parts


def _take_apart_backward(parts, gradients):
  tables = [part.rotary for part in parts]
  of_y, sums = divide_batch(join_gradients)(gradients, tables)
  return of_y, sum_blocks(sums).astype(of_y.dtype), None


_take_apart.defvjp(_take_apart_forward, _take_apart_backward)
