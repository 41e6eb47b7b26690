"""One entry to attention, with a choice of kernels.

Keys are valid up to a length per sample: kernels are told lengths, never masks.
Padded keys and values must be finite.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from point3r_jax.models.gpus import HOPPER, compute_capability
from point3r_jax.models.partition import divide_batch

IMPLEMENTATIONS = ("auto", "xla", "blocks", "cudnn", "hopper", "tpu")

# The name of what kernels of ours give, for a backward pass that keeps it.
ATTENDED = "attended"

# Channels of a head that GPUs' kernels take: multiples of these, and up to; the
# last one with a backward pass.
_CUDNN_CHANNELS = 8
_HOPPER_CHANNELS = 16
_MOST_HOPPER_CHANNELS = 128
_MOST_HOPPER_CHANNELS_BACKWARD = 64

# Tokens come in blocks of so many. JAX's cuDNN attention has no gradient for
# odd numbers of them.
_TOKENS = {"blocks": 1, "cudnn": 2, "hopper": 8, "tpu": 128}

# Queries of a block of "blocks".
_BLOCK = 128


def _choose(query: jax.Array, key: jax.Array, forward_only: bool) -> str:
  """Returns the kernel that suits the default device and these operands."""
  backend, channels = jax.default_backend(), query.shape[-1]
  if backend == "tpu":
    return "tpu"
  if backend == "cpu" and forward_only and query.shape[1] > _BLOCK:
    return "blocks"
  half = query.dtype in (jnp.bfloat16, jnp.float16)
  if backend != "gpu" or not half or channels % _CUDNN_CHANNELS:
    return "xla"
  hopper = compute_capability() == HOPPER
  suits = hopper and channels % _HOPPER_CHANNELS == 0
  if forward_only:
    suits &= channels <= _MOST_HOPPER_CHANNELS
  else:
    suits &= channels <= _MOST_HOPPER_CHANNELS_BACKWARD
    # Padding would take what the backward pass gains.
    suits &= not any(x.shape[1] % _TOKENS["hopper"] for x in (query, key))
  return "hopper" if suits else "cudnn"


def attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  query_length: jax.Array | None = None,
  key_length: jax.Array | None = None,
  value_head: int = 0,
  implementation: str = "auto",
  forward_only: bool = False,
) -> jax.Array:
  """Scaled dot-product attention with scale d^-0.5; softmax in float32.

  Args:
    query: (B, N, heads, d).
    key: (B, M, heads, d).
    value: (B, M, heads, d), or of more heads.
    query_length: (B,) int32, the valid prefix of queries; None: all.
    key_length: (B,) int32, the valid prefix of keys, at least 1; None: all.
    value_head: the first of the values' heads that counts: "hopper" reads them
      where they are.
    implementation: "xla" (any type), "blocks" (the same for a block of queries
      at a time, for CPUs), "cudnn" (bfloat16 or float16, d a multiple of 8),
      "hopper" (kernels of ours for these GPUs: the same types, d a multiple of
      16 up to 128), "tpu" (Pallas flash attention) or "auto" (by device, type
      and shapes).
    forward_only: whether no derivative is to come, for "auto": those of
      "blocks", and of "hopper" if d is above 64, are XLA's and cuDNN's, which
      then run their own forward passes, too.

  Returns:
    (B, N, heads, d) in the query's type; finite and without meaning beyond the
    query's length.

  Raises:
    ValueError: for an unknown implementation.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"unknown attention implementation {implementation!r}; "
      f"there are {IMPLEMENTATIONS}"
    )
  if implementation == "auto":
    implementation = _choose(query, key, forward_only)
  if implementation != "hopper" or key.shape[1] == 1:
    value = value[:, :, value_head : value_head + query.shape[2]]
    value_head = 0
  if key.shape[1] == 1:
    return jnp.broadcast_to(value, query.shape)  # Softmax over one key is 1.
  if implementation == "xla":
    return jax.nn.dot_product_attention(
      query,
      key,
      value,
      key_value_seq_lengths=key_length,
      implementation="xla",
    )
  num_queries, num_keys = query.shape[1], key.shape[1]
  query, key, value = (
    _pad_tokens(x, _TOKENS[implementation]) for x in (query, key, value)
  )
  if key_length is None and key.shape[1] != num_keys:
    key_length = jnp.full(key.shape[:1], num_keys, jnp.int32)
  wide = query.shape[-1] > _MOST_HOPPER_CHANNELS_BACKWARD
  hopper = _wide_hopper if wide else _hopper
  own = {"blocks": _blocks, "hopper": hopper}.get(implementation)
  if own is not None:
    lengths = (
      jnp.full(x.shape[:1], x.shape[1], jnp.int32) if length is None else length
      for x, length in ((query, query_length), (key, key_length))
    )
    result = own(value_head, query, key, value, *lengths)
  elif implementation == "cudnn":
    result = jax.nn.dot_product_attention(
      query,
      key,
      value,
      key_value_seq_lengths=key_length,
      implementation="cudnn",
    )
  else:
    result = _tpu_attention(query, key, value, key_length)
  return result[:, :num_queries]


