"""Products and what belongs to GELUs in one, for NVIDIA's Hopper GPUs.

cuBLAS has a GELU within the product before it, though not as fast as the
product alone, but not its gradient within the product that it is of. Apart from
it the gradient would be read and written once more, and so it would be for a
bias, which it is summed for.

Two warpgroups of a block compute tiles of the result in turn: while one
multiplies, the other one finishes its tile, as in CUTLASS's "ping-pong" kernels
(github.com/NVIDIA/cutlass). A third one fetches for both. Two blocks are a
cluster, whose tiles lie one below the other: what both need is fetched once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

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
)

# Rows and columns of a result's tile, and how many products are summed in a
# step; steps that are in flight, for which shared memory has room.
_SIDE = 128
_DEPTH = 64
_STAGES = 6
# What is copied between memories comes in multiples of so many rows.
_ROWS = 8
# Blocks of a cluster, and warpgroups of a block that compute.
_BLOCKS = 2
_COMPUTING = 2
# Of a thread that computes, and of one that fetches.
_REGISTERS = 232, 40

# GELU's form with tanh: ½x(1 + tanh(A·(x + B·x³))).
_A, _B = (2 / math.pi) ** 0.5, 0.044715

_COLUMN = TILE.reduce(0)


def suits(shape: tuple[int, ...], columns: int) -> bool:
  """Says whether there are kernels for rows (…, N, K) and so many columns.

  N decides, so that samples may be split over devices.
  """
  *_, rows, depth = shape
  return not (rows % _ROWS or depth % _DEPTH or columns % _SIDE)


def _gelu(x: jax.Array) -> jax.Array:
  """The GELU of x float32, in few instructions."""
  half = 0.5 * x
  return half * jnp.tanh(x * (_A * _B * (x * x) + _A)) + half


def _slope(x: jax.Array) -> jax.Array:
  """Its derivative."""
  linear = _A * x
  inner = linear * (_B * (x * x) + 1)
  tanh = jnp.tanh(inner)
  return (tanh * tanh - 1) * (linear - 1.5 * inner) + (0.5 * tanh + 0.5)


def _sum_rows(x: jax.Array, scratch: plgpu.SMEM) -> jax.Array:
  """Sums a tile's rows, by way of shared memory of the warpgroup's own.

  Pallas would have all warpgroups take turns in one place, but not wait.
  """

  @plgpu.inline_mgpu(
    arg_types=(TILE, plgpu.RefType()),
    return_type=plgpu.ShapeDtypeStruct(x.shape[1:], x.dtype, layout=_COLUMN),
  )
  def run(_, x, scratch):
    return x.reduce("add", 0, scratch)

  return run(x, scratch)


def _span(tile: jax.Array, half: int | None = None) -> pl.Slice:
  """Returns the rows or columns of a result's tile, or half of these."""
  if half is None:
    return pl.ds(tile * _SIDE, _SIDE)
  return pl.ds(tile * _SIDE + half * _DEPTH, _DEPTH)


class _Tile(NamedTuple):
  """A tile of the result, for who finishes it.

  Attributes:
    warpgroup: that computes it.
    row: its place in the result, in tiles.
    column: the same.
    total: (128, 128) float32, the product.
    last: halves (128, 64) of what came in a last step, if one did.
  """

  warpgroup: jax.Array
  row: jax.Array
  column: jax.Array
  total: jax.Array
  last: tuple[jax.Array, ...]

  def half(self, number: int) -> jax.Array:
    """Returns half of the columns, (128, 64)."""
    first = number * _DEPTH
    return lax.slice(self.total, (0, first), (_SIDE, first + _DEPTH))

  def send(self, half: jax.Array, number: int, tiles: Any, to: Any) -> None:
    """Sends half of the columns by way of shared memory, in order."""
    tile = tiles.at[self.warpgroup]
    # Until the one before has left its place.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    tile[...] = half.astype(tile.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(
      tile, to.at[_span(self.row), _span(self.column, number)]
    )


