"""The layers of blocks: MLPs and attention, with their linear maps."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from point3r_jax.models.compute import Compute
from point3r_jax.models.gelus import gelu, multiply_gelu
from point3r_jax.models.linear import (
  Factors,
  Finish,
  Linear,
  leave_apart,
)
from point3r_jax.models.parts import Part, take_apart
from point3r_jax.models.rotary import RotaryTable


class Mlp(nn.Module):
  """Linear, GELU, Linear.

  Attributes:
    hidden: channels between the two.
    features: output channels.
    dtype: type of the products' operands.
    precision: see `Linear`.
    result: see `Linear`.
    exact: whether the GELU is, or in its form with tanh, see
      `gelus.add_bias_gelu`.
    sums: see `Linear`.
    finish: of the last map, see `Linear`.
    keep: whether the GELU is kept for a backward pass, see `multiply_gelu`.
  """

  hidden: int
  features: int
  dtype: jnp.dtype
  precision: str | None = None
  result: jnp.dtype | None = None
  exact: bool = True
  sums: jnp.dtype | None = None
  finish: Finish | None = None
  keep: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x (…, in) to (…, features)."""
    hidden = Linear(
      self.hidden, self.dtype, self.precision, sums=self.sums, name="hidden"
    )
    output = Linear(
      self.features,
      self.dtype,
      self.precision,
      self.result,
      self.sums,
      name="output",
    )
    if self.exact:
      return output(gelu(hidden(x)), self.finish)
    y, bias = hidden(x, leave_apart, Factors)
    multiply = functools.partial(
      multiply_gelu, bias=bias, dtype=self.dtype, keep=self.keep
    )
    return output(y, self.finish, multiply)


def attending(
  compute: Compute, x: jax.Array, parts: Sequence[Part], name: str
) -> list[jax.Array]:
  """Computes what attends of x (B, N, D), by linear maps in one product.

  Args:
    compute: precision, and whether a backward pass is to come.
    x: what they read.
    parts: which there are, of D channels each.
    name: of the product's parameters.

  Returns:
    See `parts.take_apart`.
  """
  linear = Linear(
    len(parts) * x.shape[-1],
    compute.dtype,
    sums=compute.inner_sums,
    name=name,
  )
  finish = functools.partial(
    take_apart, parts=parts, forward_only=compute.forward_only
  )
  return linear(x, finish, Factors)


def _projection(compute: Compute, width: int, result: jnp.dtype) -> Linear:
  """Returns the last map of an attention."""
  return Linear(
    width,
    compute.dtype,
    result=result,
    sums=compute.inner_sums,
    name="projection",
  )


def query_key_value(heads: int, rotary: RotaryTable | None) -> list[Part]:
  """Returns the linear maps of what attends within itself."""
  return [Part(heads, rotary), *key_value(heads, rotary)]


def key_value(heads: int, rotary: RotaryTable | None) -> list[Part]:
  """Returns the linear maps of what is attended to."""
  return [Part(heads, rotary), Part(heads, value=True)]


class SelfAttention(nn.Module):
  """Multi-head self-attention with a fused query-key-value projection.

  Attributes:
    heads: of which there are.
    compute: precision and kernels.
    result: type of the result.
    finish: of the last map, see `Linear`.
    alike: whether all tokens are alike: then the first is key enough for all.
  """

  heads: int
  compute: Compute
  result: jnp.dtype
  finish: Finish | None = None
  alike: bool = False

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    rotary: RotaryTable | None = None,
    length: jax.Array | None = None,
    taken: Sequence[jax.Array] | None = None,
  ) -> jax.Array:
    """Attends within x.

    Args:
      x: (B, N, D).
      rotary: table of the N positions, or None.
      length: (B,) valid prefix of x, or None for all.
      taken: what `attending` gives of `query_key_value`, maybe the first parts
        of more; None: it is computed here.

    Returns:
      (B, N, D).
    """
    compute = self.compute
    if taken is None:
      parts = query_key_value(self.heads, rotary)
      taken = attending(compute, x, parts, "qkv")
    query, key, value = taken
    # Values that stay are behind queries and keys, others start at 0.
    value_head = min(2 * self.heads, value.shape[2] - self.heads)
    if self.alike:
      key, value = key[:, :1], value[:, :1]
    y = compute.attend(query, key, value, length, length, value_head)
    projection = _projection(compute, x.shape[-1], self.result)
    return projection(y.reshape(x.shape), self.finish)


class CrossAttention(nn.Module):
  """Multi-head cross-attention; `params` may join keys' and values' maps.

  Attributes:
    heads: of which there are.
    compute: precision and kernels.
    result: type of the result.
    finish: of the last map, see `Linear`.
  """

  heads: int
  compute: Compute
  result: jnp.dtype
  finish: Finish | None = None

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    context: jax.Array,
    rotary: RotaryTable | None = None,
    context_rotary: RotaryTable | None = None,
    length: jax.Array | None = None,
    context_length: jax.Array | None = None,
    taken: Sequence[jax.Array] | None = None,
  ) -> jax.Array:
    """Attends from x to the context.

    Args:
      x: (B, N, D) gives the queries.
      context: (B, M, D) gives keys and values.
      rotary: table of the queries' positions, or None.
      context_rotary: table of the keys' positions, or None.
      length: (B,) valid prefix of x, or None for all.
      context_length: (B,) valid prefix of the context, or None for all.
      taken: what `attending` gives of `key_value`, maybe the last parts of
        more; None: it is computed here.

    Returns:
      (B, N, D).
    """
    compute, heads = self.compute, self.heads
    (query,) = attending(compute, x, [Part(heads, rotary)], "query")
    if taken is None:
      of_key, of_value = parts = key_value(heads, context_rotary)
      if self.has_variable("params", "key_value"):
        taken = attending(compute, context, parts, "key_value")
      else:
        taken = (
          *attending(compute, context, [of_key], "key"),
          *attending(compute, context, [of_value], "value"),
        )
    key, value = taken
    # Values that stay are the product's last part, others start at 0.
    value_head = value.shape[2] - heads
    y = compute.attend(query, key, value, length, context_length, value_head)
    projection = _projection(compute, x.shape[-1], self.result)
    return projection(y.reshape(x.shape), self.finish)
