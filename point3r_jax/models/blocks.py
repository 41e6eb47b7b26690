"""Transformer blocks, as all parts of the model have them."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from point3r_jax.models.compute import Compute
from point3r_jax.models.layers import CrossAttention, Mlp, SelfAttention
from point3r_jax.models.linear import Finish, Linear, add_constant
from point3r_jax.models.norms import layer_norm, normalize
from point3r_jax.models.parameter import parameter
from point3r_jax.models.rotary import RotaryTable

# The linear maps around the MLP's norm where a self-attention is before it.
_ATTENTION_AND_MLP = {
  "before": ("attention", "projection"),
  "after": ("mlp", "output"),
}


def _is_affine(block: nn.Module, name: str) -> bool:
  """Says whether a block's norm has an affine map of its own.

  `params.fold_norms` may have made it a part of the linear map behind.
  """
  own = block.get_variable("params", name, {})
  return block.is_initializing() or "scale" in own


def _biases(
  block: nn.Module, norm: str, **paths: tuple[str, str]
) -> tuple[Finish | None, dict[str, jax.Array]]:
  """Leaves gradients of biases to a block's norm, where it can make them.

  Args:
    block: has the norm, and the parts with the linear maps.
    norm: its name.
    **paths: the linear maps whose biases `normalize` is to be given, by its
      name for them: part of the block, and name there.

  Returns:
    How these linear maps are to be finished, and what `normalize` is given.
  """
  if _is_affine(block, norm) or not block.compute.trains_in_16_bits:
    return None, {}
  biases = {
    place: block.get_variable("params", part)[name]["bias"]
    for place, (part, name) in paths.items()
  }
  return add_constant, biases


def _norm(
  block: nn.Module, name: str, x: jax.Array, **biases: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Normalises a block's x (…, C) for the linear map behind.

  Without an affine map XLA computes but one of the norms that read the same.

  Args:
    block: has the norm.
    name: of it.
    x: what is normalised.
    **biases: see `_biases`.

  Returns:
    The normalised x, and x to go on with, see `normalize`.
  """
  if _is_affine(block, name):
    return layer_norm(block.compute, name)(x), x
  return normalize(block.compute, x, **biases)


def _mlp(
  compute: Compute,
  ratio: int,
  residual: jax.Array,
  finish: Finish | None,
) -> Mlp:
  """Returns the MLP of a block, to be added to a residual (…, D)."""
  width = residual.shape[-1]
  return Mlp(
    ratio * width,
    width,
    compute.dtype,
    result=compute.summand_dtype(residual),
    exact=compute.exact_gelu,
    sums=compute.inner_sums,
    finish=finish,
    keep=compute.keeps_all,
    name="mlp",
  )


class EncoderBlock(nn.Module):
  """Pre-norm transformer block: self-attention, MLP."""

  heads: int
  mlp_ratio: int
  compute: Compute

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    rotary: RotaryTable | None = None,
    length: jax.Array | None = None,
  ) -> jax.Array:
    """Maps x to the same shape and type.

    Args:
      x: (B, N, D), the residual.
      rotary: table of the N positions, or None.
      length: (B,) valid prefix of x, or None for all.

    Returns:
      (B, N, D). Rows beyond `length` are finite and without meaning.
    """
    finish, biases = _biases(self, "mlp_norm", **_ATTENTION_AND_MLP)
    summand = self.compute.summand_dtype(x)
    within = SelfAttention(
      self.heads, self.compute, summand, finish, name="attention"
    )
    normed, x = _norm(self, "attention_norm", x)
    x = x + within(normed, rotary, length)
    normed, x = _norm(self, "mlp_norm", x, **biases)
    return x + _mlp(self.compute, self.mlp_ratio, x, finish)(normed)