def _pad_tokens(x: jax.Array, block: int) -> jax.Array:
  """Pads (B, N, heads, d) with zeros to a multiple of `block` tokens."""
  return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0)))


def _with_derivatives_of(
  implementation: str,
) -> Callable[[Callable[..., jax.Array]], Callable[..., jax.Array]]:
  """Gives a kernel another's derivatives.

  It takes the first of the values' heads, query, key, value and both lengths.
  """

  def decorate(forward):
    kernel = jax.custom_vjp(forward, nondiff_argnums=(0,))

    def save(value_head, *operands):
      return kernel(value_head, *operands), operands

    def backward(value_head, operands, gradient):
      *operands, _, key_length = operands

      def other(*operands):
        return attention(
          *operands,
          key_length=key_length,
          value_head=value_head,
          implementation=implementation,
        )

      _, pullback = jax.vjp(other, *operands)
      return *pullback(gradient), None, None

    kernel.defvjp(save, backward)
    return kernel

  return decorate


def _run_hopper(value_head, *operands, **options):
  """`hopper_attention`, for a mesh, too."""
  # JAX does not have it for all platforms.
  from point3r_jax.models.hopper_attention import hopper_attention

  kernel = functools.partial(hopper_attention, value_head=value_head, **options)
  return divide_batch(kernel)(*operands)


_hopper = jax.custom_vjp(_run_hopper, nondiff_argnums=(0,))
_wide_hopper = _with_derivatives_of("cudnn")(_run_hopper)


def _hopper_forward(value_head, *operands):
  kept = _run_hopper(value_head, *operands, keep_log_sum=True)
  output, log_sum = (checkpoint_name(x, ATTENDED) for x in kept)
  return output, (operands, output, log_sum)


def _hopper_backward(value_head, kept, gradient):
  from point3r_jax.models.hopper_attention_gradient import (
    hopper_attention_gradient,
  )

  (query, key, value, *lengths), output, log_sum = kept
  value, everywhere = jax.vjp(
    lambda x: x[:, :, value_head : value_head + query.shape[2]], value
  )
  of_query, of_key, of_value = divide_batch(hopper_attention_gradient)(
    query, key, value, *lengths, output, log_sum, gradient
  )
  return of_query, of_key, *everywhere(of_value), None, None


_hopper.defvjp(_hopper_forward, _hopper_backward)


@_with_derivatives_of("xla")
def _blocks(_, query, key, value, query_length, key_length):
  """Attention of as many blocks of queries as hold valid ones; else zeros.

  A CPU's cache holds the scores of a block, unlike those of all queries.
  """
  num_queries = query.shape[1]
  query = _pad_tokens(query, _BLOCK).swapaxes(1, 2)
  key, value = key.transpose(0, 2, 3, 1), value.swapaxes(1, 2)
  valid = jnp.arange(key.shape[-1]) < key_length[:, None, None, None]

  def attend(block, result):
    rows = jax.lax.dynamic_slice_in_dim(query, block * _BLOCK, _BLOCK, 2)
    scores = jnp.matmul(rows, key, preferred_element_type=jnp.float32)
    scores = jnp.where(valid, scores * rows.shape[-1] ** -0.5, -jnp.inf)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    total = jnp.matmul(
      weights.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    rows = (total / weights.sum(axis=-1, keepdims=True)).astype(result.dtype)
    return jax.lax.dynamic_update_slice_in_dim(result, rows, block * _BLOCK, 2)

  blocks = (query_length.max() + _BLOCK - 1) // _BLOCK
  result = jax.lax.fori_loop(0, blocks, attend, jnp.zeros_like(query))
  return result.swapaxes(1, 2)[:, :num_queries]


def _tpu_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  key_length: jax.Array | None,
) -> jax.Array:
  """Pallas flash attention; keys beyond the length are another segment."""
  from jax.experimental.pallas.ops.tpu import flash_attention as flash

  segments = None
  if key_length is not None:
    valid = jnp.arange(key.shape[1]) < key_length[:, None]
    segments = flash.SegmentIds(
      q=jnp.ones(query.shape[:2], jnp.int32), kv=valid.astype(jnp.int32)
    )
  # The kernel knows these two precisions only.
  full = query.dtype == jnp.float32
  known = "highest" if full else "default"

  def run(query, key, value, segments):
    return flash.flash_attention(
      *(x.swapaxes(1, 2) for x in (query, key, value)),
      segment_ids=segments,
      sm_scale=query.shape[-1] ** -0.5,
    ).swapaxes(1, 2)

  @jax.custom_vjp
  def kernel(*operands):
    with jax.default_matmul_precision(known):
      return run(*operands)

  # Derivatives are traced later, when the precision around may be another.
  def forward(*operands):
    with jax.default_matmul_precision(known):
      return jax.vjp(lambda *x: run(*x, operands[3]), *operands[:3])

  def backward(pullback, gradient):
    with jax.default_matmul_precision(known):
      return *pullback(gradient), None

  kernel.defvjp(forward, backward)
  return divide_batch(kernel)(query, key, value, segments)
