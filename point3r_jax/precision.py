"""Precision policies: which arithmetic runs in which type."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Precision:
  """What a policy decides; everything else stays float32.

  LayerNorm, softmax, positions, rotary arithmetic, fusion, the pose head, the
  dense heads' last layer and the heads' activations are float32 in full
  precision under every policy; but where dense heads are bfloat16 the kernel of
  their last layer counts to 16 bits. So are the residual streams of the image
  decoder, the pose memory and the world head unless a backward pass is to come.
  Patch embeddings have float32 operands, multiplied as `matmul` says. GELUs
  between bfloat16 products have a form with tanh: see
  `models.gelus.add_bias_gelu`.

  Attributes:
    name: the policy's name.
    dtype: type of the operands of matrix products outside the dense heads, and
      of the other residual streams.
    dense_dtype: type of the dense heads' convolutions.
    matmul: precision of float32 products, as
      `jax.default_matmul_precision` takes it.
  """

  name: str
  dtype: jnp.dtype
  dense_dtype: jnp.dtype
  matmul: str


POLICIES = {
  policy.name: policy
  for policy in (
    Precision("float32", jnp.float32, jnp.float32, "highest"),
    Precision("tf32", jnp.float32, jnp.float32, "tensorfloat32"),
    Precision("bfloat16", jnp.bfloat16, jnp.bfloat16, "tensorfloat32"),
    # As the published training: the dense heads are not rounded to bfloat16.
    Precision("mixed", jnp.bfloat16, jnp.float32, "tensorfloat32"),
  )
}


def get_precision(policy: str | Precision | None = None) -> Precision:
  """Returns a policy by name; None is the default device's default.

  The default is "float32" on a CPU and "bfloat16" on accelerators.
  """
  if isinstance(policy, Precision):
    return policy
  if policy is None:
    policy = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  if policy not in POLICIES:
    raise ValueError(
      f"unknown precision {policy!r}; there are {sorted(POLICIES)}"
    )
  return POLICIES[policy]
