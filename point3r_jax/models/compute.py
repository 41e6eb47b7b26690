"""How to compute a model, as opposed to what: precision, kernels, memory."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from point3r_jax.models.attention import ATTENDED, attention
from point3r_jax.precision import Precision

# What a backward pass computes again: nothing; all of a block but what `_keep`
# names; or whole blocks and the dense heads.
REMAT = ("none", "elementwise", "blocks")

# Names, for what is kept: of a block's normalised inputs, of what attends, and
# of products by kernels of ours.
NORMED = "normed"
ATTENDING = "attending"
MULTIPLIED = "multiplied"


def _keep(primitive: Any, *operands, **params) -> bool:
  """Keeps linear maps, norms that only normalise, attention on GPUs.

  And its operands, instead of the linear maps that they are rotated from, which
  then nothing asks for.
  """
  policies = jax.checkpoint_policies
  named = policies.save_only_these_names(
    NORMED, ATTENDING, ATTENDED, MULTIPLIED
  )
  return (
    policies.dots_with_no_batch_dims_saveable(primitive, *operands, **params)
    or named(primitive, *operands, **params)
    or primitive.name.startswith("dot_product_attention_fwd")
  )


# Layers of one kind share what is traced and lowered of them. XLA inlines that
# and compiles the same as without. Profiles name all layers like the first one.
_traced_once = functools.cache(nn.jit)


@dataclasses.dataclass(frozen=True)
class Compute:
  """How to compute, as opposed to what: no effect on parameters.

  Attributes:
    precision: the precision policy.
    attention: implementation name for `models.attention`.
    remat: what the backward pass computes again, one of `REMAT`; None: there is
      to be no backward pass, so that what is fastest without one is taken.
  """

  precision: Precision
  attention: str = "auto"
  remat: str | None = None

  @property
  def dtype(self) -> jnp.dtype:
    """Type of the operands of matrix products."""
    return self.precision.dtype

  @property
  def forward_only(self) -> bool:
    """Whether no backward pass is to come."""
    return self.remat is None

  @property
  def trains_in_16_bits(self) -> bool:
    """Whether a backward pass is to come, of operands that are rounded."""
    return not self.forward_only and self.dtype != jnp.float32

  @property
  def keeps_all(self) -> bool:
    """Whether nothing is computed again."""
    return self.remat in (None, "none")

  @property
  def inner_sums(self) -> jnp.dtype | None:
    """Type in which products within a block are summed; None: as operands.

    CPUs multiply in 16 bits many times faster if sums stay float32. For a
    backward pass half as many bytes are kept.
    """
    cpu = jax.default_backend() == "cpu"
    return jnp.float32 if cpu and self.forward_only else None

  @property
  def exact_gelu(self) -> bool:
    """Whether GELUs are exact; see `gelus.add_bias_gelu`."""
    return self.dtype != jnp.bfloat16

  @property
  def token_block(self) -> int:
    """Tokens of a stream come in multiples of this, the last ones padding.

    Products and attention in 16 bits want eights; otherwise each would pad by
    itself.
    """
    return 1 if self.dtype == jnp.float32 else 8

  @property
  def wide_residual(self) -> jnp.dtype:
    """Type of the residual streams but for those of encoders and pointers.

    These have the policy's type. Without a backward pass to come the others do
    not, since rounding the decoder's stream of images doubles what 16 bits do
    to rotations. The published training rounds all. Linear maps between the
    model's parts give the same: so their gradients are products of 16 bits.
    """
    return jnp.float32 if self.forward_only else self.dtype

  def summand_dtype(self, residual: jax.Array) -> jnp.dtype:
    """Returns the type of a product that is added to a residual.

    If both are of one type the sum is part of the product on GPUs. For a
    backward pass half as many bytes are kept.
    """
    return residual.dtype if self.forward_only else self.dtype

  def pad_tokens(
    self, x: jax.Array, before: int = 0
  ) -> tuple[jax.Array, int, jax.Array | None]:
    """Pads a stream of tokens (B, N, D) with zeros to whole blocks.

    Args:
      x: the stream.
      before: tokens that will be put in front of it.

    Returns:
      The stream, how many tokens are padding, and the valid prefix, before+N,
      (B,), None without padding.
    """
    batch, tokens = x.shape[0], before + x.shape[1]
    padding = -tokens % self.token_block
    if not padding:
      return x, 0, None
    x = jnp.pad(x, ((0, 0), (0, padding), (0, 0)))
    return x, padding, jnp.full(batch, tokens, jnp.int32)

  def fill_block(self, x: jax.Array) -> jax.Array:
    """Repeats what a sample has one of, (B, C) to (B, n, C).

    As often as the batch needs to make a block of rows: norms and products of
    fewer take many kernels.
    """
    copies = -(-self.token_block // x.shape[0])
    return jnp.repeat(x[:, None], copies, axis=1)

  def attend(
    self,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_length: jax.Array | None,
    key_length: jax.Array | None,
    value_head: int = 0,
  ) -> jax.Array:
    """Runs `models.attention` as chosen; see there for the arguments."""
    query, key, value = (
      checkpoint_name(x, ATTENDING) for x in (query, key, value)
    )
    return attention(
      query,
      key,
      value,
      query_length=query_length,
      key_length=key_length,
      value_head=value_head,
      implementation=self.attention,
      forward_only=self.forward_only,
    )

  def remat_block(
    self, block: type[nn.Module], scanned: bool = False
  ) -> type[nn.Module]:
    """Returns a transformer block that keeps what `remat` says.

    Where nothing is computed again, all that are not scanned are traced once.

    Args:
      block: its class.
      scanned: whether it is a scan's body: then the compiler cannot merge what
        is computed again with its first computation, and need not be kept from
        it.
    """
    if self.keeps_all:
      return block if scanned else _traced_once(block)
    keep = None if self.remat == "blocks" else _keep
    return nn.remat(block, prevent_cse=not scanned, policy=keep)

  def remat_dense(self, head: type[nn.Module]) -> type[nn.Module]:
    """Returns a dense head that keeps nothing where blocks do not, either."""
    if self.remat != "blocks":
      return head
    # Its maps are as large as the image: by far the most memory a FLOP.
    return nn.remat(head, static_argnums=(2,))
