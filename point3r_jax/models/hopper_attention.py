"""Attention as one kernel for NVIDIA's Hopper GPUs (compute capability 9).

Some warpgroups work on queries, one more fetches keys and values for them: what
FlashAttention-3 (arXiv 2407.08608) and `pallas.ops.gpu.attention_mgpu` of JAX
do, in its simplest form. Unlike cuDNN's kernel this one passes over queries,
too, that are beyond a length, and needs no memory cleared before.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

# Queries of a warpgroup, steps whose keys are in flight.
_QUERIES = 64
_STAGES = 2
# Of the largest Hopper GPUs, if the device is none.
_MULTIPROCESSORS = 132


class _Form(NamedTuple):
  """A shape of blocks, each of which has a multiprocessor to itself.

  Attributes:
    computing: warpgroups that compute. More share what is fetched; fewer leave
      less undone where blocks are few.
    keys: of a step.
    channels: the most a head may have, for what registers and shared memory
      hold.
    registers: of a thread that computes, and of one that fetches; not more than
      all have at first, or threads wait for them forever.
    turn: time of a block, measured, relative to the others'.
  """

  computing: int
  keys: int
  channels: int
  registers: tuple[int, int]
  turn: float

  def blocks(self, queries: int) -> int:
    """Returns how many blocks so many queries of a head make."""
    return -(-queries // (self.computing * _QUERIES))

  def time(self, heads: int, queries: int, multiprocessors: int) -> float:
    """Returns what attention takes: whole turns of all multiprocessors."""
    turns = -(-heads * self.blocks(queries) // multiprocessors)
    return turns * self.turn


_FORMS = (
  _Form(3, 128, 128, (160, 32), 4.0),
  _Form(2, 128, 128, (232, 40), 3.0),
  _Form(5, 64, 48, (88, 40), 7.0),
)


def _choose(heads: int, queries: int, channels: int) -> _Form:
  """Returns the form that takes the least time, the first of equals."""
  forms = [form for form in _FORMS if channels <= form.channels]
  if not forms:
    most = max(form.channels for form in _FORMS)
    raise ValueError(
      f"heads have {channels} channels, but this kernel takes {most} at most; "
      "ask for another implementation of attention"
    )
  cores = getattr(jax.devices()[0], "core_count", _MULTIPROCESSORS)
  return min(forms, key=lambda form: form.time(heads, queries, cores))


_TILE = plgpu.Layout.WGMMA
_ROW = plgpu.Layout.WGMMA.reduce(1)


def _kernel(
  query_length,
  key_length,
  query,
  key,
  value,
  output,
  *,
  form,
  value_head,
  query_tiles,
  key_tiles,
  value_tiles,
  query_ready,
  key_ready,
  value_ready,
  key_read,
  value_read,
):
  """What a block of warpgroups does.

  All arguments are references: the operands and the result in global memory,
  then tiles of them in shared memory, the computing warpgroups' queries and the
  keys and values of `_STAGES` steps, and barriers. What is `ready` has arrived
  in its tile; where all warpgroups have `read`, the next may come.
  """
  batch, head = lax.axis_index("batch"), lax.axis_index("head")
  warpgroup = lax.axis_index("warpgroup")
  computing, channels = form.computing, query_tiles.shape[-1]
  first = lax.axis_index("tile") * (computing * _QUERIES)
  # Queries beyond their length see no keys, and zeros come out.
  keys = jnp.where(first < query_length[batch], key_length[batch], 0)
  steps = pl.cdiv(keys, jnp.int32(form.keys))

  def slot(step):
    return lax.rem(step, jnp.int32(_STAGES))

  def compute():
    plgpu.set_max_registers(form.registers[0], action="increase")
    rows = pl.ds(first + warpgroup * _QUERIES, _QUERIES)
    tile = query_tiles.at[warpgroup]
    scale = channels**-0.5 * math.log2(math.e)  # The hardware knows exp2.
    plgpu.copy_gmem_to_smem(
      query.at[batch, rows, head], tile, query_ready.at[warpgroup]
    )
    plgpu.barrier_wait(query_ready.at[warpgroup])

    def attend(step, carry):
      total, peak, norm = carry

      def multiply_keys(scores):
        plgpu.wgmma(scores, tile, key_tiles.at[slot(step)].T)
        return scores[...]

      def mask(scores):
        column = plgpu.broadcasted_iota(
          jnp.int32, scores.shape, 1, layout=_TILE
        )
        return jnp.where(step * form.keys + column < keys, scores, -jnp.inf)

      def along_rows(x, like):
        return lax.broadcast_in_dim(x, like.shape, [0])

      plgpu.barrier_wait(key_ready.at[slot(step)])
      scores = pl.run_scoped(
        multiply_keys, plgpu.ACC((_QUERIES, form.keys), jnp.float32)
      )
      plgpu.barrier_arrive(key_read.at[slot(step)])
      beyond = (step + 1) * form.keys > keys
      scores = lax.cond(beyond, mask, lambda scores: scores, scores)
      new_peak = jnp.maximum(peak, scores.max(axis=1) * scale)
      weights = jnp.exp2(scores * scale - along_rows(new_peak, scores))
      shrink = jnp.exp2(peak - new_peak)
      norm = norm * shrink + weights.sum(axis=1)
      total *= along_rows(shrink, total)
      weights = weights.astype(value_tiles.dtype)

      def add_values(total):
        plgpu.wgmma(total, weights, value_tiles.at[slot(step)])

      plgpu.barrier_wait(value_ready.at[slot(step)])
      total = pl.run_state(add_values)(plgpu.ACC.init(total))
      plgpu.barrier_arrive(value_read.at[slot(step)])
      return total, new_peak, norm

    def fill(shape, value, layout):
      return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    carry = (
      fill((_QUERIES, channels), 0.0, _TILE),
      fill((_QUERIES,), -jnp.inf, _ROW),
      fill((_QUERIES,), 0.0, _ROW),
    )
    total, _, norm = lax.fori_loop(0, steps, attend, carry)
    factor = 1 / (norm + float(jnp.finfo(jnp.float32).tiny))
    total *= lax.broadcast_in_dim(factor, total.shape, [0])
    tile[...] = total.astype(tile.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(tile, output.at[batch, rows, head])
    plgpu.wait_smem_to_gmem(0)

  def fetch_for_them():
    plgpu.set_max_registers(form.registers[1], action="decrease")

    def fetch(source, first_head, step, tiles, ready):
      rows = pl.ds(step * form.keys, form.keys)
      plgpu.copy_gmem_to_smem(
        source.at[batch, rows, first_head + head],
        tiles.at[slot(step)],
        ready.at[slot(step)],
      )

    @pl.loop(0, jnp.minimum(steps, _STAGES))
    def _(step):
      fetch(key, 0, step, key_tiles, key_ready)
      fetch(value, value_head, step, value_tiles, value_ready)

    @pl.loop(_STAGES, steps)
    def _(step):
      plgpu.barrier_wait(key_read.at[slot(step)])
      fetch(key, 0, step, key_tiles, key_ready)
      plgpu.barrier_wait(value_read.at[slot(step)])
      fetch(value, value_head, step, value_tiles, value_ready)

  lax.cond(warpgroup < computing, compute, fetch_for_them)


def _shared(shape: tuple[int, ...], dtype: jnp.dtype) -> plgpu.SMEM:
  """Returns shared memory that matrix units can read."""
  bits = jnp.finfo(dtype).bits
  swizzle = plgpu.find_swizzle(shape[-1] * bits)
  tiling = plgpu.TilingTransform((8, 8 * swizzle // bits))
  return plgpu.SMEM(
    shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle))
  )


# Calls of like shapes share what takes seconds to compile.
@functools.partial(jax.jit, static_argnames="value_head")
def hopper_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  query_length: jax.Array,
  key_length: jax.Array,
  *,
  value_head: int = 0,
) -> jax.Array:
  """Scaled dot-product attention with scale d^-0.5; softmax in float32.

  Args:
    query: (B, N, heads, d) bfloat16 or float16, d a multiple of 16 up to 128,
      N and M multiples of 8.
    key: (B, M, heads, d), of the same type; so is value.
    value: (B, M, heads, d), or of more heads.
    query_length: (B,) int32, the valid prefix of queries.
    key_length: (B,) int32, the valid prefix of keys, at least 1.
    value_head: the first of the values' heads that counts.

  Returns:
    (B, N, heads, d) in the query's type. Beyond the query's length there is
    something finite.

  Raises:
    ValueError: for heads with more channels.
  """
  batch, num_queries, heads, channels = query.shape
  dtype = query.dtype
  form = _choose(batch * heads, num_queries, channels)
  computing = form.computing

  def barrier(number, arrivals=1):
    return plgpu.Barrier(num_barriers=number, num_arrivals=arrivals)

  return plgpu.kernel(
    functools.partial(_kernel, form=form, value_head=value_head),
    out_type=jax.ShapeDtypeStruct(query.shape, dtype),
    scratch_types={
      "query_tiles": _shared((computing, _QUERIES, channels), dtype),
      "key_tiles": _shared((_STAGES, form.keys, channels), dtype),
      "value_tiles": _shared((_STAGES, form.keys, channels), dtype),
      "query_ready": barrier(computing),
      "key_ready": barrier(_STAGES),
      "value_ready": barrier(_STAGES),
      "key_read": barrier(_STAGES, computing),
      "value_read": barrier(_STAGES, computing),
    },
    grid=(heads, form.blocks(num_queries), batch),
    grid_names=("head", "tile", "batch"),
    num_threads=computing + 1,
    thread_name="warpgroup",
    compiler_params=plgpu.CompilerParams(
      approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
    ),
  )(query_length, key_length, query, key, value)
