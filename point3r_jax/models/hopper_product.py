"""Products of 16 bits with an ending of their own, for NVIDIA's Hopper GPUs.

Two warpgroups of a block compute tiles of the result in turn: while one
multiplies, the other one finishes its tile, as in CUTLASS's "ping-pong" kernels
(github.com/NVIDIA/cutlass). A third one fetches for both. Two blocks are a
cluster, whose tiles lie one below the other: what both need is fetched once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
  multiprocessors,
  shared_tiles,
  slot,
)

# Rows and columns of a result's tile, and how many products are summed in a
# step; steps that are in flight, for which shared memory has room.
SIDE = 128
DEPTH = 64
_STAGES = 6
# Half of a tile's columns: as wide as a step, where such a half may come, too.
HALF = SIDE // 2
# What is copied between memories comes in multiples of so many rows.
_ROWS = 8
# Blocks of a cluster, and warpgroups of a block that compute.
BLOCKS = 2
COMPUTING = 2
# Of a thread that computes, and of one that fetches.
_REGISTERS = 232, 40


def suits(shape: tuple[int, ...], columns: int) -> bool:
  """Says whether this is for rows (B, …, N, K) and so many columns.

  N decides, so that samples may be split over devices.
  """
  rows, depth = shape[-2:]
  whole = not (rows % _ROWS or depth % DEPTH or columns % SIDE)
  return whole and len(shape) > 2


def span(tile: jax.Array, half: int | None = None) -> pl.Slice:
  """Returns the rows or columns of a result's tile, or half of these."""
  if half is None:
    return pl.ds(tile * SIDE, SIDE)
  return pl.ds(tile * SIDE + half * HALF, HALF)


class Tile(NamedTuple):
  """A tile of the result, for who finishes it.

  Attributes:
    warpgroup: that computes it.
    row: its place in the result, in tiles.
    column: the same.
    total: (128, 128) float32, the product, with the bias if there is one.
    last: halves (128, 64) of what came in a last step, if one did.
  """

  warpgroup: jax.Array
  row: jax.Array
  column: jax.Array
  total: jax.Array
  last: tuple[jax.Array, ...]

  def half(self, number: int) -> jax.Array:
    """Returns half of the columns, (128, 64)."""
    first = number * HALF
    return lax.slice(self.total, (0, first), (SIDE, first + HALF))

  def send(
    self,
    half: jax.Array,
    number: int,
    tiles: Any,
    results: Sequence[Any],
    which: jax.Array | int = 0,
  ) -> None:
    """Sends half of the columns by way of shared memory, in order.

    To one of several results.
    """
    tile = tiles.at[self.warpgroup]
    # Until the one before has left its place.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    tile[...] = half.astype(tile.dtype)
    plgpu.commit_smem()
    for index, result in enumerate(results):
      place = result.at[span(self.row), span(self.column, number)]

      @pl.when(which == index)
      def _(place=place):
        plgpu.copy_smem_to_gmem(tile, place)


def multiply_tiles(
  rows: Any,
  across: int,
  columns: Callable[[jax.Array, pl.Slice], Any],
  finish: Callable[[Tile], None],
  *,
  last: Callable[[jax.Array, jax.Array], tuple[Any, Any]] | None = None,
  bias: Any = None,
  bias_tiles: Any = None,
  bias_ready: Any = None,
  transposed: bool,
  clusters: int,
  row_tiles: Any,
  column_tiles: Any,
  ready: Any,
  read: Any,
  done: Any,
) -> None:
  """What each of so many clusters does: one pair of tiles after the other.

  Args:
    rows: (M, K), reference.
    across: tiles of a row of the result.
    columns: where a step's columns are, by their place and the step's slice.
    finish: does the rest with a tile.
    last: where the halves of what else a tile needs are, of the shape of a
      step's rows and columns, by its row and column. They come as a last step.
    bias: (columns,), reference, or None.
    bias_tiles: shared memory for each warpgroup's part of it.
    bias_ready: barriers: that has arrived.
    transposed: whether columns come as rows.
    clusters: how many there are.
    row_tiles: shared memory for each step in flight.
    column_tiles: the same.
    ready: barriers: what a warpgroup waits for has arrived, for each of both
      and each step in flight.
    read: barriers: all blocks of a cluster have read it; the next may come.
    done: barrier: all have done everything.
  """
  cluster, block, warpgroup = (
    lax.axis_index(name) for name in ("cluster", "block", "warpgroup")
  )
  steps = rows.shape[1] // DEPTH
  all_steps = steps + (last is not None)
  down = pl.cdiv(rows.shape[0], BLOCKS * SIDE)
  tiles = divide_up(down * across - cluster, clusters)

  def place(number):
    row, column = divide(cluster + number * clusters, across)
    return row * BLOCKS + block, column

  def compute(turn, _):
    number = turn * COMPUTING + warpgroup
    row, column = place(number)
    before = number * all_steps
    if bias is not None:
      own_bias = bias_tiles.at[warpgroup]
      bias_arrived = bias_ready.at[warpgroup]
      plgpu.copy_gmem_to_smem(bias.at[span(column)], own_bias, bias_arrived)

    def wait(step):
      here = slot(before + step, _STAGES)
      plgpu.barrier_wait(ready.at[warpgroup * _STAGES + here])
      return here

    def release(step):
      plgpu.barrier_arrive(read.at[slot(before + step, _STAGES)])

    def multiply(total):
      @pl.loop(0, steps)
      def _(step):
        here = wait(step)
        right = column_tiles.at[here]
        plgpu.wgmma(total, row_tiles.at[here], right.T if transposed else right)
        plgpu.wgmma_wait(1)

        @pl.when(step > 0)
        def _():
          release(step - 1)

      plgpu.wgmma_wait(0)
      release(steps - 1)
      return total[...]

    total = pl.run_scoped(multiply, plgpu.ACC((SIDE, SIDE), jnp.float32))
    if bias is not None:
      plgpu.barrier_wait(bias_arrived)
      added = plgpu.layout_cast(own_bias[...], COLUMN)
      added = added.astype(jnp.float32)
      total += lax.broadcast_in_dim(added, total.shape, [1])
    halves = ()
    if last is not None:
      here = wait(steps)
      halves = tuple(
        plgpu.layout_cast(half[here], TILE)
        for half in (row_tiles, column_tiles)
      )
      plgpu.commit_smem()  # Until all of the warpgroup have read it.
      release(steps)
    finish(Tile(warpgroup, row, column, total, halves))

  def fetch(number, _):
    row, column = place(number)
    before = number * all_steps
    reader = slot(number, COMPUTING)

    def make_room(step):
      here = slot(before + step, _STAGES)

      @pl.when(before + step >= _STAGES)
      def _():
        plgpu.barrier_wait(read.at[here])

      return here, ready.at[reader * _STAGES + here]

    @pl.loop(0, steps)
    def _(step):
      here, arrived = make_room(step)
      depth = pl.ds(step * DEPTH, DEPTH)
      plgpu.copy_gmem_to_smem(
        rows.at[span(row), depth], row_tiles.at[here], arrived
      )
      plgpu.copy_gmem_to_smem(
        columns(column, depth),
        column_tiles.at[here],
        arrived,
        collective_axes="block",
      )

    if last is not None:
      here, arrived = make_room(steps)
      both = zip(last(row, column), (row_tiles, column_tiles), strict=True)
      for source, half in both:
        plgpu.copy_gmem_to_smem(source, half.at[here], arrived)

  def compute_all():
    plgpu.set_max_registers(_REGISTERS[0], action="increase")
    turns = divide_up(tiles - warpgroup, COMPUTING)
    lax.fori_loop(0, turns, compute, None)
    plgpu.wait_smem_to_gmem(0)

  def fetch_all():
    plgpu.set_max_registers(_REGISTERS[1], action="decrease")
    lax.fori_loop(0, tiles, fetch, None)

  lax.cond(warpgroup < COMPUTING, compute_all, fetch_all)
  # A block may not end while the other one still writes to it.
  plgpu.barrier_arrive(done)
  plgpu.barrier_wait(done)


