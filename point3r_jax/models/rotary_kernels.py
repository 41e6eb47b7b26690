"""Gradients of queries, keys and values as one, for NVIDIA GPUs in training.

Those of queries and keys are rotated back, put side by side with those of
values, and summed over rows for a bias, all in one kernel. XLA takes two, and
moves two bytes at a time. Written in Pallas for Triton, as `row_kernels`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp

from point3r_jax.models.rotary import RotaryTable, backward_sines
from point3r_jax.models.row_kernels import compiler_params, triton

# Rows of a block, whose columns are summed, and how many it takes at a time.
_BLOCK = 64
_TILE = 16

# The most channels of a block, which has so many whole heads.
_CHANNELS = 256


class _Form(NamedTuple):
  """How gradients of a part's heads are rotated back.

  Attributes:
    columns: the channels (lanes,) of each array that is written.
    valid: (lanes,) bool, since Triton wants a power of two of them.
    rotate: makes these arrays of what reads the gradient, cosines and sines.
  """

  columns: tuple[jax.Array, ...]
  valid: jax.Array
  rotate: Callable[..., tuple[jax.Array, ...]]


def _lanes(size: int) -> jax.Array:
  """Counts to `size`, and on to a power of two."""
  return jax.lax.iota(jnp.int32, pl.next_power_of_2(size))


def _unrotated(channels: int) -> _Form:
  """For values, and where there is no table."""
  lanes = _lanes(channels)
  return _Form((lanes,), lanes < channels, lambda x: (x(lanes),))


def _halves(groups: Sequence[int]) -> _Form:
  """For groups that are alike and even: a channel and its partner at once.

  Both have the same cosine and sine.
  """
  half, pairs = groups[0] // 2, sum(groups) // 2
  lanes = _lanes(pairs)
  # Not // and %, of which Triton cannot tell that they go in runs.
  run, place = jax.lax.div(lanes, half), jax.lax.rem(lanes, half)
  one = run * (2 * half) + place
  other = one + half

  def rotate(x, cos, sin):
    a, b, cos, sin = x(one), x(other), cos(one), sin(one)
    return a * cos + b * sin, b * cos - a * sin

  return _Form((one, other), lanes < pairs, rotate)


def _any(groups: Sequence[int]) -> _Form:
  """For any groups: partners are read once more."""
  lanes = partner = _lanes(sum(groups))
  start = 0
  for size in groups:
    half = (size + 1) // 2  # The first one is the larger one.
    swapped = jnp.where(lanes < start + half, lanes + size - half, lanes - half)
    partner = jnp.where(lanes < start, partner, swapped)
    start += size

  def rotate(x, cos, sin):
    return (x(lanes) * cos(lanes) + x(partner) * sin(lanes),)

  return _Form((lanes,), lanes < start, rotate)


def _form(channels: int, groups: Sequence[int] | None) -> _Form:
  """Returns how to rotate heads of so many channels, by a table's groups."""
  if groups is None:
    return _unrotated(channels)
  alike = len(set(groups)) == 1 and groups[0] % 2 == 0
  return (_halves if alike else _any)(groups)


class _Part(NamedTuple):
  """One of the gradients that are joined.

  Attributes:
    programs: those that read it, each some heads.
    heads: how many these are.
    channels: of a head.
    groups: of the table that it is rotated by, or None.
  """

  programs: range
  heads: int
  channels: int
  groups: tuple[int, ...] | None


