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

_OCTAVES = 4
_GAIN = 0.7  # Amplitude of an octave over that of the one before,
_LACUNARITY = 2.3  # and its frequency.
_FACTORS = (0x8DA6B343, 0xD8163841, 0xCB1AB31F)  # Odd, of random bits.


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


def _spread(x: jax.Array, factor: int) -> jax.Array:
  """Turns whole numbers into uint32 that differ in all bits."""
  return x.astype(jnp.int32).astype(jnp.uint32) * jnp.uint32(factor)


def _hash(x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
  """Mixes spread numbers to one in [0, 1) that looks random."""
  n = x ^ y ^ z.astype(jnp.uint32)
  n = (n ^ (n >> 13)) * jnp.uint32(0x5BD1E995)
  n = (n ^ (n >> 15)) * jnp.uint32(0x27D4EB2D)
  return (n >> 8).astype(jnp.float32) * 2.0**-24


def _value_noise(point: jax.Array) -> jax.Array:
  """Smooth noise in [0, 1] with one random value a unit; (3, ...) -> (...)."""
  cell = jnp.floor(point)
  f = point - cell
  fx, fy, fz = f * f * (3 - 2 * f)
  x, y, z = (_spread(cell[i], factor) for i, factor in enumerate(_FACTORS))
  x1, y1, z1 = (
    v + jnp.uint32(factor)
    for v, factor in zip((x, y, z), _FACTORS, strict=True)
  )

  def along_x(y, z):
    low, high = _hash(x, y, z), _hash(x1, y, z)
    return low + (high - low) * fx

  def along_xy(z):
    low, high = along_x(y, z), along_x(y1, z)
    return low + (high - low) * fy

  low, high = along_xy(z), along_xy(z1)
  return low + (high - low) * fz


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
  total = sum(_GAIN**k for k in range(_OCTAVES))
  return 0.5 + jnp.sum(_GAIN**octave * seen * values, axis=0) / total


def _fade(pattern: jax.Array, footprint: jax.Array, mean) -> jax.Array:
  """Fades a pattern of period 1 to its mean before it would alias."""
  return pattern + (mean - pattern) * jnp.clip(2 * footprint - 0.5, 0, 1)


def _wave(x: jax.Array, footprint: jax.Array, duty=0.5) -> jax.Array:
  """A square wave of period 1, blurred over a pixel; `duty` of it is 1."""
  distance = jnp.abs(x - jnp.floor(x) - 0.5)  # From the middle of the ones.
  edge = jnp.clip(0.5 + (duty / 2 - distance) / footprint, 0, 1)
  return _fade(edge, footprint, duty)


def _pattern(
  kind: jax.Array, uv: jax.Array, cloud: jax.Array, footprint: jax.Array
) -> jax.Array:
  """Returns (R,) patterns; lengths are periods, `cloud` is noise."""
  u, v = uv
  across, along = _wave(u, footprint), _wave(v, footprint)
  # Tiles are laid in courses, every other one moved by half a tile; planks of
  # wood lie side by side. Each has its own tone, and dark joints.
  wood = kind == WOOD
  course = jnp.where(wood, 0, jnp.floor(2 * v))
  moved = jnp.where(wood, u, u + 0.5 * (course - 2 * jnp.floor(v)))
  tone = _hash(
    _spread(jnp.floor(moved), _FACTORS[0]), _spread(course, _FACTORS[1]), kind
  )
  tone = _fade(tone, footprint, 0.5)
  joints = _wave(moved + 0.5, footprint, 0.95)
  courses = _wave(2 * v + 0.5, 2 * footprint, 0.9)
  rings = _wave(6 * u + 6 * cloud, 6 * footprint)
  du, dv = u - jnp.floor(u) - 0.5, v - jnp.floor(v) - 0.5
  inside = 0.3 - jnp.sqrt(du * du + dv * dv)
  patterns = {
    PLAIN: 1.5 * cloud - 0.25,
    MARBLE: jnp.clip(5 * cloud - 2, 0, 1),
    CHECKER: across + along - 2 * across * along,
    STRIPES: across,
    WOOD: joints * (0.2 * rings + 0.4 * cloud + 0.4 * tone),
    TILES: joints * courses * (0.45 + 0.5 * tone),
    DOTS: _fade(jnp.clip(0.5 + inside / footprint, 0, 1), footprint, 0.28),
  }
  result = patterns.pop(PLAIN)
  for number, pattern in patterns.items():
    result = jnp.where(kind == number, pattern, result)
  return result


def noise_point(materials: Materials, point: jax.Array) -> jax.Array:
  """Returns where the noise of materials is looked up.

  It is left to the caller, who may want noise for something else as well.

  Args:
    materials: (R,) of them, as `take` gives them.
    point: (3, R) metres, in a frame that moves with the surface.
  """
  return 1.5 * point / materials.period + 31 * materials.shift


def albedo(
  materials: Materials, uv: jax.Array, footprint: jax.Array, cloud: jax.Array
) -> jax.Array:
  """Returns the colours of points on surfaces.

  Args:
    materials: (R,) of them, as `take` gives them.
    uv: (2, R) metres along the surface.
    footprint: (R,) metres, the size of a pixel on the surface.
    cloud: (R,) noise at `noise_point`.

  Returns:
    (3, R) linear colours in [0, 1].
  """
  m = materials
  c, s = jnp.cos(m.angle), jnp.sin(m.angle)
  u, v = uv / m.period
  u, v = c * u - s * v + m.shift[0], s * u + c * v + m.shift[1]
  footprint = jnp.maximum(footprint / m.period, 1e-4)
  pattern = jnp.clip(_pattern(m.kind, (u, v), cloud, footprint), 0, 1)
  colour = m.first + (m.second - m.first) * pattern
  return jnp.clip(colour * (1 + 2 * m.grain * (cloud - 0.5)), 0, 1)