class DecoderBlock(nn.Module):
  """Pre-norm block: self-attention, cross-attention, MLP.

  Attributes:
    heads: of both attentions.
    mlp_ratio: hidden channels of the MLP over the block's.
    compute: precision and kernels.
    alike: whether all tokens of `x` are alike, see `SelfAttention`.
  """

  heads: int
  mlp_ratio: int
  compute: Compute
  alike: bool = False

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
    context_taken: Sequence[jax.Array] | None = None,
  ) -> jax.Array:
    """Updates x by itself and the context.

    Args:
      x: (B, N, D), the residual.
      context: (B, M, D).
      rotary: table of x's positions, or None.
      context_rotary: table of the context's positions, or None.
      length: (B,) valid prefix of x, or None for all.
      context_length: (B,) valid prefix of the context, or None for all.
      taken: see `SelfAttention`.
      context_taken: see `CrossAttention`.

    Returns:
      As x. Rows beyond `length` are finite and without meaning.
    """
    finish, biases = _biases(
      self,
      "cross_norm",
      before=("self_attention", "projection"),
      after=("cross_attention", "projection"),
    )
    finish_mlp, of_mlp = _biases(self, "mlp_norm", after=("mlp", "output"))
    common = self.heads, self.compute, self.compute.summand_dtype(x), finish
    within = SelfAttention(*common, self.alike, name="self_attention")
    across = CrossAttention(*common, name="cross_attention")
    normed = x
    if taken is None:
      normed, x = _norm(self, "self_norm", x)
    x = x + within(normed, rotary, length, taken)
    if context_taken is None:
      context, _ = _norm(self, "context_norm", context)
    normed, x = _norm(self, "cross_norm", x, **biases)
    x = x + across(
      normed,
      context,
      rotary,
      context_rotary,
      length,
      context_length,
      context_taken,
    )
    normed, x = _norm(self, "mlp_norm", x, **of_mlp)
    return x + _mlp(self.compute, self.mlp_ratio, x, finish_mlp)(normed)


class _ModulatedAffine(nn.Module):
  """LayerNorm whose affine map is followed by another one, for each sample.

  Both are one map, so that gradients are summed within samples first: a sum
  over all tokens keeps but few of a GPU's multiprocessors busy.
  """

  compute: Compute

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    scale: jax.Array,
    shift: jax.Array,
    **biases: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    """Maps x (B, N, D) under both (B, 1, D); see `ModulatedNorm`."""
    width = x.shape[-1]
    own_scale = parameter(self, "scale", (width,))
    own_shift = parameter(self, "bias", (width,))
    y, x = normalize(self.compute, x, **biases)
    return y * (own_scale * scale) + (own_shift * scale + shift), x


class ModulatedNorm(nn.Module):
  """LayerNorm whose scale and shift are given by a condition."""

  compute: Compute

  @nn.compact
  def __call__(
    self, x: jax.Array, condition: jax.Array, **biases: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Normalises x (B, N, D) under the condition (B, D).

    Args:
      x: what is normalised.
      condition: gives the affine map.
      **biases: see `_biases`.

    Returns:
      The result, float32, and x to go on with, see `normalize`.
    """
    modulation = Linear(
      2 * x.shape[-1],
      self.compute.dtype,
      result=jnp.float32,
      name="modulation",
    )(self.compute.fill_block(nn.silu(condition)))
    shift, scale = jnp.split(modulation[:, :1], 2, axis=-1)
    affine = _ModulatedAffine(self.compute, name="norm")
    return affine(x, 1 + scale, shift, **biases)


class ModulatedBlock(nn.Module):
  """Transformer block with modulated norms."""

  heads: int
  mlp_ratio: int
  compute: Compute

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    condition: jax.Array,
    rotary: RotaryTable | None = None,
  ) -> jax.Array:
    """Maps x (B, N, D) under the condition (B, D) to its shape and type."""
    finish, biases = _biases(self, "mlp_norm", **_ATTENTION_AND_MLP)
    summand = self.compute.summand_dtype(x)
    within = SelfAttention(
      self.heads, self.compute, summand, finish, name="attention"
    )
    normed, x = ModulatedNorm(self.compute, name="attention_norm")(x, condition)
    x = x + within(normed, rotary)
    mlp_norm = ModulatedNorm(self.compute, name="mlp_norm")
    normed, x = mlp_norm(x, condition, **biases)
    return x + _mlp(self.compute, self.mlp_ratio, x, finish)(normed)
