"""Boxes, cylinders and ellipsoids, and the rays that meet them.

In its own frame and in units of its half extents, every solid is the part of
the cube |x|, |y|, |z| ≤ 1 where w·(x², y², z²) ≤ 1: w is (0, 0, 0) for a box,
(1, 0, 1) for a cylinder along y and (1, 1, 1) for an ellipsoid. So one
branchless function intersects them all. A hollow one is seen from inside.

Letters: P solids, R rays; vectors of rays are (3, R), rays last.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

BOX, CYLINDER, ELLIPSOID = range(3)
KINDS = np.array([(0, 0, 0), (1, 0, 1), (1, 1, 1)], np.float32)

# Matrix units may round float32 operands to 10 mantissa bits.
_EXACT = lax.Precision.HIGHEST
_TINY = 1e-12


@flax.struct.dataclass
class Solids:
  """P solids at one time, in the world frame, in metres.

  Attributes:
    center: (P, 3).
    rotation: (P, 3, 3), from the solid's own axes to the world's.
    half: (P, 3), half extents along the own axes, positive.
    round: (P, 3), w above: a row of KINDS.
    hollow: (P,) bool, seen from inside: rays meet its far side.
    active: (P,) bool; nothing meets the others.
  """

  center: jax.Array
  rotation: jax.Array
  half: jax.Array
  round: jax.Array
  hollow: jax.Array
  active: jax.Array


@flax.struct.dataclass
class Surface:
  """What rays have met; the frame is the solid's own where it says "own".

  Attributes:
    normal: (3, R) unit normals in the world frame, towards the ray's origin.
    point: (3, R) where, in metres in the own frame.
    uv: (2, R) where on the surface, in metres: along the face of a box or the
      cap of a cylinder, around and along y elsewhere.
  """

  normal: jax.Array
  point: jax.Array
  uv: jax.Array


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns (R,) products of (3, R) vectors, either of which may be (3, 1).

  In full precision everywhere, and a sum along a leading axis is slow on CPUs.
  """
  return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def rotate(matrix: jax.Array, vectors: jax.Array) -> jax.Array:
  """Returns (3, R), vectors (3, R) times a matrix (3, 3) or (3, 3, R)."""
  return jnp.stack([dot(row, vectors) for row in matrix])


def take(rows, index: jax.Array):
  """Looks up rows of a pytree of (P, ...) arrays; returns (..., R) arrays."""
  return jax.tree.map(
    lambda x: jnp.moveaxis(jnp.take(x, index, axis=0, mode="clip"), 0, -1), rows
  )


def intersect(
  solid: Solids, origin: jax.Array, directions: jax.Array
) -> jax.Array:
  """Intersects rays with one solid.

  Args:
    solid: without the axis P.
    origin: (3,) of all rays.
    directions: (3, R), of any length but zero.

  Returns:
    (R,) positive distances in units of the direction's length: to where a ray
    enters a solid, or leaves a hollow one; infinite where it does not.
  """
  to_unit = solid.rotation.T / solid.half[:, None]
  o = jnp.sum(to_unit * (origin - solid.center), axis=1)
  near, far = -jnp.inf, jnp.inf
  d = []
  for axis in range(3):
    component = dot(to_unit[axis], directions)
    d.append(jnp.where(jnp.abs(component) < 1e-9, 1e-9, component))
    inverse = 1 / d[axis]
    middle, width = -o[axis] * inverse, jnp.abs(inverse)
    near = jnp.maximum(near, middle - width)
    far = jnp.minimum(far, middle + width)
  # Where w is zero the roots move out to ±1e6, which constrains nothing.
  w = solid.round
  square = dot(w, [x * x for x in d]) + _TINY
  middle = -dot(w * o, d) / square
  # The closest approach to the axis: b² - ac would cancel for distant solids.
  closest = dot(w, [(o[i] + middle * d[i]) ** 2 for i in range(3)])
  width = jnp.sqrt(jnp.maximum(1 - closest, 0) / square)
  near = jnp.maximum(near, middle - width)
  far = jnp.minimum(far, middle + width)
  distance = jnp.where(solid.hollow, far, near)
  meets = solid.active & (closest < 1) & (near < far) & (distance > 0)
  return jnp.where(meets, distance, jnp.inf)