def multiply_linear(
  x: Any, kernel: Any, bias: Any, finish: Callable[[Tile], None], **own: Any
) -> None:
  """`multiply_tiles` for a linear map, see `run_linear`.

  Args:
    x: (M, K), reference.
    kernel: (K, columns), reference.
    bias: (columns,), reference.
    finish: see there.
    **own: the rest of what is to be found there.
  """

  def columns(column, depth):
    return kernel.at[depth, span(column)]

  across = kernel.shape[1] // SIDE
  multiply_tiles(x, across, columns, finish, bias=bias, transposed=False, **own)


def run(
  kernel: Callable[..., None],
  operands: tuple[jax.Array, ...],
  columns: int,
  step: tuple[int, int],
  results: tuple[jax.ShapeDtypeStruct, ...],
  **scratch: Any,
) -> tuple[jax.Array, ...]:
  """Runs a kernel whose first operand is rows (M, K) of 16 bits.

  Args:
    kernel: what each warpgroup does.
    operands: of it.
    columns: of its result.
    step: shape of a step's columns.
    results: shapes.
    **scratch: shared memory and barriers of its own.
  """
  rows, dtype = operands[0].shape[0], operands[0].dtype
  pairs = pl.cdiv(rows, BLOCKS * SIDE) * (columns // SIDE)
  clusters = min(pairs, multiprocessors() // BLOCKS)

  def cluster_barriers(number, arrivals=1):
    return plgpu.ClusterBarrier(
      collective_axes=("block",), num_barriers=number, num_arrivals=arrivals
    )

  return plgpu.kernel(
    bind(kernel, clusters=clusters),
    out_type=results,
    scratch_types={
      "row_tiles": shared_tiles((_STAGES, SIDE, DEPTH), dtype),
      "column_tiles": shared_tiles((_STAGES, *step), dtype),
      "result_tiles": shared_tiles((COMPUTING, SIDE, HALF), dtype),
      "ready": barriers(COMPUTING * _STAGES, 2),
      "read": cluster_barriers(_STAGES),
      "done": cluster_barriers(1, COMPUTING + 1),
      **scratch,
    },
    grid=(clusters,),
    grid_names=("cluster",),
    cluster=(BLOCKS,),
    cluster_names=("block",),
    num_threads=COMPUTING + 1,
    thread_name="warpgroup",
    compiler_params=COMPILER,
  )(*operands)


def run_linear(
  kernel: Callable[..., None],
  operands: tuple[jax.Array, ...],
  results: tuple[jax.ShapeDtypeStruct, ...],
) -> tuple[jax.Array, ...]:
  """Runs a kernel of a linear map, see `multiply_linear`.

  Args:
    kernel: what each warpgroup does.
    operands: of it: rows (M, K), a matrix (K, columns), a bias (columns,) of
      their type, and others.
    results: shapes.
  """
  rows, matrix, *_ = operands
  return run(
    kernel,
    operands,
    matrix.shape[1],
    (DEPTH, SIDE),
    results,
    bias_tiles=plgpu.SMEM((COMPUTING, SIDE), rows.dtype),
    bias_ready=barriers(COMPUTING),
  )
