"""Camera paths: proposed at random, and chosen by what the cameras see.

A path is drawn several times over. Each proposal is judged by a few rays a
view: is there room around the cameras, do consecutive views overlap, do they
see objects that are neither too near nor too far. The first that satisfies all
is taken. The last proposals are small movements around the scene's empty cell,
where there always is room.

Poses are camera-to-world, OpenCV axes, in metres; so is the world (y down).
Letters: K proposals, T views, R rays.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from point3r_jax.data.synthetic.draws import Draws
from point3r_jax.data.synthetic.scene import Scene, solids_at
from point3r_jax.data.synthetic.shapes import cast, clearance, rotate

# Cameras keep this far from everything, in metres. The scene's empty cell is
# larger than this, small paths and shake together.
MIN_CLEARANCE = 0.2

_PROPOSALS = 40
_HOME_PROPOSALS = 4
_HOME_REACH = 0.1  # Metres.
_SHAKE = 0.05  # Metres and radians, at most.
_PROBES = (6, 8)  # Rows and columns of rays that judge a view.

# Matrix units may round float32 operands to 10 mantissa bits.
_EXACT = lax.Precision.HIGHEST


@flax.struct.dataclass
class _Aim:
  """Where T cameras are and look.

  Attributes:
    position: (T, 3) metres, world.
    yaw: (T,) radians; 0 looks along z, positive turns to x.
    pitch: (T,) radians, positive looks up.
  """

  position: jax.Array
  yaw: jax.Array
  pitch: jax.Array


def _look_at(position: jax.Array, target: jax.Array) -> _Aim:
  """Aims cameras (T, 3) at a target (3,), at most 50 degrees up or down."""
  x, y, z = jnp.moveaxis(target - position, -1, 0)
  pitch = jnp.arctan2(-y, jnp.hypot(x, z))
  return _Aim(position, jnp.arctan2(x, z), jnp.clip(pitch, -0.87, 0.87))


def _polar(center: jax.Array, angle: jax.Array, radius: jax.Array) -> jax.Array:
  """Returns points around a centre (3,), at its height."""
  zero = jnp.zeros_like(angle)
  offset = jnp.stack([jnp.sin(angle), zero, jnp.cos(angle)], -1)
  return center + radius[..., None] * offset


def _capped(step: jax.Array, views: int, cap) -> jax.Array:
  """Returns the length of a path: a step for each view, up to a cap."""
  return jnp.minimum(step * max(views - 1, 1), cap)


def _walk(draws: Draws, start, size, along) -> _Aim:
  """Goes ahead, in a curve, and looks ahead or to a side."""
  views = along.shape[0]
  length = _capped(draws.uniform(0.08, 0.5), views, 0.9 * size)
  heading = draws.uniform(0, 2 * jnp.pi)
  yaw = heading + draws.uniform(-1.2, 1.2) * (along - 0.5)
  moved = _polar(jnp.zeros(3), yaw, jnp.full(views, length))
  # The integral of the heading over the way, centred on its middle.
  steps = jnp.diff(along, prepend=0.0)[:, None] * moved
  position = start + jnp.cumsum(steps, axis=0) - steps.sum(0) / 2
  aside = draws.uniform(-0.8, 0.8)
  pitch = draws.uniform(-0.35, 0.1)
  return _Aim(position, yaw + aside, jnp.full(views, pitch))


def _target(draws: Draws, start: jax.Array) -> jax.Array:
  """Lowers a place to the height of things worth looking at."""
  return start * jnp.array([1.0, 0.0, 1.0]) - jnp.array(
    [0.0, draws.uniform(0.3, 1.2), 0.0]
  )


def _at_height(points: jax.Array, start: jax.Array) -> jax.Array:
  """Lifts points (T, 3) to the height of a place (3,)."""
  return points.at[:, 1].set(start[1])


def _orbit(draws: Draws, start, size, along) -> _Aim:
  """Goes around a place and looks at it."""
  views = along.shape[0]
  target = _target(draws, start)
  turn = draws.sign() * _capped(draws.uniform(0.06, 0.35), views, 5.0)
  angle = draws.uniform(0, 2 * jnp.pi) + turn * along
  radius = draws.uniform(0.25, 0.8) * size + jnp.zeros(views)
  return _look_at(_at_height(_polar(target, angle, radius), start), target)


def _handheld(draws: Draws, start, size, along) -> _Aim:
  """Stands and looks around; the shake is added to all paths later."""
  del size
  views = along.shape[0]
  pan = draws.sign() * _capped(draws.uniform(0.0, 0.2), views, 3.0)
  yaw = draws.uniform(0, 2 * jnp.pi) + pan * along
  drift = draws.uniform(-0.2, 0.2, (3,)) * along[:, None]
  pitch = draws.uniform(-0.4, 0.15)
  return _Aim(start + drift, yaw, jnp.full(views, pitch))


def _revisit(draws: Draws, start, size, along) -> _Aim:
  """Goes once around a loop: the last view is near the first."""
  views = along.shape[0]
  radius = _capped(draws.uniform(0.03, 0.15), views, 0.3 * size)
  phase = 2 * jnp.pi * along
  angle = draws.uniform(0, 2 * jnp.pi) + draws.sign() * phase
  position = _polar(start, angle, jnp.full(views, radius))
  yaw = draws.uniform(0, 2 * jnp.pi) + draws.uniform(0.1, 0.5) * jnp.sin(phase)
  pitch = draws.uniform(-0.35, 0.1)
  return _Aim(position, yaw, jnp.full(views, pitch))


def _unordered(draws: Draws, start, size, along) -> _Aim:
  """Looks at one place from anywhere on one side of it, in no order."""
  views = along.shape[0]
  target = _target(draws, start)
  angle = draws.uniform(0, 2 * jnp.pi) + draws.uniform(-0.5, 0.5, (views,))
  radius = draws.uniform(0.3, 0.9) * size * draws.uniform(0.6, 1.0, (views,))
  position = _at_height(_polar(target, angle, radius), start)
  higher = draws.uniform(-0.3, 0.3, (views,))
  return _look_at(position.at[:, 1].add(higher), target)


_PROPOSERS = {
  "walk": _walk,
  "orbit": _orbit,
  "handheld": _handheld,
  "revisit": _revisit,
  "unordered": _unordered,
}
PATHS = tuple(_PROPOSERS)


def _shrink(aim: _Aim, home: jax.Array) -> _Aim:
  """Makes a path a small one that begins at a place (3,)."""
  offset = aim.position - aim.position[0]
  longest = jnp.linalg.norm(offset, axis=-1).max()
  offset = offset * (_HOME_REACH / jnp.maximum(longest, _HOME_REACH))
  turn = aim.yaw - aim.yaw[0]
  turn = jnp.arctan2(jnp.sin(turn), jnp.cos(turn))
  return _Aim(home + offset, aim.yaw[0] + 0.3 * turn, aim.pitch)


def _pose(aim: _Aim, roll: jax.Array) -> jax.Array:
  """Returns the (T, 4, 4) poses of T cameras; roll (T,) is in radians."""
  zero, one = jnp.zeros_like(roll), jnp.ones_like(roll)

  def matrix(*rows):
    return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)

  c, s = jnp.cos(aim.yaw), jnp.sin(aim.yaw)
  turn = matrix([c, zero, s], [zero, one, zero], [-s, zero, c])
  c, s = jnp.cos(aim.pitch), jnp.sin(aim.pitch)
  tilt = matrix([one, zero, zero], [zero, c, -s], [zero, s, c])
  c, s = jnp.cos(roll), jnp.sin(roll)
  lean = matrix([c, -s, zero], [s, c, zero], [zero, zero, one])
  rotation = jnp.matmul(turn, tilt, precision=_EXACT)
  rotation = jnp.matmul(rotation, lean, precision=_EXACT)
  top = jnp.concatenate([rotation, aim.position[..., None]], axis=-1)
  bottom = jnp.broadcast_to(jnp.array([0.0, 0, 0, 1]), (*roll.shape, 1, 4))
  return jnp.concatenate([top, bottom], axis=-2)


def _propose(
  key: jax.Array,
  path: jax.Array,
  reach: jax.Array,
  at_home: jax.Array,
  scene: Scene,
  views: int,
  paths: tuple[str, ...],
) -> jax.Array:
  """Draws a path.

  Args:
    key: a random key.
    path: () int, an index into `paths`.
    reach: () how far to go, 1 being far for the scene.
    at_home: () bool, make it a small path around the empty cell.
    scene: the scene.
    views: T.
    paths: kinds of paths.

  Returns:
    (T, 4, 4) poses.
  """
  site = scene.site
  draws = Draws(key, 40 + 12 * views)
  height = draws.uniform(0.9, jnp.minimum(site.ceiling - 0.4, 1.9))
  where = draws.uniform(-0.9, 0.9, (2,)) * site.area
  start = jnp.stack([where[0], -height, where[1]])
  home = jnp.stack([site.home[0], -height, site.home[1]])
  size = 1.2 * reach * jnp.minimum(site.area.min(), 5.0)
  # From 0 to 1, in uneven steps.
  even = jnp.arange(views) / max(views - 1, 1)
  jitter = draws.uniform(-0.3, 0.3, (views,)) / max(views - 1, 1)
  inner = (even > 0) & (even < 1)
  along = even + jnp.where(inner, jitter, 0)

  aims = [_PROPOSERS[name](draws, start, size, along) for name in paths]
  aim = jax.tree.map(lambda *x: jnp.stack(x)[path], *aims)
  small = _shrink(aim, home)
  aim = jax.tree.map(lambda x, y: jnp.where(at_home, x, y), small, aim)

  # Hands shake, others less.
  handheld = jnp.array([name == "handheld" for name in paths])[path]
  shake = draws.uniform() * jnp.where(handheld, _SHAKE, 0.3 * _SHAKE)
  shift = shake * draws.uniform(-1, 1, (views, 3))
  turn = shake * draws.uniform(-1, 1, (3, views))
  shaken = _Aim(aim.position + shift, aim.yaw + turn[0], aim.pitch + turn[1])
  return _pose(shaken, draws.uniform(-0.06, 0.06) + turn[2])


def _judge(
  scene: Scene, poses: jax.Array, times: jax.Array, tangents: jax.Array
) -> jax.Array:
  """Returns how good a path is, at most 5; the same for all that will do.

  Args:
    scene: the scene.
    poses: (T, 4, 4).
    times: (T,) seconds.
    tangents: (2,) of half the horizontal and half the vertical field of view.
  """
  grid = jnp.meshgrid(*(jnp.linspace(-0.9, 0.9, n) for n in _PROBES[::-1]))
  rays = jnp.stack([*grid, jnp.ones(_PROBES)]).reshape(3, -1)
  rays *= jnp.append(tangents, 1)[:, None]
  too_far = jnp.where(scene.site.open, 20.0, 10.0)

  def look(pose, time):
    solids = solids_at(scene, time)
    directions = rotate(pose[:3, :3], rays)
    depth, index = cast(solids, pose[:3, 3], directions)
    near = (depth > 0.6) & (depth < too_far)
    bounded = jnp.minimum(depth, too_far)
    relief = jnp.std(bounded) / jnp.mean(bounded)
    free = clearance(solids, pose[:3, 3]).min()
    objects = near & ~solids.hollow[index]
    points = pose[:3, 3, None] + depth * directions
    return points, near, jnp.mean(objects), relief, free

  def overlap(points, near, pose, time):
    offset = points - pose[:3, 3, None]
    x, y, z = rotate(pose[:3, :3].T, offset)
    within = (z > 0) & (jnp.abs(x) < tangents[0] * z)
    within &= jnp.abs(y) < tangents[1] * z
    nearest, _ = cast(solids_at(scene, time), pose[:3, 3], offset)
    return jnp.mean(near & within & (nearest > 0.98))

  points, near, objects, relief, free = jax.vmap(look)(poses, times)
  shared = jax.vmap(overlap)(points[:-1], near[:-1], poses[1:], times[1:])
  free = free.min()
  enough = [
    (free, 1.5 * MIN_CLEARANCE),
    (shared.min(initial=1.0), 0.4),
    (near.mean(-1).min(), 0.7),
    (objects.mean(), 0.2),
    (relief.mean(), 0.3),
  ]
  # What is just enough is so however the numbers have been rounded.
  score = sum(jnp.minimum(got / want + 1e-4, 1) for got, want in enough)
  return jnp.where(free < MIN_CLEARANCE, -1.0, score)


def sample_intrinsics(key: jax.Array, image_size: tuple[int, int]) -> jax.Array:
  """Draws a (3, 3) pinhole camera: 50 to 80 degrees along the longer side.

  Pixels are square, integers are their centres, and the principal point is at
  (W / 2, H / 2).
  """
  height, width = image_size
  angle = jnp.deg2rad(jax.random.uniform(key, minval=50.0, maxval=80.0))
  focal = max(image_size) / 2 / jnp.tan(angle / 2)
  rows = [[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]]
  return jnp.stack([jnp.stack(row) for row in rows])


def sample_path(
  key: jax.Array,
  scene: Scene,
  intrinsics: jax.Array,
  times: jax.Array,
  *,
  image_size: tuple[int, int],
  paths: tuple[str, ...],
) -> jax.Array:
  """Draws a camera path through a scene.

  Args:
    key: a random key.
    scene: where to go.
    intrinsics: (3, 3), pixels.
    times: (T,) seconds, of the views.
    image_size: (H, W).
    paths: the kinds to draw from, of PATHS.

  Returns:
    (T, 4, 4) camera-to-world. Every camera is at least MIN_CLEARANCE from
    everything.
  """
  height, width = image_size
  views = times.shape[0]
  kind_key, key = jax.random.split(key)
  path = jax.random.randint(kind_key, (), 0, len(paths))
  keys = jax.random.split(key, _PROPOSALS)
  reach = np.linspace(1.0, 0.3, _PROPOSALS, dtype=np.float32)
  at_home = np.arange(_PROPOSALS) >= _PROPOSALS - _HOME_PROPOSALS
  tangents = jnp.array([width / 2, height / 2]) / intrinsics[0, 0]
  poses = jax.vmap(
    lambda *proposal: _propose(*proposal, scene, views, paths),
    in_axes=(0, None, 0, 0),
  )(keys, path, reach, at_home)
  scores = jax.vmap(lambda p: _judge(scene, p, times, tangents))(poses)
  return poses[jnp.argmax(scores)]
