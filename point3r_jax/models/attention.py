"""One entry to attention, with a choice of kernels.

Keys are valid up to a length per sample: kernels are told lengths, never masks.
Padded keys and values must be finite.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "tpu")

# The TPU kernel works on blocks of this many tokens.
_TPU_BLOCK = 128


def _choose(query: jax.Array) -> str:
  """Returns the kernel that suits the default device and these operands."""
  backend = jax.default_backend()
  if backend == "tpu":
    return "tpu"
  half = query.dtype in (jnp.bfloat16, jnp.float16)
  if backend == "gpu" and half and query.shape[-1] % 8 == 0:
    return "cudnn"
  return "xla"


def attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  key_length: jax.Array | None = None,
  implementation: str = "auto",
) -> jax.Array:
  """Scaled dot-product attention with scale d^-0.5; softmax in float32.

  Args:
    query: (B, N, heads, d).
    key: (B, M, heads, d).
    value: (B, M, heads, d).
    key_length: (B,) int32, the valid prefix of keys, at least 1; None: all.
    implementation: "xla" (any type), "cudnn" (bfloat16 or float16, d a multiple
      of 8), "tpu" (Pallas flash attention) or "auto" (by device and type).

  Returns:
    (B, N, heads, d) in the query's type.

  Raises:
    ValueError: for an unknown implementation.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"unknown attention implementation {implementation!r}; "
      f"there are {IMPLEMENTATIONS}"
    )
  if implementation == "auto":
    implementation = _choose(query)
  if implementation == "tpu":
    return _tpu_attention(query, key, value, key_length)
  return jax.nn.dot_product_attention(
    query,
    key,
    value,
    key_value_seq_lengths=key_length,
    implementation=implementation,
  )


def _tpu_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  key_length: jax.Array | None,
) -> jax.Array:
  """Pallas flash attention; padding is kept apart by segment."""
  from jax.experimental.pallas.ops.tpu import flash_attention as flash

  batch, num_queries, _, head_dim = query.shape
  num_keys = key.shape[1]

  def prepare(x):
    pad = -x.shape[1] % _TPU_BLOCK
    return jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))).swapaxes(1, 2)

  query, key, value = map(prepare, (query, key, value))
  if key_length is None:
    key_length = jnp.full((batch,), num_keys, jnp.int32)
  valid = jnp.arange(key.shape[2]) < key_length[:, None]
  segments = flash.SegmentIds(
    q=jnp.ones((batch, query.shape[2]), jnp.int32), kv=valid.astype(jnp.int32)
  )
  # The kernel knows these two precisions only.
  full = query.dtype == jnp.float32
  with jax.default_matmul_precision("highest" if full else "default"):
    result = flash.flash_attention(
      query, key, value, segment_ids=segments, sm_scale=head_dim**-0.5
    )
  return result.swapaxes(1, 2)[:, :num_queries]
