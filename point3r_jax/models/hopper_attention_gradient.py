"""Gradients of attention as one kernel for NVIDIA's Hopper GPUs.

A block keeps some keys of a head, with their values, and passes over the
queries once, as FlashAttention does (arXiv 2205.14135): each of its warpgroups
sums the gradients of its own 64 keys and values, and they take turns in
multiplying what all of them found for 64 queries. Where a block's keys are all,
as a small frame's tokens are, nothing is summed in memory, cleared before or
rounded after. Results are the same each time.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

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
  divide,
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
    warpgroups: of a task, each with keys of its own. Fewer have more registers.
    queries: that are multiplied at a time, as registers allow.
    turn: time of a block, measured, relative to the others'.
    teams: of warpgroups, each with a task of another head, that do not wait for
      each other.
  """

  warpgroups: int
  queries: int
  turn: float
  teams: int = 1

  @property
  def keys(self) -> int:
    """Keys of a task."""
    return self.warpgroups * ROWS

  def tasks(self, keys: int) -> int:
    """Returns how many tasks so many keys of a head make."""
    return -(-keys // self.keys)

  def blocks(self, heads: int, keys: int) -> int:
    """Returns how many blocks those of all heads make."""
    return pl.cdiv(heads, self.teams) * self.tasks(keys)


FORMS = (
  _Form(4, ROWS // 2, 1.4),
  _Form(3, ROWS, 1.0),
  _Form(2, ROWS // 2, 1.5, teams=2),
)


class _Tiles(NamedTuple):
  """Shared memory; the first axis is that of teams.

  Attributes:
    key: (warpgroups, 64, channels), of each its own.
    value: the same.
    query: (steps in flight, 64, channels).
    gradient: the same, of what attention gives for these queries.
    log_sum: (steps in flight, 64) float32.
    dot: the same.
    score: (places, warpgroups, 64, 64), gradients of scores, keys by queries.
    result: (warpgroups, 64, channels), room for what is sent.
  """

  key: Any
  value: Any
  query: Any
  gradient: Any
  log_sum: Any
  dot: Any
  score: Any
  result: Any


def _gradient_kernel(
  query_length,
  key_length,
  query,
  key,
  value,
  log_sum,
  dot,
  gradient,
  of_query,
  of_key,
  of_value,
  *,
  form,
  tiles,
  own_ready,
  ready,
  scores_ready,
  scores_read,
):
  """What a block of warpgroups does.

  All arguments are references: operands and results in global memory, then
  `_Tiles`, and barriers. Steps take turns in the places for gradients of
  scores.
  """
  _, num_queries, heads, channels = query.shape
  batch, head, tile = (lax.axis_index(x) for x in ("batch", "head", "tile"))
  team, warpgroup = 0, lax.axis_index("warpgroup")
  if form.teams > 1:
    team, warpgroup = divide(warpgroup, form.warpgroups)
    # The last one may be done twice.
    head = jnp.minimum(head * form.teams + team, heads - 1)
  tiles = _Tiles(*(x.at[team] for x in tiles))
  scale = channels**-0.5
  first, keys = tile * form.keys, key_length[batch]
  steps = jnp.where(first < keys, divide_up(query_length[batch], ROWS), 0)
  own = first + warpgroup * ROWS
  own_rows = pl.ds(own, ROWS)
  own_keys, own_values, own_result = (
    x.at[warpgroup] for x in (tiles.key, tiles.value, tiles.result)
  )
  own_ready = own_ready.at[team]

  def arrived(step):
    return ready.at[team * _STAGES + slot(step, _STAGES)]

  def whose_turn(step):
    return slot(step, form.warpgroups)

  def of_warpgroup(barriers, number):
    return barriers.at[team * form.warpgroups + number]

  def fetch(step):
    rows, here = pl.ds(step * ROWS, ROWS), slot(step, _STAGES)
    for source, to in ((query, tiles.query), (gradient, tiles.gradient)):
      plgpu.copy_gmem_to_smem(
        source.at[batch, rows, head], to.at[here], arrived(step)
      )
    for source, to in ((log_sum, tiles.log_sum), (dot, tiles.dot)):
      plgpu.copy_gmem_to_smem(
        source.at[batch, head, rows], to.at[here], arrived(step)
      )

  def send(total, tile, result):
    tile[...] = total.astype(tile.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(tile, result)

  def multiply(own, others):
    def run(total):
      plgpu.wgmma(total, own, others.T)
      return total[...]

    return pl.run_scoped(run, plgpu.ACC((ROWS, form.queries), jnp.float32))

  def of_own(step, part, totals):
    """Adds what a part of a step's queries gives to the own keys' gradients."""
    here = slot(step, _STAGES)
    columns = pl.ds(part * form.queries, form.queries)
    queries = tiles.query.at[here, columns]
    gradients = tiles.gradient.at[here, columns]
    dtype = queries.dtype

    def down_columns(statistics):
      x = plgpu.layout_cast(statistics[here, columns], COLUMN)
      return lax.broadcast_in_dim(x, (ROWS, form.queries), [1])

    def mask(weights):
      row = plgpu.broadcasted_iota(jnp.int32, weights.shape, 0, layout=TILE)
      return jnp.where(own + row < keys, weights, 0.0)

    # Registers do not hold both products at once.
    scores = multiply(own_keys, queries) * (scale * math.log2(math.e))
    weights = jnp.exp2(scores - down_columns(tiles.log_sum))
    weights = lax.cond(own + ROWS > keys, mask, lambda x: x, weights)
    weights = weights.astype(dtype)
    of_weights = multiply(own_values, gradients) - down_columns(tiles.dot)
    of_scores = (weights.astype(jnp.float32) * of_weights).astype(dtype)
    place = tiles.score.at[slot(step, _PLACES), warpgroup]
    place.at[:, columns][...] = of_scores

    def add(totals):
      plgpu.wgmma(totals[0], of_scores, queries)
      plgpu.wgmma(totals[1], weights, gradients)

    return pl.run_state(add)(tuple(map(plgpu.ACC.init, totals)))

  def of_queries(step):
    """Makes gradients of a step's queries of what all warpgroups found."""

    def run(total):
      places = tiles.score.at[slot(step, _PLACES)]
      for other in range(form.warpgroups):
        plgpu.wgmma(total, places.at[other].T, tiles.key.at[other])
      return total[...]

    total = pl.run_scoped(run, plgpu.ACC((ROWS, channels), jnp.float32))
    plgpu.barrier_arrive(of_warpgroup(scores_read, warpgroup))
    plgpu.wait_smem_to_gmem(0)
    rows = pl.ds(step * ROWS, ROWS)
    send(total * scale, own_result, of_query.at[tile, batch, rows, head])

  def take_step(step, totals):
    plgpu.barrier_wait(arrived(step))

    @pl.when(step >= _PLACES)
    def _():
      before = whose_turn(step - _PLACES)
      plgpu.barrier_wait(of_warpgroup(scores_read, before))

    totals = of_own(step, 0, totals)
    for part in range(1, ROWS // form.queries):
      add_part = functools.partial(of_own, step, part)
      before = part * form.queries
      if 0 < num_queries % ROWS <= before:
        some = step * ROWS + before < num_queries
        totals = lax.cond(some, add_part, lambda x: x, totals)
      else:
        totals = add_part(totals)
    plgpu.commit_smem()
    plgpu.barrier_arrive(of_warpgroup(scores_ready, whose_turn(step)))

    @pl.when(whose_turn(step) == warpgroup)
    def _():
      plgpu.barrier_wait(of_warpgroup(scores_ready, warpgroup))

      # All have read what is here.
      @pl.when(step + _STAGES < steps)
      def _():
        fetch(step + _STAGES)

      of_queries(step)

    return totals

  for source, own_tile in ((key, own_keys), (value, own_values)):
    plgpu.copy_gmem_to_smem(
      source.at[batch, own_rows, head], own_tile, own_ready
    )

  @pl.when(jnp.logical_and(warpgroup < _STAGES, warpgroup < steps))
  def _():
    fetch(warpgroup)

  plgpu.barrier_wait(own_ready)
  zeros = plgpu.layout_cast(jnp.zeros((ROWS, channels), jnp.float32), TILE)
  totals = lax.fori_loop(0, steps, take_step, (zeros, zeros))
  if of_query.shape[0] == 1:
    # Nobody adds this to others', who would know what was not written.
    plgpu.wait_smem_to_gmem(0)
    own_result[...] = zeros.astype(own_result.dtype)
    plgpu.commit_smem()

    @pl.loop(steps, pl.cdiv(num_queries, ROWS))
    def _(step):
      @pl.when(whose_turn(step) == warpgroup)
      def _():
        rows = pl.ds(step * ROWS, ROWS)
        plgpu.copy_smem_to_gmem(own_result, of_query.at[0, batch, rows, head])

    plgpu.wait_smem_to_gmem(0)
  # Others may still read the own keys, but not the values.
  send(totals[1], own_values, of_value.at[batch, own_rows, head])
  plgpu.wait_smem_to_gmem(1)
  send(totals[0] * scale, own_result, of_key.at[batch, own_rows, head])
  plgpu.wait_smem_to_gmem(0)


def _dots(output: jax.Array, gradient: jax.Array) -> jax.Array:
  """Returns each query's scalar product of both, (B, heads, whole tiles)."""
  # Padded before they are summed, XLA does both in one kernel.
  padding = ((0, 0), (0, -output.shape[1] % ROWS), (0, 0), (0, 0))
  output, gradient = (
    jnp.pad(x.astype(jnp.float32), padding) for x in (output, gradient)
  )
  return (output * gradient).sum(axis=3).swapaxes(1, 2)


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
  teams, warpgroups = form.teams, form.warpgroups
  own = tiles((teams, warpgroups, ROWS, channels))
  flying = tiles((teams, _STAGES, ROWS, channels))
  statistics = plgpu.SMEM((teams, _STAGES, ROWS), jnp.float32)
  of_query, of_key, of_value = plgpu.kernel(
    bind(_gradient_kernel, form=form),
    out_type=(
      jax.ShapeDtypeStruct((blocks, *query.shape), dtype),
      jax.ShapeDtypeStruct(key.shape, dtype),
      jax.ShapeDtypeStruct(value.shape, dtype),
    ),
    scratch_types={
      "tiles": _Tiles(
        key=own,
        value=own,
        query=flying,
        gradient=flying,
        log_sum=statistics,
        dot=statistics,
        score=tiles((teams, _PLACES, warpgroups, ROWS, ROWS)),
        result=own,
      ),
      "own_ready": barriers(teams, 2 * warpgroups),
      "ready": barriers(teams * _STAGES, 4),
      "scores_ready": barriers(teams * warpgroups, warpgroups),
      "scores_read": barriers(teams * warpgroups),
    },
    grid=(pl.cdiv(heads, teams), blocks, batch),
    grid_names=("head", "tile", "batch"),
    num_threads=teams * warpgroups,
    thread_name="warpgroup",
    compiler_params=COMPILER,
  )(
    query_length,
    key_length,
    query,
    key,
    value,
    log_sum,
    _dots(output, gradient),
    gradient,
  )
  of_query = _add_tiles(of_query, form.keys, query_length, key_length)
  return of_query, of_key, of_value