def _join_block(gradient, *references, part, block, program, start, rows):
  """Joins a block of rows and some heads of a part.

  References of its gradient (n, D), cosines and sines (m, d) if it is rotated,
  the joined gradient (n, P·D), where the part starts, and sums (blocks, P·D).
  """
  *table, joined, sums = references
  form = _form(part.channels, part.groups)
  heads = jax.lax.iota(jnp.int32, part.heads)
  heads += (program - part.programs.start) * part.heads
  first = heads[None, :, None] * part.channels

  def add_tile(tile, totals):
    row = block * _BLOCK + tile * _TILE + jax.lax.iota(jnp.int32, _TILE)
    valid = (row < rows)[:, None, None] & form.valid

    def reader(reference, row, first):
      def read(lanes):
        place = reference.at[row[:, None, None], first + lanes]
        return triton.load(place, mask=valid, other=0.0).astype(jnp.float32)

      return read

    # Read for each head, so that they are where the gradient is.
    angles = (reader(x, jax.lax.rem(row, x.shape[0]), 0 * first) for x in table)
    results = form.rotate(reader(gradient, row, first), *angles)
    for lanes, result in zip(form.columns, results, strict=True):
      place = joined.at[row[:, None, None], start + first + lanes]
      triton.store(place, result.astype(joined.dtype), mask=valid)
    return tuple(map(jnp.add, totals, results))

  tiles = pl.cdiv(jnp.minimum(rows - block * _BLOCK, _BLOCK), _TILE)
  shape = _TILE, part.heads, form.valid.shape[0]
  totals = tuple(jnp.zeros(shape, jnp.float32) for _ in form.columns)
  totals = jax.lax.fori_loop(0, tiles, add_tile, totals)
  for lanes, total in zip(form.columns, totals, strict=True):
    place = sums.at[block, start + first[0] + lanes]
    triton.store(place, total.sum(axis=0), mask=form.valid[None])


def _join_kernel(*references, parts, rows):
  """Joins a block; references of each part's, and the last of `_join_block`."""
  *inputs, joined, sums = references
  width = parts[0].heads * len(parts[0].programs) * parts[0].channels
  # Not within the conditions, where the interpreter does not know them.
  program, block = pl.program_id(0), pl.program_id(1)
  for number, part in enumerate(parts):
    taken = 1 if part.groups is None else 3
    own, inputs = inputs[:taken], inputs[taken:]
    pl.when((program >= part.programs.start) & (program < part.programs.stop))(
      functools.partial(
        _join_block,
        *own,
        joined,
        sums,
        part=part,
        block=block,
        program=program,
        start=number * width,
        rows=rows,
      )
    )


def join_gradients(
  gradients: Sequence[jax.Array],
  rotary: Sequence[RotaryTable | None],
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Joins gradients of what a product was taken apart to, see `parts`.

  Args:
    gradients: (B, N, heads, d) of each part; heads·d is D.
    rotary: each part's table, by which it was rotated, or None.
    interpret: whether to run without a GPU.

  Returns:
    The product's gradient (B, N, P·D) in their type, and sums of its rows
    (blocks, P·D) float32, taken before it was rounded.
  """
  parts, operands, programs = [], [], 0
  for gradient, table in zip(gradients, rotary, strict=True):
    heads, channels = gradient.shape[2:]
    operands.append(gradient.reshape(-1, heads * channels))
    if table is not None:
      angles = table.cos, backward_sines(table)
      operands += [x.reshape(-1, channels) for x in angles]
    # A power of two, as Triton wants.
    at_once = 1
    while heads % (2 * at_once) == 0 and 2 * at_once * channels <= _CHANNELS:
      at_once *= 2
    stop = programs + heads // at_once
    groups = None if table is None else table.groups
    parts.append(_Part(range(programs, stop), at_once, channels, groups))
    programs = stop
  rows, width = operands[0].shape
  blocks, channels = pl.cdiv(rows, _BLOCK), len(parts) * width
  joined, sums = pl.pallas_call(
    functools.partial(_join_kernel, parts=tuple(parts), rows=rows),
    # Heads first: what is computed at a time is next to each other in memory.
    grid=(programs, blocks),
    out_shape=(
      jax.ShapeDtypeStruct((rows, channels), gradients[0].dtype),
      jax.ShapeDtypeStruct((blocks, channels), jnp.float32),
    ),
    compiler_params=compiler_params(),
    name="join_gradients",
    interpret=interpret,
  )(*operands)
  return joined.reshape(*gradients[0].shape[:2], channels), sums
