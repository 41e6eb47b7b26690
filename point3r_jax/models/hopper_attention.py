"""Attention as one kernel for NVIDIA's Hopper GPUs (compute capability 9).

Some warpgroups work on queries, one more fetches keys and values for them: what
FlashAttention-3 (arXiv 2407.08608) and `pallas.ops.gpu.attention_mgpu` of JAX
do, in its simplest form. Unlike cuDNN's kernel this one passes over queries,
too, that are beyond a length, and needs no memory cleared before. In training,
and of many streams or frames, it also fetches what a block computes next.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple, TypeVar

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from point3r_jax.models.hopper import (
  COMPILER,
  TILE,
  barriers,
  bind,
  divide,
  divide_up,
  multiprocessors,
  shared_tiles,
  slot,
  tile_channels,
)

# Rows of a warpgroup's matrix products, here queries; steps whose keys are in
# flight.
ROWS = 64
_STAGES = 2
# Blocks stay for one task after the other if each has at least so many.
_TASKS_THAT_STAY = 3
# What registers hold of a head in the backward pass: the sums of a warpgroup's
# keys and values. Of so many shared memory holds two tasks' queries, too.
MOST_CHANNELS_BACKWARD = 64

# A form of this kernel or of that of the gradients.
_AnyForm = TypeVar("_AnyForm")


class _Form(NamedTuple):
  """A shape of blocks, each of which has a multiprocessor to itself.

  Attributes:
    computing: warpgroups that compute. More share what is fetched; fewer leave
      less undone where tasks are few.
    keys: of a step, at most.
    channels: the most a head may have, for what registers and shared memory
      hold.
    registers: of a thread that computes, and of one that fetches; not more than
      all have at first, or threads wait for them forever.
    turn: time of a task that is a block's only one, measured, relative to the
      others'.
  """

  computing: int
  keys: int
  channels: int
  registers: tuple[int, int]
  turn: float

  def tasks(self, queries: int) -> int:
    """Returns how many tasks so many queries of a head make."""
    return -(-queries // (self.computing * ROWS))

  def share(self, keys: int, channels: int) -> _Form:
    """Returns a form whose steps have equal shares of a head's keys.

    Args:
      keys: of a head.
      channels: of a head, of 16 bits. Matrix units take keys in multiples of
        what `tile_channels` says.
    """
    steps = -(-keys // self.keys)
    block = tile_channels(channels, 16)
    return self._replace(keys=block * -(-keys // (steps * block)))


_FORMS = (
  _Form(3, 128, 128, (160, 32), 4.0),
  _Form(2, 128, 128, (232, 40), 3.0),
  _Form(5, 64, 48, (88, 40), 7.0),
  _Form(4, 64, 64, (112, 32), 5.6),
)


def quickest(forms: Iterable[_AnyForm], heads: int, tokens: int) -> _AnyForm:
  """Returns the form that takes the least time, the first of equals.

  Args:
    forms: with `tasks` of so many tokens of a head, and the time of a `turn`,
      in which all multiprocessors take a task each.
    heads: of all sequences.
    tokens: that a form's tasks divide.
  """

  def time(form):
    return -(-heads * form.tasks(tokens) // multiprocessors()) * form.turn

  return min(forms, key=time)


def check_backward(channels: int) -> None:
  """Raises ValueError for heads too wide for the backward pass."""
  if channels > MOST_CHANNELS_BACKWARD:
    raise ValueError(
      f"heads have {channels} channels, but the backward pass of this kernel "
      f"takes {MOST_CHANNELS_BACKWARD} at most; ask for another implementation "
      "of attention"
    )


def _choose(heads: int, queries: int, channels: int) -> _Form:
  """Returns the quickest form of those that hold so many channels."""
  forms = [form for form in _FORMS if channels <= form.channels]
  if not forms:
    most = max(form.channels for form in _FORMS)
    raise ValueError(
      f"heads have {channels} channels, but this kernel takes {most} at most; "
      "ask for another implementation of attention"
    )
  return quickest(forms, heads, queries)


_ROW = TILE.reduce(1)


def _attention_kernel(
  query_length,
  key_length,
  query,
  key,
  value,
  output,
  log_sum=None,
  *,
  form,
  value_head,
  blocks,
  query_tiles,
  key_tiles,
  value_tiles,
  result_tiles,
  query_ready,
  key_ready,
  value_ready,
  query_read,
  key_read,
  value_read,
  log_sum_tiles=None,
):
  """What each of so many blocks of warpgroups does: one task after the other.

  A task is some queries of a head. While one is computed, what the next one
  needs is fetched.

  Other arguments are references: the operands and the results in global memory,
  then tiles of them in shared memory, the computing warpgroups' queries of one
  or two tasks, the keys and values of `_STAGES` steps and the results of one
  task, and barriers. What is `ready` has arrived in its tile; where all
  warpgroups have `read`, the next may come.
  """
  block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
  batch_size, num_queries, heads, channels = query.shape
  computing, places = form.computing, query_tiles.shape[0]
  tasks_of_head = form.tasks(num_queries)
  all_tasks = batch_size * heads * tasks_of_head
  tasks = divide_up(all_tasks - block, blocks)

  def task(number):
    """Returns sample, head, first query, keys and steps of a task."""
    rest, head = divide(block + number * blocks, heads)
    batch, part = divide(rest, tasks_of_head)
    first = part * (computing * ROWS)
    # Tasks beyond the queries' length see no keys, and zeros come out.
    keys = jnp.where(first < query_length[batch], key_length[batch], 0)
    return batch, head, first, keys, divide_up(keys, form.keys)

  def compute(number, before):
    """Computes a task after so many steps; returns how many there are then."""
    batch, head, first, keys, steps = task(number)
    rows = pl.ds(first + warpgroup * ROWS, ROWS)
    place = slot(number, places)
    own_queries = query_tiles.at[place, warpgroup]
    scale = channels**-0.5 * math.log2(math.e)  # The hardware knows exp2.

    def attend(step, carry):
      total, peak, norm = carry
      here = slot(before + step, _STAGES)

      def multiply_keys(scores):
        plgpu.wgmma(scores, own_queries, key_tiles.at[here].T)
        return scores[...]

      def mask(scores):
        column = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=TILE)
        return jnp.where(step * form.keys + column < keys, scores, -jnp.inf)

      def along_rows(x, like):
        return lax.broadcast_in_dim(x, like.shape, [0])

      plgpu.barrier_wait(key_ready.at[here])
      scores = pl.run_scoped(
        multiply_keys, plgpu.ACC((ROWS, form.keys), jnp.float32)
      )
      plgpu.barrier_arrive(key_read.at[here])
      beyond = (step + 1) * form.keys > keys
      scores = lax.cond(beyond, mask, lambda scores: scores, scores)
      new_peak = jnp.maximum(peak, scores.max(axis=1) * scale)
      weights = jnp.exp2(scores * scale - along_rows(new_peak, scores))
      shrink = jnp.exp2(peak - new_peak)
      norm = norm * shrink + weights.sum(axis=1)
      total *= along_rows(shrink, total)
      weights = weights.astype(value_tiles.dtype)

      def add_values(total):
        plgpu.wgmma(total, weights, value_tiles.at[here])

      plgpu.barrier_wait(value_ready.at[here])
      total = pl.run_state(add_values)(plgpu.ACC.init(total))
      plgpu.barrier_arrive(value_read.at[here])
      return total, new_peak, norm

    def fill(shape, value, layout):
      return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    carry = (
      fill((ROWS, channels), 0.0, TILE),
      fill((ROWS,), -jnp.inf, _ROW),
      fill((ROWS,), 0.0, _ROW),
    )
    plgpu.barrier_wait(query_ready.at[place])
    total, peak, norm = lax.fori_loop(0, steps, attend, carry)
    factor = 1 / (norm + float(jnp.finfo(jnp.float32).tiny))
    total *= lax.broadcast_in_dim(factor, total.shape, [0])

    plgpu.barrier_arrive(query_read.at[place])
    # Until the results of the task before have left their tiles.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    result = result_tiles.at[warpgroup]
    result[...] = total.astype(result.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(result, output.at[batch, rows, head])
    if log_sum is not None:
      sums = log_sum_tiles.at[warpgroup]
      # Without keys infinite, so that weights are zero in the backward pass.
      sums[...] = jnp.where(norm > 0, peak + jnp.log2(norm), jnp.inf)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(sums, log_sum.at[batch, head, rows])
    return before + steps

  def fetch(number, before):
    """Fetches what a task needs; for the rest see `compute`."""
    batch, head, first, _, steps = task(number)
    place = slot(number, places)

    @pl.when(number >= places)
    def _():
      plgpu.barrier_wait(query_read.at[place])

    @pl.loop(0, computing)
    def _(other):
      plgpu.copy_gmem_to_smem(
        query.at[batch, pl.ds(first + other * ROWS, ROWS), head],
        query_tiles.at[place, other],
        query_ready.at[place],
      )

    @pl.loop(0, steps)
    def _(step):
      here = slot(before + step, _STAGES)
      rows = pl.ds(step * form.keys, form.keys)
      for source, first_head, tiles, ready, read in (
        (key, 0, key_tiles, key_ready, key_read),
        (value, value_head, value_tiles, value_ready, value_read),
      ):

        @pl.when(before + step >= _STAGES)
        def _(read=read):
          plgpu.barrier_wait(read.at[here])

        plgpu.copy_gmem_to_smem(
          source.at[batch, rows, first_head + head],
          tiles.at[here],
          ready.at[here],
        )

    return before + steps

  def compute_all():
    plgpu.set_max_registers(form.registers[0], action="increase")
    lax.fori_loop(0, tasks, compute, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)

  def fetch_all():
    plgpu.set_max_registers(form.registers[1], action="decrease")
    lax.fori_loop(0, tasks, fetch, jnp.int32(0))

  lax.cond(warpgroup < computing, compute_all, fetch_all)


# Calls of like shapes share what takes seconds to compile.
@functools.partial(jax.jit, static_argnames=("value_head", "keep_log_sum"))
def hopper_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  query_length: jax.Array,
  key_length: jax.Array,
  *,
  value_head: int = 0,
  keep_log_sum: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """Scaled dot-product attention with scale d^-0.5; softmax in float32.

  Args:
    query: (B, N, heads, d) bfloat16 or float16, d a multiple of 16 up to 128,
      with `keep_log_sum` 64, N and M multiples of 8.
    key: (B, M, heads, d), of the same type; so is value.
    value: (B, M, heads, d), or of more heads.
    query_length: (B,) int32, the valid prefix of queries.
    key_length: (B,) int32, the valid prefix of keys, at least 1.
    value_head: the first of the values' heads that counts.
    keep_log_sum: whether to return what `hopper_attention_gradient` needs.

  Returns:
    (B, N, heads, d) in the query's type. Beyond the query's length there is
    something finite. With `keep_log_sum` also (B, heads, N or more) float32,
    the binary logarithm of the sum of each query's weights.

  Raises:
    ValueError: for heads with more channels.
  """
  batch, num_queries, heads, channels = query.shape
  dtype = query.dtype
  if keep_log_sum:
    check_backward(channels)
  form = _choose(batch * heads, num_queries, channels)
  form = form.share(key.shape[1], channels)
  computing = form.computing
  tasks = batch * heads * form.tasks(num_queries)
  # With a backward pass to come, kernels follow one another. Beside others, as
  # in streams, a block may wait for a multiprocessor, and its tasks with it:
  # that is only for the many tasks of several streams or frames. Of wide heads
  # shared memory holds but one task's queries.
  narrow = channels <= MOST_CHANNELS_BACKWARD
  many = tasks >= _TASKS_THAT_STAY * multiprocessors()
  stay = keep_log_sum or (narrow and many)
  blocks = min(tasks, multiprocessors()) if stay else tasks
  places = 1 if blocks == tasks else 2
  result = jax.ShapeDtypeStruct(query.shape, dtype)
  scratch = {
    "query_tiles": shared_tiles((places, computing, ROWS, channels), dtype),
    "key_tiles": shared_tiles((_STAGES, form.keys, channels), dtype),
    "value_tiles": shared_tiles((_STAGES, form.keys, channels), dtype),
    "result_tiles": shared_tiles((computing, ROWS, channels), dtype),
    "query_ready": barriers(places, computing),
    "key_ready": barriers(_STAGES),
    "value_ready": barriers(_STAGES),
    "query_read": barriers(places, computing),
    "key_read": barriers(_STAGES, computing),
    "value_read": barriers(_STAGES, computing),
  }
  if keep_log_sum:
    # Of whole tasks: rows of this array are copied without regard to its end.
    rows = form.tasks(num_queries) * computing * ROWS
    log_sum = jax.ShapeDtypeStruct((batch, heads, rows), jnp.float32)
    result = result, log_sum
    scratch["log_sum_tiles"] = plgpu.SMEM((computing, ROWS), jnp.float32)
  return plgpu.kernel(
    bind(_attention_kernel, form=form, value_head=value_head, blocks=blocks),
    out_type=result,
    scratch_types=scratch,
    grid=(blocks,),
    grid_names=("block",),
    num_threads=computing + 1,
    thread_name="warpgroup",
    compiler_params=COMPILER,
  )(query_length, key_length, query, key, value)
