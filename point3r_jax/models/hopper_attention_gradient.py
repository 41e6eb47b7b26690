"""Gradients of attention as one kernel for NVIDIA's Hopper GPUs.

A block keeps some keys of a head, with their values, and passes over the
queries once, as FlashAttention does (arXiv 2205.14135): its warpgroups sum the
gradients of 64 keys and values each. One more fetches queries for them, and
multiplies what all of them found for 64 queries, which they need not wait for.
Where a block's keys are all, as a small frame's tokens are, nothing is summed
in memory, cleared before or rounded after. Results are the same each time.
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

from point3r_jax.models.hopper import (
  COLUMN,
  COMPILER,
  TILE,
  barriers,
  bind,
  divide_up,
  shared_tiles,
  slot,
)
from point3r_jax.models.hopper_attention import ROWS, check_backward, quickest
from point3r_jax.models.row_kernels import add_blocks, suit_rows

# Steps, of as many queries as a warpgroup has rows, that are in flight; and how
# many steps' gradients of scores there is room for.
_STAGES = 2
_PLACES = 2


class _Form(NamedTuple):
  """A shape of blocks, each of which has a multiprocessor to itself.

  Attributes:
    computing: warpgroups with keys of their own. Fewer have more registers.
    queries: that these multiply at a time, as registers allow.
    registers: of a thread that computes, and of one that fetches; not more than
      all have at first, or threads wait for them forever.
    turn: time of a block, measured, relative to the others'.
  """

  computing: int
  queries: int
  registers: tuple[int, int]
  turn: float

  @property
  def keys(self) -> int:
    """Keys of a block."""
    return self.computing * ROWS

  def tasks(self, keys: int) -> int:
    """Returns how many tasks, of a block each, so many keys of a head make."""
    return -(-keys // self.keys)

  def has_registers(self, channels: int) -> bool:
    """Says whether registers hold what sums of a product start from.

    That is next to weights, and to sums for keys and values of so many
    channels; otherwise it is added after.
    """
    return self.queries + channels < 2 * ROWS


FORMS = (
  _Form(4, ROWS // 4, (104, 64), 1.5),
  _Form(3, ROWS, (144, 80), 1.0),
)


def _gradient_kernel(
  query_length,
  key_length,
  query,
  key,
  value,
  log_sum,
  start,
  gradient,
  of_query,
  of_key,
  of_value,
  *,
  form,
  key_tiles,
  value_tiles,
  query_tiles,
  gradient_tiles,
  log_sum_tiles,
  start_tiles,
  score_tiles,
  result_tiles,
  own_ready,
  ready,
  scores_ready,
  scores_read,
):
  """What a block of warpgroups does.

  All arguments are references: operands and results in global memory, then
  tiles in shared memory, and barriers. Keys and values have a tile for each
  warpgroup that computes, results for the last one, too; queries, and what
  belongs to them, one for each step in flight. The gradients of scores of a
  step, keys by queries, have one for each warpgroup, in one of `_PLACES`, which
  they take in turn.
  """
  batch, head, tile = (lax.axis_index(x) for x in ("batch", "head", "tile"))
  warpgroup = lax.axis_index("warpgroup")
  num_queries, num_keys = query.shape[1], key.shape[1]
  channels = query_tiles.shape[-1]
  scale = channels**-0.5
  first, keys = tile * form.keys, key_length[batch]
  steps = jnp.where(first < keys, divide_up(query_length[batch], ROWS), 0)
  own = first + warpgroup * ROWS
  own_rows = pl.ds(own, ROWS)
  own_keys, own_values = key_tiles.at[warpgroup], value_tiles.at[warpgroup]
  own_result = result_tiles.at[warpgroup]

  def zeros(columns):
    return plgpu.layout_cast(jnp.zeros((ROWS, columns), jnp.float32), TILE)

  def fetch(step):
    rows, here = pl.ds(step * ROWS, ROWS), slot(step, _STAGES)
    for source, tiles in ((query, query_tiles), (gradient, gradient_tiles)):
      plgpu.copy_gmem_to_smem(
        source.at[batch, rows, head], tiles.at[here], ready.at[here]
      )
    for source, tiles in ((log_sum, log_sum_tiles), (start, start_tiles)):
      plgpu.copy_gmem_to_smem(
        source.at[batch, head, rows], tiles.at[here], ready.at[here]
      )

  def send(total, tile, result):
    tile[...] = total.astype(tile.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(tile, result)

  def multiply(own, others, sums):
    def add(sums):
      plgpu.wgmma(sums, own, others.T)

    return pl.run_state(add)(plgpu.ACC.init(sums))

  def of_own(step, part, totals):
    """Adds what a part of a step's queries gives to the own keys' gradients."""
    here = slot(step, _STAGES)
    columns = pl.ds(part * form.queries, form.queries)
    queries = query_tiles.at[here, columns]
    gradients = gradient_tiles.at[here, columns]
    dtype = queries.dtype

    def down_columns(tiles):
      x = plgpu.layout_cast(tiles[here, columns], COLUMN)
      return lax.broadcast_in_dim(x, (ROWS, form.queries), [1])

    def mask(weights):
      row = plgpu.broadcasted_iota(jnp.int32, weights.shape, 0, layout=TILE)
      return jnp.where(own + row < keys, weights, 0.0)

    # Registers do not hold both products at once.
    scores = multiply(own_keys, queries, zeros(form.queries))
    scores *= scale * math.log2(math.e)
    weights = jnp.exp2(scores - down_columns(log_sum_tiles))
    weights = lax.cond(own + ROWS > keys, mask, lambda x: x, weights)
    if form.has_registers(channels):
      of_weights = multiply(own_values, gradients, down_columns(start_tiles))
    else:
      of_weights = multiply(own_values, gradients, zeros(form.queries))
      of_weights += down_columns(start_tiles)
    of_scores = (weights * of_weights).astype(dtype)
    # Last: were they made float32 again, they would not be rounded in pairs.
    weights = weights.astype(dtype)
    place = score_tiles.at[slot(step, _PLACES), warpgroup]
    place.at[:, columns][...] = of_scores

    def add(totals):
      plgpu.wgmma(totals[0], of_scores, queries)
      plgpu.wgmma(totals[1], weights, gradients)

    return pl.run_state(add)(tuple(map(plgpu.ACC.init, totals)))

  def of_step(step, totals):
    """Adds what all of a step's queries give."""
    totals = of_own(step, 0, totals)
    for part in range(1, ROWS // form.queries):
      add_part = functools.partial(of_own, step, part)
      before = part * form.queries
      if 0 < num_queries % ROWS <= before:
        some = step * ROWS + before < num_queries
        totals = lax.cond(some, add_part, lambda x: x, totals)
      else:
        totals = add_part(totals)
    return totals

  def of_queries(step):
    """Makes gradients of a step's queries of what all warpgroups found."""
    place = slot(step, _PLACES)
    plgpu.barrier_wait(scores_ready.at[place])

    # All have read what is here.
    @pl.when(step + _STAGES < steps)
    def _():
      fetch(step + _STAGES)

    def run(total):
      scores = score_tiles.at[place]
      for other in range(form.computing):
        plgpu.wgmma(total, scores.at[other].T, key_tiles.at[other])
      return total[...]

    total = pl.run_scoped(run, plgpu.ACC((ROWS, channels), jnp.float32))
    plgpu.barrier_arrive(scores_read.at[place])
    plgpu.wait_smem_to_gmem(0)
    rows = pl.ds(step * ROWS, ROWS)
    send(total * scale, own_result, of_query.at[tile, batch, rows, head])

  def take_step(step, totals):
    place = slot(step, _PLACES)

    def without_keys(totals):
      own_scores = score_tiles.at[place, warpgroup]
      own_scores[...] = zeros(ROWS).astype(own_scores.dtype)
      return totals

    plgpu.barrier_wait(ready.at[slot(step, _STAGES)])

    @pl.when(step >= _PLACES)
    def _():
      plgpu.barrier_wait(scores_read.at[place])

    if pl.cdiv(num_keys, ROWS) % form.computing == 0:
      totals = of_step(step, totals)
    else:  # Of the last block some warpgroups have no keys.
      with_keys = functools.partial(of_step, step)
      totals = lax.cond(own < keys, with_keys, without_keys, totals)
    plgpu.commit_smem()
    plgpu.barrier_arrive(scores_ready.at[place])
    return totals

  def compute():
    plgpu.set_max_registers(form.registers[0], action="increase")
    for source, own_tile in ((key, own_keys), (value, own_values)):
      plgpu.copy_gmem_to_smem(
        source.at[batch, own_rows, head], own_tile, own_ready
      )
    plgpu.barrier_wait(own_ready)
    totals = zeros(channels), zeros(channels)
    totals = lax.fori_loop(0, steps, take_step, totals)
    # Others may still read the own keys, but not the values.
    send(totals[1], own_values, of_value.at[batch, own_rows, head])
    send(totals[0] * scale, own_result, of_key.at[batch, own_rows, head])

  def help_others():
    plgpu.set_max_registers(form.registers[1], action="decrease")

    @pl.loop(0, jnp.minimum(steps, _STAGES))
    def _(step):
      fetch(step)

    plgpu.barrier_wait(own_ready)

    @pl.loop(0, steps)
    def _(step):
      of_queries(step)

    if of_query.shape[0] == 1:
      # Nobody adds this to others', who would know what was not written.
      plgpu.wait_smem_to_gmem(0)
      own_result[...] = zeros(channels).astype(own_result.dtype)
      plgpu.commit_smem()

      @pl.loop(steps, pl.cdiv(num_queries, ROWS))
      def _(step):
        rows = pl.ds(step * ROWS, ROWS)
        plgpu.copy_smem_to_gmem(own_result, of_query.at[0, batch, rows, head])

  lax.cond(warpgroup < form.computing, compute, help_others)
  plgpu.wait_smem_to_gmem(0)


def _starts(output: jax.Array, gradient: jax.Array) -> jax.Array:
  """Returns what gradients of a query's weights start from.

  The negative scalar product of both, (B, heads, whole tiles).
  """
  # Padded before they are summed, XLA does both in one kernel.
  padding = ((0, 0), (0, -output.shape[1] % ROWS), (0, 0), (0, 0))
  output, gradient = (
    jnp.pad(x.astype(jnp.float32), padding) for x in (output, gradient)
  )
  return -(output * gradient).sum(axis=3).swapaxes(1, 2)


def _add_tiles(
  of_query: jax.Array,
  keys: int,
  query_length: jax.Array,
  key_length: jax.Array,
) -> jax.Array:
  """Adds what blocks of keys found for queries, (blocks, B, N, heads, d).

  Each has rounded its own, and written nothing where keys or queries are not
  valid.
  """
  blocks, *shape = of_query.shape
  if blocks == 1:
    return of_query[0]
  rows = of_query.reshape(*of_query.shape[:3], -1)
  counts = (key_length + (keys - 1)) // keys
  if suit_rows(rows.shape, rows.dtype):
    return add_blocks(rows, counts, query_length).reshape(shape)
  written = jnp.arange(blocks)[:, None] < counts
  valid = jnp.arange(shape[1]) < query_length[:, None]
  rows = jnp.where((written[..., None] & valid)[..., None], rows, 0)
  total = rows.astype(jnp.float32).sum(axis=0)
  return total.astype(rows.dtype).reshape(shape)


# Calls of like shapes share what takes seconds to compile.
@jax.jit
def hopper_attention_gradient(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  query_length: jax.Array,
  key_length: jax.Array,
  output: jax.Array,
  log_sum: jax.Array,
  gradient: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gradients of `hopper_attention`.

  Args:
    query: (B, N, heads, d), as for the forward pass, but d at most 64.
    key: (B, M, heads, d).
    value: (B, M, heads, d).
    query_length: (B,) int32, the valid prefix of queries.
    key_length: (B,) int32, the valid prefix of keys, at least 1.
    output: (B, N, heads, d), the result of the forward pass.
    log_sum: (B, heads, N or more) float32, the other one.
    gradient: (B, N, heads, d), of the output; zeros beyond the queries' length.

  Returns:
    The gradients of query, key and value, in their types; beyond the lengths
    zeros.

  Raises:
    ValueError: for heads with more channels.
  """
  batch, _, heads, channels = query.shape
  num_keys = key.shape[1]
  check_backward(channels)
  dtype = query.dtype
  form = quickest(FORMS, batch * heads, num_keys)
  blocks = form.tasks(num_keys)
  # Parts of a step are no wider, and all that is multiplied is laid out alike.
  swizzle = plgpu.find_swizzle(math.gcd(channels, form.queries) * 16)
  tiles = functools.partial(shared_tiles, dtype=dtype, swizzle=swizzle)
  computing = form.computing
  own = tiles((computing, ROWS, channels))
  flying = tiles((_STAGES, ROWS, channels))
  statistics = plgpu.SMEM((_STAGES, ROWS), jnp.float32)
  of_query, of_key, of_value = plgpu.kernel(
    bind(_gradient_kernel, form=form),
    out_type=(
      jax.ShapeDtypeStruct((blocks, *query.shape), dtype),
      jax.ShapeDtypeStruct(key.shape, dtype),
      jax.ShapeDtypeStruct(value.shape, dtype),
    ),
    scratch_types={
      "key_tiles": own,
      "value_tiles": own,
      "query_tiles": flying,
      "gradient_tiles": flying,
      "log_sum_tiles": statistics,
      "start_tiles": statistics,
      "score_tiles": tiles((_PLACES, computing, ROWS, ROWS)),
      "result_tiles": tiles((computing + 1, ROWS, channels)),
      "own_ready": barriers(1, 2 * computing),
      "ready": barriers(_STAGES, 4),
      "scores_ready": barriers(_PLACES, computing),
      "scores_read": barriers(_PLACES),
    },
    grid=(heads, blocks, batch),
    grid_names=("head", "tile", "batch"),
    num_threads=computing + 1,
    thread_name="warpgroup",
    compiler_params=COMPILER,
  )(
    query_length,
    key_length,
    query,
    key,
    value,
    log_sum,
    _starts(output, gradient),
    gradient,
  )
  of_query = _add_tiles(of_query, form.keys, query_length, key_length)
  return of_query, of_key, of_value
