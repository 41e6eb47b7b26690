"""Procedural textures: one colour for each point on a surface.

Every texture is a pattern in [0, 1] that mixes two colours. Patterns are
filtered: what is finer than a pixel fades to its mean, so that distant surfaces
look alike in all views.

Letters: R points; vectors of points are (3, R), points last.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

PLAIN, MARBLE, CHECKER, STRIPES, WOOD, TILES, DOTS = range(7)
KINDS = 7

_OCTAVES = 3
_GAIN = 0.6  # Amplitude of an octave over that of the one before,
_LACUNARITY = 2.2  # and its frequency.


@flax.struct.dataclass
class Materials:
  """The looks of M surfaces. Colours are linear, in [0, 1].

  Attributes:
    kind: (M,) int32, one of the kinds above.
    first: (M, 3) colour where the pattern is 0.
    second: (M, 3) colour where it is 1.
    period: (M,) metres.
    angle: (M,) radians, of the pattern on the surface.
    shift: (M, 3) periods; moves the pattern.
    grain: (M,) how much noise changes the brightness, 0 to 1.
  """

  kind: jax.Array
  first: jax.Array
  second: jax.Array
  period: jax.Array
  angle: jax.Array
  shift: jax.Array
  grain: jax.Array


def _hash(x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
  """Maps integers to numbers in [0, 1) that look random."""
  mixed = [
    v.astype(jnp.int32).astype(jnp.uint32) * jnp.uint32(factor)
    for v, factor in ((x, 0x8DA6B343), (y, 0xD8163841), (z, 0xCB1AB31F))
  ]
  n = mixed[0] ^ mixed[1] ^ mixed[2]
  n = (n ^ (n >> 13)) * jnp.uint32(0x5BD1E995)
  n = (n ^ (n >> 15)) * jnp.uint32(0x27D4EB2D)
  return (n >> 8).astype(jnp.float32) * 2.0**-24


def _value_noise(point: jax.Array) -> jax.Array:
  """Smooth noise in [0, 1] with one random value a unit; (3, ...) -> (...)."""
  cell = jnp.floor(point)
  f = point - cell
  f = f * f * (3 - 2 * f)

  def mix(corner, axis):
    if axis < 0:
      return _hash(*corner)
    low, high = list(corner), list(corner)
    high[axis] = high[axis] + 1
    a, b = mix(low, axis - 1), mix(high, axis - 1)
    return a + (b - a) * f[axis]

  return mix(list(cell), 2)


def noise(point: jax.Array, footprint: jax.Array) -> jax.Array:
  """Returns noise of several octaves.

  Args:
    point: (3, R) in units of the first octave.
    footprint: (R,) the size of a pixel in the same units.

  Returns:
    (R,) in [0, 1], mean 0.5.
  """
  octave = jnp.arange(_OCTAVES, dtype=jnp.float32)[:, None]
  frequency = _LACUNARITY**octave
  # Octaves are moved apart: their lattices would meet at the origin.
  values = _value_noise(point[:, None] * frequency + 17.3 * octave) - 0.5
  seen = jnp.clip(1.5 - 1.5 * footprint * frequency, 0, 1)
  values = _GAIN**octave * seen * values
  return 0.5 + sum(values) / sum(_GAIN**k for k in range(_OCTAVES))


def _wave(x: jax.Array, footprint: jax.Array, duty=0.5) -> jax.Array:
  """A square wave of period 1, blurred over a pixel; `duty` of it is 1."""
  distance = jnp.abs(x - jnp.floor(x) - 0.5)  # From the middle of the ones.
  blur = jnp.maximum(footprint, 1e-4)
  edge = jnp.clip(0.5 + (duty / 2 - distance) / blur, 0, 1)
  coarse = jnp.clip(2 * footprint - 0.5, 0, 1)
  return edge + (duty - edge) * coarse


def _pattern(
  kind: jax.Array, uv: jax.Array, cloud: jax.Array, footprint: jax.Array
) -> jax.Array:
  """Returns (R,) patterns; lengths are periods, `cloud` is noise."""
  u, v = uv
  across, along = _wave(u, footprint), _wave(v, footprint)
  # Tiles are laid in courses, every other one moved by half a tile.
  course = jnp.floor(2 * v)
  moved = u + 0.5 * (course % 2)
  joint = _wave(moved + 0.5, footprint, 0.94) * _wave(
    2 * v + 0.5, 2 * footprint, 0.9
  )
  tile = _hash(jnp.floor(moved), course, kind)
  # Planks: rings that noise bends, each plank its own, with a dark gap.
  plank = jnp.floor(u)
  rings = _wave(
    5 * u + 4 * cloud + 9 * _hash(plank, plank, kind), 5 * footprint
  )
  gap = _wave(u + 0.5, footprint, 0.96)
  du, dv = u - jnp.floor(u) - 0.5, v - jnp.floor(v) - 0.5
  inside = 0.3 - jnp.sqrt(du * du + dv * dv)
  dot = jnp.clip(0.5 + inside / jnp.maximum(footprint, 1e-4), 0, 1)
  coarse = jnp.clip(2 * footprint - 0.5, 0, 1)
  patterns = {
    PLAIN: cloud,
    MARBLE: jnp.clip(3 * cloud - 1, 0, 1),
    CHECKER: across + along - 2 * across * along,
    STRIPES: across,
    WOOD: gap * (0.35 + 0.5 * cloud + 0.3 * rings - 0.15),
    TILES: joint * (0.45 + 0.5 * tile),
    DOTS: dot + (0.28 - dot) * coarse,
  }
  return jnp.select(
    [kind == k for k in patterns], list(patterns.values()), 0.0
  )


def albedo(
  materials: Materials,
  index: jax.Array,
  point: jax.Array,
  uv: jax.Array,
  footprint: jax.Array,
) -> jax.Array:
  """Returns the colours of points on surfaces.

  Args:
    materials: M of them.
    index: (R,) int32, the material of a point.
    point: (3, R) metres, in a frame that moves with the surface.
    uv: (2, R) metres along the surface.
    footprint: (R,) metres, the size of a pixel on the surface.

  Returns:
    (3, R) linear colours in [0, 1].
  """
  m = jax.tree.map(lambda x: jnp.moveaxis(x[index], 0, -1), materials)
  footprint = footprint / m.period
  cloud = noise(1.5 * point / m.period + 31 * m.shift, 1.5 * footprint)
  c, s = jnp.cos(m.angle), jnp.sin(m.angle)
  u, v = uv / m.period
  uv = jnp.stack([c * u - s * v, s * u + c * v]) + m.shift[:2]
  pattern = jnp.clip(_pattern(m.kind, uv, cloud, footprint), 0, 1)
  colour = m.first + (m.second - m.first) * pattern
  return jnp.clip(colour * (1 + 2 * m.grain * (cloud - 0.5)), 0, 1)
