"""Linear maps that are one product: taken apart, queries and keys rotated."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp

from point3r_jax.models.gpus import HOPPER, compute_capability
from point3r_jax.models.linear import Factors, add_bias, sum_blocks
from point3r_jax.models.partition import divide_batch
from point3r_jax.models.rotary import RotaryTable, apply_rotary
from point3r_jax.models.rotary_kernels import join_gradients
from point3r_jax.models.row_kernels import suit_rows

# So many fill a Hopper GPU with the tiles of a product.
_MANY_ROWS = 1024


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
  y: jax.Array | Factors,
  bias: jax.Array,
  dtype: jnp.dtype,
  *,
  parts: Sequence[Part],
  forward_only: bool = False,
) -> list[jax.Array]:
  """Finishes a product of P parts, see `linear.Finish`.

  On GPUs that have the kernel for its gradient (`suit_rows`), tables get none.
  In 16 bits there is no forward-mode derivative. Hopper GPUs take a product
  that is yet to be made apart as they make it.

  Args:
    y: (B, N, P·D), the parts one after the other.
    bias: (P·D,) of y's type, to be added.
    dtype: to which the sum is rounded.
    parts: what they are.
    forward_only: whether no backward pass is to come: then values may stay
      where they are.

  Returns:
    Each part (B, N, heads, d), rotated. Values that stay are all of the product
    (B, N, P·heads, d).
  """
  parts = tuple(parts)
  if isinstance(y, Factors):
    if _suit_product(y, dtype, parts, forward_only):
      forms, tables = _number_tables(parts)
      return _multiply_apart(forms, y.x, y.kernel, bias, tables)
    y = y.multiply()
  if not forward_only and y.dtype == dtype and suit_rows(y.shape, dtype):
    return _take_apart(y, bias, parts)
  return _rotated_parts(add_bias(y, bias).astype(dtype), parts, forward_only)


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
  return *_join(gradients, [part.rotary for part in parts]), None


def _join(
  gradients: Sequence[jax.Array], tables: Sequence[RotaryTable | None]
) -> tuple[jax.Array, jax.Array]:
  """Returns gradients of the product that parts are of, and of its bias."""
  of_y, sums = divide_batch(join_gradients)(gradients, tables)
  return of_y, sum_blocks(sums).astype(of_y.dtype)


_take_apart.defvjp(_take_apart_forward, _take_apart_backward)


def _suit_product(
  y: Factors, dtype: jnp.dtype, parts: Sequence[Part], forward_only: bool
) -> bool:
  """Says whether the kernel is for a product of these parts.

  Without a backward pass to come it is for many rows of which it rotates some:
  otherwise XLA's kernel for what is to be rotated is as fast.
  """
  types = y.x.dtype, y.kernel.dtype, y.preferred_element_type, dtype
  if not all(x == jnp.bfloat16 for x in types):
    return False
  if compute_capability() != HOPPER or not suit_rows(y.shape, dtype):
    return False
  from point3r_jax.models.hopper_parts import rotates, suit_parts

  if not suit_parts(y.x.shape, y.kernel.shape[1], len(parts)):
    return False
  many = math.prod(y.shape[:-1]) >= _MANY_ROWS
  tables = (part.rotary for part in parts if part.rotary is not None)
  return not forward_only or (many and any(map(rotates, tables)))


def _number_tables(
  parts: Sequence[Part],
) -> tuple[tuple[tuple[int, int | None], ...], list[RotaryTable]]:
  """Returns each part's heads and number of its table, and the tables."""
  tables, forms = [], []
  for part in parts:
    number = None
    if part.rotary is not None:
      same = [i for i, table in enumerate(tables) if table is part.rotary]
      tables += [] if same else [part.rotary]
      number = same[0] if same else len(tables) - 1
    forms.append((part.heads, number))
  return tuple(forms), tables


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply_apart(forms, x, kernel, bias, tables):
  from point3r_jax.models.hopper_parts import product_parts

  # A leading axis for `divide_batch`, as all devices have all of a matrix.
  multiply = divide_batch(functools.partial(product_parts, forms=forms))
  return multiply(x, kernel[None], bias[None], tables)


def _multiply_apart_forward(forms, x, kernel, bias, tables):
  taken = _multiply_apart(forms, x, kernel, bias, tables)
  return taken, (x, kernel, tables)


def _multiply_apart_backward(forms, saved, gradients):
  x, kernel, tables = saved
  of_each = [None if number is None else tables[number] for _, number in forms]
  of_y, of_bias = _join(gradients, of_each)
  _, pull = jax.vjp(jnp.matmul, x, kernel)
  return *pull(of_y), of_bias, None


_multiply_apart.defvjp(_multiply_apart_forward, _multiply_apart_backward)