def cast(
  solids: Solids, origin: jax.Array, directions: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Finds what rays from one origin meet first.

  Args:
    solids: P of them.
    origin: (3,).
    directions: (3, R), of any length but zero.

  Returns:
    (R,) distances in units of the direction's length, infinite where nothing is
    met, and (R,) int32, which solid.
  """

  def body(nearest, numbered):
    number, solid = numbered
    distance, index = nearest
    new = intersect(solid, origin, directions)
    closer = new < distance
    return (
      jnp.where(closer, new, distance),
      jnp.where(closer, number, index),
    ), None

  start = (
    jnp.full_like(directions[0], jnp.inf),
    jnp.zeros(directions.shape[1], jnp.int32),
  )
  numbers = jnp.arange(solids.active.shape[0], dtype=jnp.int32)
  return lax.scan(body, start, (numbers, solids))[0]


def occluded(
  solids: Solids, origin: jax.Array, points: jax.Array, margin: float
) -> jax.Array:
  """Says whether solids, hollow ones aside, hide points from an origin.

  Args:
    solids: P of them.
    origin: (3,).
    points: (3, R).
    margin: what is this close in front of a point (metres) is the point itself.

  Returns:
    (R,) bool.
  """
  offset = points - origin[:, None]
  limit = 1 - margin / jnp.sqrt(dot(offset, offset) + _TINY)
  solids = solids.replace(active=solids.active & ~solids.hollow)

  def body(nearest, solid):
    return jnp.minimum(nearest, intersect(solid, origin, offset)), None

  start = jnp.full_like(limit, jnp.inf)
  return lax.scan(body, start, solids)[0] < limit


def surface(solids: Solids, index: jax.Array, points: jax.Array) -> Surface:
  """Describes the surfaces at points on solids.

  Args:
    solids: P of them.
    index: (R,) int32, the solid that a point is on.
    points: (3, R) in the world frame.
  """
  met = take(solids, index)
  offset = points - met.center
  point = rotate(jnp.swapaxes(met.rotation, 0, 1), offset)
  p, w = point / met.half, met.round
  # The face is that of the tightest constraint: a slab or the round part.
  slabs = jnp.where(w > 0, 0, jnp.abs(p))
  tightest = jnp.maximum(jnp.maximum(slabs[0], slabs[1]), slabs[2])
  is_round = jnp.sqrt(dot(w, p * p)) > tightest
  across_x, across_y, _ = slabs == tightest
  axis = jnp.where(across_x, 0, jnp.where(across_y, 1, 2))
  flat = (jnp.arange(3)[:, None] == axis) * jnp.sign(p)
  normal = jnp.where(is_round, w * p / met.half, flat)
  normal = normal / jnp.sqrt(dot(normal, normal) + _TINY)
  normal = rotate(met.rotation, normal)
  x, y, z = point
  around = jnp.arctan2(z, x) * met.half[0]
  u = jnp.where(is_round, around, jnp.where(axis == 0, z, x))
  v = jnp.where(~is_round & (axis == 1), z, y)
  return Surface(
    normal=jnp.where(met.hollow, -normal, normal),
    point=point,
    uv=jnp.stack([u, v]),
  )


def clearance(solids: Solids, point: jax.Array) -> jax.Array:
  """Returns how far a point is from solids, at least; negative if within.

  Exact outside boxes, inside hollow boxes and upright hollow cylinders of equal
  half extents across; smaller than the truth elsewhere, by what a solid's box
  has outside of it.

  Args:
    solids: P of them.
    point: (3,).

  Returns:
    (P,) metres; infinite for solids that are not active.
  """
  local = jnp.einsum(
    "pij,pi->pj", solids.rotation, point - solids.center, precision=_EXACT
  )
  beyond = jnp.abs(local) - solids.half
  outside = jnp.linalg.norm(jnp.maximum(beyond, 0), axis=-1)
  solid = outside + jnp.minimum(beyond.max(axis=-1), 0)
  radius = jnp.linalg.norm(
    jnp.sqrt(solids.round) * local / solids.half, axis=-1
  )
  inside = (1 - radius) * solids.half.min(
    axis=-1, where=solids.round > 0, initial=jnp.inf
  )
  hollow = jnp.minimum(-beyond.max(axis=-1), inside)
  distance = jnp.where(solids.hollow, hollow, solid)
  return jnp.where(solids.active, distance, jnp.inf)