def _multiply(
  rows: Any,
  across: int,
  columns: Callable[[jax.Array, pl.Slice], Any],
  finish: Callable[[_Tile], None],
  *,
  last: Callable[[jax.Array, jax.Array], tuple[Any, Any]] | None = None,
  begin: Callable[[jax.Array, jax.Array], None] | None = None,
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
    begin: is called with warpgroup and column before a tile is computed.
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
  steps = rows.shape[1] // _DEPTH
  all_steps = steps + (last is not None)
  down = pl.cdiv(rows.shape[0], _BLOCKS * _SIDE)
  tiles = divide_up(down * across - cluster, clusters)

  def place(number):
    row, column = divide(cluster + number * clusters, across)
    return row * _BLOCKS + block, column

  def compute(turn, _):
    number = turn * _COMPUTING + warpgroup
    row, column = place(number)
    before = number * all_steps
    if begin is not None:
      begin(warpgroup, column)

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

    total = pl.run_scoped(multiply, plgpu.ACC((_SIDE, _SIDE), jnp.float32))
    halves = ()
    if last is not None:
      here = wait(steps)
      halves = tuple(
        plgpu.layout_cast(half[here], TILE)
        for half in (row_tiles, column_tiles)
      )
      plgpu.commit_smem()  # Until all of the warpgroup have read it.
      release(steps)
    finish(_Tile(warpgroup, row, column, total, halves))

  def fetch(number, _):
    row, column = place(number)
    before = number * all_steps
    reader = slot(number, _COMPUTING)

    def make_room(step):
      here = slot(before + step, _STAGES)

      @pl.when(before + step >= _STAGES)
      def _():
        plgpu.barrier_wait(read.at[here])

      return here, ready.at[reader * _STAGES + here]

    @pl.loop(0, steps)
    def _(step):
      here, arrived = make_room(step)
      depth = pl.ds(step * _DEPTH, _DEPTH)
      plgpu.copy_gmem_to_smem(
        rows.at[_span(row), depth], row_tiles.at[here], arrived
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
    turns = divide_up(tiles - warpgroup, _COMPUTING)
    lax.fori_loop(0, turns, compute, None)
    plgpu.wait_smem_to_gmem(0)

  def fetch_all():
    plgpu.set_max_registers(_REGISTERS[1], action="decrease")
    lax.fori_loop(0, tiles, fetch, None)

  lax.cond(warpgroup < _COMPUTING, compute_all, fetch_all)
  # A block may not end while the other one still writes to it.
  plgpu.barrier_arrive(done)
  plgpu.barrier_wait(done)


def _gelu_kernel(
  x,
  kernel,
  bias,
  result,
  product,
  *,
  bias_tiles,
  bias_ready,
  result_tiles,
  **own,
):
  """Multiplies rows x, adds the bias, and takes the GELU.

  References in global memory, then for each warpgroup: room for a tile's bias,
  a barrier for when it is there, room for half of a tile's results.
  """

  def begin(warpgroup, column):
    plgpu.copy_gmem_to_smem(
      bias.at[_span(column)],
      bias_tiles.at[warpgroup],
      bias_ready.at[warpgroup],
    )

  def finish(tile):
    plgpu.barrier_wait(bias_ready.at[tile.warpgroup])
    for number in range(2):
      columns = pl.ds(number * _DEPTH, _DEPTH)
      half = tile.half(number)
      added = plgpu.layout_cast(bias_tiles[tile.warpgroup, columns], _COLUMN)
      added = added.astype(jnp.float32)
      half += lax.broadcast_in_dim(added, half.shape, [1])
      for value, to in ((half, product), (_gelu(half), result)):
        tile.send(value, number, result_tiles, to)

  def columns(column, depth):
    return kernel.at[depth, _span(column)]

  across = kernel.shape[1] // _SIDE
  _multiply(x, across, columns, finish, begin=begin, transposed=False, **own)


def _gelu_gradient_kernel(
  gradient, kernel, x, result, sums, *, result_tiles, scratch, **own
):
  """Multiplies rows of a gradient, and by slopes at x; sums tiles' rows.

  References in global memory, then for each warpgroup: room for half of a
  tile's results, and for what is summed.
  """

  def last(row, column):
    return tuple(x.at[_span(row), _span(column, number)] for number in range(2))

  def finish(tile):
    for number, half in enumerate(tile.last):
      half = tile.half(number) * _slope(half.astype(jnp.float32))
      tile.send(half, number, result_tiles, result)
      total = _sum_rows(half, scratch.at[tile.warpgroup])
      sums[tile.row, _span(tile.column, number)] = total

  def columns(column, depth):
    return kernel.at[_span(column), depth]

  across = kernel.shape[0] // _SIDE
  _multiply(
    gradient, across, columns, finish, last=last, transposed=True, **own
  )


def _run(
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
  pairs = pl.cdiv(rows, _BLOCKS * _SIDE) * (columns // _SIDE)
  clusters = min(pairs, multiprocessors() // _BLOCKS)

  def cluster_barriers(number, arrivals=1):
    return plgpu.ClusterBarrier(
      collective_axes=("block",), num_barriers=number, num_arrivals=arrivals
    )

  return plgpu.kernel(
    bind(kernel, clusters=clusters),
    out_type=results,
    scratch_types={
      "row_tiles": shared_tiles((_STAGES, _SIDE, _DEPTH), dtype),
      "column_tiles": shared_tiles((_STAGES, *step), dtype),
      "result_tiles": shared_tiles((_COMPUTING, _SIDE, _DEPTH), dtype),
      "ready": barriers(_COMPUTING * _STAGES, 2),
      "read": cluster_barriers(_STAGES),
      "done": cluster_barriers(1, _COMPUTING + 1),
      **scratch,
    },
    grid=(clusters,),
    grid_names=("cluster",),
    cluster=(_BLOCKS,),
    cluster_names=("block",),
    num_threads=_COMPUTING + 1,
    thread_name="warpgroup",
    compiler_params=COMPILER,
  )(*operands)


# Calls of like shapes share what takes seconds to compile.
@jax.jit
def product_gelu(
  x: jax.Array, kernel: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The GELU, in its form with tanh, of a product and a bias.

  Args:
    x: (…, K) bfloat16; `suits` says which.
    kernel: (1, K, C) of the same type; 1 for `divide_batch`.
    bias: (1, C) of the same type.

  Returns:
    (…, C) in their type, and x·kernel + bias, the same.
  """
  _, depth, columns = kernel.shape
  shape = *x.shape[:-1], columns
  x = x.reshape(-1, depth)
  result = jax.ShapeDtypeStruct((len(x), columns), x.dtype)
  results = _run(
    _gelu_kernel,
    (x, kernel[0], bias[0]),
    columns,
    (_DEPTH, _SIDE),
    (result, result),
    bias_tiles=plgpu.SMEM((_COMPUTING, _SIDE), x.dtype),
    bias_ready=barriers(_COMPUTING),
  )
  return tuple(x.reshape(shape) for x in results)


@jax.jit
def gelu_gradient_product(
  gradient: jax.Array, kernel: jax.Array, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Gradient of what a GELU was taken of, whose result was multiplied.

  Args:
    gradient: (…, K) bfloat16 of the product GELU(x)·kernel; `suits` says
      which.
    kernel: (1, C, K) of the same type; 1 for `divide_batch`.
    x: (…, C) of the same type.

  Returns:
    (…, C) in their type, and sums of its rows (blocks, C) float32, taken before
    it was rounded.
  """
  shape, depth, columns = x.shape, gradient.shape[-1], x.shape[-1]
  gradient, x = gradient.reshape(-1, depth), x.reshape(-1, columns)
  blocks = _BLOCKS * pl.cdiv(len(x), _BLOCKS * _SIDE)
  of_x, sums = _run(
    _gelu_gradient_kernel,
    (gradient, kernel[0], x),
    columns,
    (_SIDE, _DEPTH),
    (
      jax.ShapeDtypeStruct(x.shape, x.dtype),
      jax.ShapeDtypeStruct((blocks, columns), jnp.float32),
    ),
    # For each warp what it has summed.
    scratch=plgpu.SMEM((_COMPUTING, 4 * _DEPTH), jnp.float32),
  )
  return of_x.reshape(shape), sums
