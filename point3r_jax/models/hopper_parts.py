"""Products that are taken apart where they are made, for Hopper GPUs.

Queries, keys and values of an attention are parts of one product. XLA reads it
once more to rotate queries and keys, and to put all where attention wants them.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from point3r_jax.models.hopper import TILE, bind, divide
from point3r_jax.models.hopper_product import (
  BLOCKS,
  HALF,
  SIDE,
  multiply_linear,
  run_linear,
  span,
  suits,
)
from point3r_jax.models.rotary import RotaryTable, apply_rotary

# Columns come to threads in runs of so many: a thread that has a column of one
# has its partner in another run.
_RUN = 8

# Before, JAX does not lower what joins columns in registers.
_JOINS_COLUMNS = jax.__version_info__ >= (0, 11)


def suit_parts(shape: tuple[int, ...], columns: int, parts: int) -> bool:
  """Says whether this is for rows (B, N, K), and columns of so many parts."""
  whole = columns % (parts * SIDE) == 0
  return _JOINS_COLUMNS and whole and suits(shape, columns)


def rotates(table: RotaryTable) -> bool:
  """Says whether the kernel can rotate by a table.

  Its groups are alike, and half of a tile has whole ones.
  """
  size = table.groups[0]
  alike = len(set(table.groups)) == 1
  return alike and size % (2 * _RUN) == 0 and HALF % size == 0


def _rotate(
  cos: Any, sin: Any, row: jax.Array, column: jax.Array, x: jax.Array
) -> jax.Array:
  """Rotates a tile of a part.

  Args:
    cos: (M, groups, channels) reference, see `_angles`.
    sin: the same.
    row: place of the tile in its part, in tiles.
    column: the same.
    x: (128, 128) float32.
  """
  _, groups, channels = cos.shape
  size = 2 * channels
  of_tile = SIDE // size
  first = column * of_tile

  def load(angle):
    return [
      plgpu.load(
        angle.at[span(row), lax.rem(first + group, jnp.int32(groups))],
        layout=TILE,
        optimized=False,
      )
      for group in range(groups)
    ]

  # Those of a tile's first groups, which are those of the others, too.
  angles = list(zip(load(cos), load(sin), strict=True))
  rotated = []
  for group in range(of_tile):
    start = group * size
    one, other = (
      lax.slice(x, (0, at), (SIDE, at + channels))
      for at in (start, start + channels)
    )
    cos, sin = angles[group % groups]
    rotated += [one * cos - other * sin, other * cos + one * sin]
  return jnp.concatenate(rotated, axis=1)


def _parts_kernel(x, kernel, bias, *references, tables, result_tiles, **own):
  """Multiplies rows x, adds the bias, rotates, and takes apart.

  References in global memory: operands, cosines and sines of each table,
  results; then room for half of a tile's results for each warpgroup. `tables`
  says by which table each part is rotated, if by any.
  """
  parts = len(tables)
  angles, results = references[:-parts], references[-parts:]
  across = kernel.shape[1] // SIDE // parts

  def finish(tile):
    part, column = divide(tile.column, across)
    total = tile.total
    for number in range(len(angles) // 2):
      members = [part == i for i, table in enumerate(tables) if table == number]
      own = angles[2 * number : 2 * number + 2]
      total = lax.cond(
        functools.reduce(operator.or_, members),
        functools.partial(_rotate, *own, tile.row, column),
        lambda x: x,
        total,
      )
    tile = tile._replace(column=column, total=total)
    for number in range(2):
      tile.send(tile.half(number), number, result_tiles, results, part)

  multiply_linear(x, kernel, bias, finish, **own)


def _angles(table: RotaryTable, batch: int) -> tuple[jax.Array, jax.Array]:
  """Returns cosines and sines, once for a channel and its partner.

  Args:
    table: its groups are alike.
    batch: samples B.

  Returns:
    Each (M, groups, channels) float32, M at least B·N, in whole tiles.
  """
  groups, size = len(table.groups), table.groups[0]

  def spread(x):
    x = x.reshape(*x.shape[:2], groups, 2, size // 2)[:, :, :, 0]
    x = jnp.broadcast_to(x, (batch, *x.shape[1:])).reshape(-1, *x.shape[2:])
    return jnp.pad(x, ((0, -len(x) % (BLOCKS * SIDE)), (0, 0), (0, 0)))

  return spread(table.cos), spread(table.sin)


# Calls of like shapes share what takes seconds to compile.
@functools.partial(jax.jit, static_argnames="forms")
def product_parts(
  x: jax.Array,
  kernel: jax.Array,
  bias: jax.Array,
  tables: Sequence[RotaryTable],
  forms: tuple[tuple[int, int | None], ...],
) -> list[jax.Array]:
  """Takes a product and a bias apart, see `parts.take_apart`.

  Args:
    x: (B, N, K) bfloat16; `suit_parts` says which.
    kernel: (1, K, P·D) of the same type; 1 for `divide_batch`.
    bias: (1, P·D) of the same type.
    tables: by which parts are rotated.
    forms: of each of the P parts how many heads it has, and the number of its
      table, or None.

  Returns:
    Each part (B, N, heads, d) in their type, rotated.
  """
  _, depth, columns = kernel.shape
  rows = x.reshape(-1, depth)
  here = [number for number, table in enumerate(tables) if rotates(table)]
  angles = [
    angle for number in here for angle in _angles(tables[number], len(x))
  ]
  rotated = tuple(
    here.index(number) if number in here else None for _, number in forms
  )
  result = jax.ShapeDtypeStruct((len(rows), columns // len(forms)), x.dtype)
  parts = run_linear(
    bind(_parts_kernel, tables=rotated),
    (rows, kernel[0], bias[0], *angles),
    (result,) * len(forms),
  )
  taken = []
  for part, (heads, number) in zip(parts, forms, strict=True):
    part = part.reshape(*x.shape[:-1], heads, -1)
    if number is not None and number not in here:
      part = apply_rotary(part, tables[number])
    taken.append(part)
  return taken
