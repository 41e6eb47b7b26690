"""Products that end in a GELU's gradient, for NVIDIA's Hopper GPUs.

cuBLAS has a GELU within the product before, but not its gradient within the
product that it is of. Apart from it the gradient would be read and written once
more, and so it would be for a bias, which it is summed for.

Two warpgroups of a block compute tiles of the result in turn: while one
multiplies, the other one finishes its tile, as in CUTLASS's "ping-pong" kernels
(github.com/NVIDIA/cutlass). A third one fetches for both. Two blocks are a
cluster, whose tiles lie one below the other: what both need is fetched once.
"""

from __future__ import annotations

import math

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
# Blocks of a cluster, and warpgroups of a block that compute.
_BLOCKS = 2
_COMPUTING = 2
# Of a thread that computes, and of one that fetches.
_REGISTERS = 232, 40

# GELU's form with tanh: ½x(1 + tanh(A·(x + B·x³))).
_A, _B = (2 / math.pi) ** 0.5, 0.044715

_COLUMN = TILE.reduce(0)


def suits(shape: tuple[int, int]) -> bool:
  """Says whether there is a gradient of what a matrix (C, K) multiplies."""
  columns, depth = shape
  return columns % _SIDE == 0 and depth % _DEPTH == 0


def _slope(x: jax.Array) -> jax.Array:
  """Derivative of the GELU, of x float32, in few instructions."""
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


def _product_kernel(
  gradient,
  kernel,
  x,
  result,
  sums,
  *,
  clusters,
  row_tiles,
  column_tiles,
  result_tiles,
  scratch,
  ready,
  read,
  done,
):
  """What each of so many clusters does: one pair of tiles after the other.

  Other arguments are references: operands and results in global memory; tiles
  in shared memory, of rows and columns that are multiplied, for each step in
  flight, and of the result, for each warpgroup that computes; and barriers.
  What is `ready` for a warpgroup has arrived; where it was `read` in all blocks
  of the cluster the next may come.

  The last step of each tile is no product: both halves of x come there.
  """
  cluster, block, warpgroup = (
    lax.axis_index(name) for name in ("cluster", "block", "warpgroup")
  )
  steps, across = gradient.shape[1] // _DEPTH, kernel.shape[0] // _SIDE
  down = pl.cdiv(gradient.shape[0], _BLOCKS * _SIDE)
  tiles = divide_up(down * across - cluster, clusters)

  def place(number):
    """Returns the rows and columns of a tile, in tiles."""
    row, column = divide(cluster + number * clusters, across)
    return row * _BLOCKS + block, column

  def span(tile, part=0, size=_SIDE):
    return pl.ds(tile * _SIDE + part * size, size)

  def compute(turn, _):
    number = turn * _COMPUTING + warpgroup
    row, column = place(number)
    before = number * (steps + 1)

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
        plgpu.wgmma(total, row_tiles.at[here], column_tiles.at[here].T)
        plgpu.wgmma_wait(1)

        @pl.when(step > 0)
        def _():
          release(step - 1)

      plgpu.wgmma_wait(0)
      release(steps - 1)
      return total[...]

    total = pl.run_scoped(multiply, plgpu.ACC((_SIDE, _SIDE), jnp.float32))
    here = wait(steps)
    halves = [
      plgpu.layout_cast(half[here], TILE) for half in (row_tiles, column_tiles)
    ]
    plgpu.commit_smem()  # Until all of the warpgroup have read it.
    release(steps)
    tile = result_tiles.at[warpgroup]
    for part, half in enumerate(halves):
      first, columns = part * _DEPTH, span(column, part, _DEPTH)
      value = lax.slice(total, (0, first), (_SIDE, first + _DEPTH))
      value *= _slope(half.astype(jnp.float32))
      # Until the half before has left its place.
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      tile[...] = value.astype(tile.dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(tile, result.at[span(row), columns])
      sums[row, columns] = _sum_rows(value, scratch.at[warpgroup])

  def fetch(number, _):
    row, column = place(number)
    before = number * (steps + 1)
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
        gradient.at[span(row), depth], row_tiles.at[here], arrived
      )
      plgpu.copy_gmem_to_smem(
        kernel.at[span(column), depth],
        column_tiles.at[here],
        arrived,
        collective_axes="block",
      )

    here, arrived = make_room(steps)
    for part, half in enumerate((row_tiles, column_tiles)):
      columns = span(column, part, _DEPTH)
      plgpu.copy_gmem_to_smem(x.at[span(row), columns], half.at[here], arrived)

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


# Calls of like shapes share what takes seconds to compile.
@jax.jit
def gelu_gradient_product(
  gradient: jax.Array, kernel: jax.Array, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Gradient of what a GELU was taken of, whose result was multiplied.

  Of GELU's form with tanh.

  Args:
    gradient: (…, K) bfloat16 of the product GELU(x)·kernel; `suits` says which.
    kernel: (1, C, K) of the same type; 1 for `divide_batch`.
    x: (…, C) of the same type.

  Returns:
    (…, C) in their type, and sums of its rows (blocks, C) float32, taken before
    it was rounded.
  """
  depth, columns = gradient.shape[-1], x.shape[-1]
  dtype, shape = x.dtype, x.shape
  gradient, x = gradient.reshape(-1, depth), x.reshape(-1, columns)
  rows = _BLOCKS * pl.cdiv(len(x), _BLOCKS * _SIDE)
  pairs = rows // _BLOCKS * (columns // _SIDE)
  clusters = min(pairs, multiprocessors() // _BLOCKS)

  def cluster_barriers(number, arrivals=1):
    return plgpu.ClusterBarrier(
      collective_axes=("block",), num_barriers=number, num_arrivals=arrivals
    )

  of_x, sums = plgpu.kernel(
    bind(_product_kernel, clusters=clusters),
    out_type=(
      jax.ShapeDtypeStruct(x.shape, dtype),
      jax.ShapeDtypeStruct((rows, columns), jnp.float32),
    ),
    scratch_types={
      "row_tiles": shared_tiles((_STAGES, _SIDE, _DEPTH), dtype),
      "column_tiles": shared_tiles((_STAGES, _SIDE, _DEPTH), dtype),
      "result_tiles": shared_tiles((_COMPUTING, _SIDE, _DEPTH), dtype),
      # For each warp what it has summed.
      "scratch": plgpu.SMEM((_COMPUTING, 4 * _DEPTH), jnp.float32),
      "ready": barriers(_COMPUTING * _STAGES, 2),
      "read": cluster_barriers(_STAGES),
      "done": cluster_barriers(1, _COMPUTING + 1),
    },
    grid=(clusters,),
    grid_names=("cluster",),
    cluster=(_BLOCKS,),
    cluster_names=("block",),
    num_threads=_COMPUTING + 1,
    thread_name="warpgroup",
    compiler_params=COMPILER,
  )(gradient, kernel[0], x)
  return of_x.reshape(shape), sums
