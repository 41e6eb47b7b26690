"""Rotary position embeddings: 2D patch indices and continuous 3D positions.

Rotary tables are built once a frame and shared by all layers and heads: the
angles depend on positions only. Arithmetic is float32.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


@flax.struct.dataclass
class RotaryTable:
  """Cosines and sines for one set of positions and one head size.

  Attributes:
    cos: (B or 1, N, d) float32, d the channels of a head.
    sin: (B or 1, N, d) float32.
    groups: channels of each coordinate's group, in order; they add up to d.
  """

  cos: jax.Array
  sin: jax.Array
  groups: tuple[int, ...] = flax.struct.field(pytree_node=False)


def _frequencies(size: int, base: float) -> np.ndarray:
  """Returns the (⌈size/2⌉,) inverse frequencies of a group of channels."""
  return base ** (-2 * np.arange((size + 1) // 2) / size)


def rotary_2d(
  grid: tuple[int, int], head_dim: int, base: float = 100.0
) -> RotaryTable:
  """Builds the table of a token grid's integer indices, row-major (y, x).

  The first half of the channels turns with y, the second with x.

  Args:
    grid: (h, w) tokens.
    head_dim: d, a multiple of 4.
    base: frequency base.

  Returns:
    A table with cos and sin of shape (1, h·w, d), constants of the program.
  """
  half = head_dim // 2
  index = np.indices(grid).reshape(2, -1)
  angle = index[..., None] * _frequencies(half, base)
  angle = np.concatenate([angle, angle], axis=-1)
  angle = np.concatenate(list(angle), axis=-1)[None]
  return RotaryTable(
    cos=jnp.asarray(np.cos(angle), jnp.float32),
    sin=jnp.asarray(np.sin(angle), jnp.float32),
    groups=(half, half),
  )


def rotary_3d(
  position: jax.Array, head_dim: int, bases: Sequence[float]
) -> RotaryTable:
  """Builds the hierarchical table of continuous positions (paper, section 3.3).

  The published embedding averages the rotations by several bases. A rotation is
  linear in its cosine and sine, so averaging those gives the same result.

  Args:
    position: (B, N, 3) float32 x, y, z in the global frame.
    head_dim: d; the groups have ⌊d/3⌋, ⌊d/3⌋ and the remaining channels.
    bases: frequency bases.

  Returns:
    A table with cos and sin of shape (B, N, d).
  """
  groups = (head_dim // 3, head_dim // 3, head_dim - 2 * (head_dim // 3))
  cosines, sines = [], []
  for axis, size in enumerate(groups):
    frequency = np.stack([_frequencies(size, base) for base in bases])
    angle = position[..., axis, None, None] * frequency.astype(np.float32)
    cos, sin = jnp.cos(angle).mean(-2), jnp.sin(angle).mean(-2)
    # An odd group drops its last channel: channel and partner then do not pair
    # up as a true rotation. The published weights were trained so.
    cosines += [cos, cos[..., : size // 2]]
    sines += [sin, sin[..., : size // 2]]
  return RotaryTable(
    cos=jnp.concatenate(cosines, axis=-1),
    sin=jnp.concatenate(sines, axis=-1),
    groups=groups,
  )


def disable_where(table: RotaryTable, disabled: jax.Array) -> RotaryTable:
  """Makes the table the identity for the samples where `disabled` (B,)."""
  disabled = disabled[:, None, None]
  return table.replace(
    cos=jnp.where(disabled, 1.0, table.cos),
    sin=jnp.where(disabled, 0.0, table.sin),
  )


def surround_by_identity(
  table: RotaryTable, before: int, after: int
) -> RotaryTable:
  """Puts tokens that are not rotated around: N becomes before+N+after."""
  pad = ((0, 0), (before, after), (0, 0))
  return table.replace(
    cos=jnp.pad(table.cos, pad, constant_values=1.0),
    sin=jnp.pad(table.sin, pad),
  )


def _halves_swapped(groups: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
  """Returns the (d,) source and sign of each channel of [-b, a] for [a, b].

  That is for each group, where a is the larger half if its size is odd.
  """
  source, sign, start = [], [], 0
  for size in groups:
    middle, stop = start + (size + 1) // 2, start + size
    source += [*range(middle, stop), *range(start, middle)]
    sign += [-1.0] * (stop - middle) + [1.0] * (middle - start)
    start = stop
  return np.array(source), np.array(sign, np.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _rotate_half(x: jax.Array, groups: tuple[int, ...]) -> jax.Array:
  """Turns each group [a, b] of the last axis into [-b, a].

  A gather, which joins the products around it in one kernel where slices and
  concatenation do not. Its gradient is one, too, instead of a scatter.
  """
  source, sign = _halves_swapped(groups)
  return jnp.take(x, source, axis=-1, unique_indices=True, mode="clip") * sign


def _rotate_half_forward(x, groups):
  return _rotate_half(x, groups), None


def _rotate_half_backward(groups, _, gradient):
  source, sign = _halves_swapped(groups)
  back = np.argsort(source)
  gradient = gradient * sign
  return (jnp.take(gradient, back, axis=-1, unique_indices=True, mode="clip"),)


_rotate_half.defvjp(_rotate_half_forward, _rotate_half_backward)


def apply_rotary(x: jax.Array, table: RotaryTable | None) -> jax.Array:
  """Rotates queries or keys (B, N, heads, d); no table leaves them as is."""
  if table is None:
    return x
  x32 = x.astype(jnp.float32)
  cos, sin = table.cos[:, :, None], table.sin[:, :, None]
  return (x32 * cos + _rotate_half(x32, table.groups) * sin).astype(x.dtype)


def backward_sines(table: RotaryTable) -> jax.Array:
  """Returns what partners are multiplied by where gradients are rotated back.

  The gradient of `apply_rotary` is that of its result times the cosines, and
  with the halves of each group swapped times these (B or 1, N, d).
  """
  source, sign = _halves_swapped(table.groups)
  return (table.sin * sign)[..., np.argsort(source)]
