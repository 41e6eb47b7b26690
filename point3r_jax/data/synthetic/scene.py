"""Scenes from random numbers: rooms, courtyards and open ground.

The world frame is OpenCV's, in metres: x right, y down, z forward; the floor is
y = 0, and a height h is y = -h. A scene is one hollow solid (the room, or far
away the ends of the ground) with solids in it. Their number is fixed; those
that a scene does not have are inactive.

Objects stand in the cells of a grid, so they do not meet each other. One of the
inner cells, home, stays empty: there is room for a camera in every scene.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from point3r_jax.data.synthetic import textures
from point3r_jax.data.synthetic.draws import Draws
from point3r_jax.data.synthetic.shapes import (
  BOX,
  CYLINDER,
  ELLIPSOID,
  Solids,
  yaw_rotation,
)

_GRID = 4
_CELLS = _GRID * _GRID
_PARTITIONS = 2
_BACKDROP = 8
_MOVERS = 6
_OPEN_HALF = (60.0, 20.0, 60.0)  # The ends of open ground.


@flax.struct.dataclass
class Motion:
  """How P solids move: there and back along a line.

  Attributes:
    reach: (P, 3) metres from the middle to either end; 0 for what stands still.
    frequency: (P,) hertz.
    phase: (P,) periods.
    linear: (P,) bool, at constant speed; otherwise as a pendulum.
  """

  reach: jax.Array
  frequency: jax.Array
  phase: jax.Array
  linear: jax.Array


@flax.struct.dataclass
class Lights:
  """L point lights; only the first casts shadows. The sun is a distant one.

  Attributes:
    position: (L, 3) metres.
    colour: (L, 3) irradiance at the distance `reach`, linear.
    reach: (L,) metres.
    ambient: (3,) irradiance from everywhere.
  """

  position: jax.Array
  colour: jax.Array
  reach: jax.Array
  ambient: jax.Array


@flax.struct.dataclass
class Scene:
  """A scene; the last solid is the hollow one.

  Attributes:
    solids: P of them, at the middle of their motion.
    motion: of the solids.
    materials: P + 2: of the solids (the last: the walls), floor and ceiling.
    lights: two.
    sky_walls: () bool, there are no walls: the sky is seen there.
    sky_ceiling: () bool, there is no ceiling.
    sky: (3, 3) linear colours: at the horizon, overhead, of clouds.
    area: (2,) metres, half the extent in x and z of where objects stand.
    home: (2,) metres, x and z of the middle of the empty cell.
    ceiling: () metres, height above the floor.
  """

  solids: Solids
  motion: Motion
  materials: textures.Materials
  lights: Lights
  sky_walls: jax.Array
  sky_ceiling: jax.Array
  sky: jax.Array
  area: jax.Array
  home: jax.Array
  ceiling: jax.Array


def solids_at(scene: Scene, time: jax.Array) -> Solids:
  """Returns the solids where they are at a time, in seconds."""
  motion = scene.motion
  turn = motion.frequency * time + motion.phase
  zigzag = 4 * jnp.abs(turn - jnp.floor(turn) - 0.5) - 1
  way = jnp.where(motion.linear, zigzag, jnp.sin(2 * jnp.pi * turn))
  center = scene.solids.center + way[:, None] * motion.reach
  return scene.solids.replace(center=center)


@flax.struct.dataclass
class _Site:
  """What the parts of a scene need to know of it; see Scene.

  `open`, `roofless` and `round` are () bool: open ground, a courtyard (or open
  ground), a round room. `cell` is (2,), the size of a cell in metres.
  """

  open: jax.Array
  roofless: jax.Array
  round: jax.Array
  area: jax.Array
  cell: jax.Array
  home_cell: jax.Array
  ceiling: jax.Array

  def cell_center(self, cell) -> jax.Array:
    """Returns (..., 2) metres of (..., 2) columns and rows."""
    return (cell + 0.5) * self.cell - self.area

  @property
  def home(self) -> jax.Array:
    return self.cell_center(self.home_cell)


def _solids(center, half, kind, yaw, active) -> Solids:
  """Makes upright solids; `kind` is BOX, CYLINDER or ELLIPSOID, or (P, 3)."""
  count = center.shape[0]
  return Solids(
    center=center,
    rotation=yaw_rotation(jnp.broadcast_to(yaw, count)),
    half=half,
    round=jnp.broadcast_to(jnp.asarray(kind, jnp.float32), (count, 3)),
    hollow=jnp.zeros(count, bool),
    active=jnp.broadcast_to(active, count),
  )


def _choose(mask, then, otherwise) -> jax.Array:
  """Chooses rows: (P,) bool, (P, 3) or one that all share."""
  return jnp.where(mask[:, None], jnp.asarray(then), jnp.asarray(otherwise))


def _sample_site(draws: Draws, indoor: float) -> _Site:
  """Draws the kind of scene and its size."""
  is_open = ~draws.chance(indoor)
  is_round = draws.chance(0.12) & ~is_open
  area = draws.uniform(2.0, 4.5, (2,))
  area = jnp.where(is_round, area.max(), area)
  area = jnp.where(is_open, draws.uniform(5.0, 9.0, (2,)), area)
  height = draws.uniform(2.3, 3.6)
  return _Site(
    open=is_open,
    roofless=is_open | draws.chance(0.15),
    round=is_round,
    area=area,
    cell=2 * area / _GRID,
    home_cell=1 + draws.integer(2, (2,)),
    ceiling=jnp.where(is_open, 2 * _OPEN_HALF[1], height),
  )


def _sample_shell(site: _Site) -> Solids:
  """The room, or the ends of open ground."""
  room = jnp.stack([site.area[0], site.ceiling / 2, site.area[1]])
  half = jnp.where(site.open, jnp.array(_OPEN_HALF), room)[None]
  center = half * jnp.array([0.0, -1.0, 0.0])
  kind = jnp.where(site.round, jnp.array(CYLINDER), jnp.array(BOX))
  shell = _solids(center, half, kind, 0.0, True)
  return shell.replace(hollow=jnp.ones(1, bool))


def _sample_furniture(draws: Draws, site: _Site) -> tuple[Solids, Solids]:
  """Draws what stands in the cells, and what stands on that.

  A third of it are poles with something wider on top: tables, lamps, trees. The
  rest are boxes, cylinders and ellipsoids, many with a smaller solid on top.
  """
  shape = (_CELLS,)
  cell = np.stack(np.divmod(np.arange(_CELLS), _GRID)[::-1], axis=-1)
  inner = np.all((cell > 0) & (cell < _GRID - 1), axis=-1)
  size = jnp.where(site.open, 1.6, 1.0)
  # Whatever the yaw, within `reach` of its middle a solid stays in its cell.
  reach = 0.44 * site.cell.min() * draws.uniform(0.5, 1.0, shape)
  aspect = draws.uniform(0.5, 1.07, shape)
  kind = draws.uniform(shape=shape)
  is_box, is_ellipsoid = kind < 0.65, kind > 0.85
  pole = draws.chance(0.3, shape)
  is_table = pole & draws.chance(jnp.where(site.open, 0.1, 0.5), shape)

  # What is low can stand in the middle of the room: it leaves a way to see.
  height = draws.log_uniform(0.25, 1.9, shape)
  low = inner & draws.chance(0.7, shape)
  height = size * jnp.where(low, jnp.minimum(height, 0.8), height)
  pole_height = jnp.where(
    is_table, draws.uniform(0.45, 0.9, shape), size * draws.uniform(1.0, 1.6)
  )
  height = jnp.where(pole, pole_height, height)
  half_y = jnp.minimum(height, site.ceiling - 0.7) / 2
  wide, deep = reach * jnp.sin(aspect), reach * jnp.cos(aspect)
  thick = size**2 * draws.uniform(0.03, 0.06, shape)
  half = _choose(
    pole,
    jnp.stack([thick, half_y, thick], -1),
    _choose(
      is_box,
      jnp.stack([wide, half_y, deep], -1),
      jnp.stack([0.9 * reach, half_y, 0.9 * reach], -1),
    ),
  )
  round_kind = _choose(is_ellipsoid & ~pole, ELLIPSOID, CYLINDER)
  kind = _choose(is_box & ~pole, BOX, round_kind)

  # Boxes in border cells may stand against the wall.
  room = (site.cell / 2 - reach[:, None]) * draws.uniform(-1, 1, (*shape, 2))
  where = site.cell_center(cell) + room
  at_wall = is_box & ~pole & ~inner & ~site.open & ~site.round
  at_wall &= draws.chance(0.8, shape)
  side = np.where(cell == 0, -1, np.where(cell == _GRID - 1, 1, 0))
  side[side[:, 0] != 0, 1] = 0  # Corners: along one wall.
  snapped = side * (site.area - half[:, ::2])
  where = jnp.where(at_wall[:, None] & (side != 0), snapped, where)
  yaw = jnp.where(at_wall, 0.0, draws.uniform(0, 2 * jnp.pi, shape))

  distance = jnp.linalg.norm(where, axis=-1)
  fits = ~site.round | (distance + reach < site.area[0])
  active = draws.chance(draws.uniform(0.5, 0.95), shape) & fits
  active &= jnp.any(cell != site.home_cell, axis=-1)
  center = jnp.stack([where[:, 0], -half_y, where[:, 1]], -1)
  base = _solids(center, half, kind, yaw, active)

  # On top: smaller solids on the flat ones, wider ones on poles.
  share = draws.uniform(0.3, 0.7, shape)
  crown = jnp.where(site.open, 1.0, draws.uniform(0.4, 0.9, shape)) * reach
  top_half = _choose(
    pole,
    _choose(
      is_table,
      jnp.stack([wide, thick / 2, deep], -1),
      jnp.stack([crown, crown * draws.uniform(0.5, 1.2, shape), crown], -1),
    ),
    jnp.stack(
      [
        share * half[:, 0],
        draws.log_uniform(0.06, 0.35, shape) * size,
        share * half[:, 2],
      ],
      -1,
    ),
  )
  small = draws.uniform(shape=shape)
  small_kind = _choose(
    small < 0.5, BOX, _choose(small < 0.8, CYLINDER, ELLIPSOID)
  )
  small_kind = _choose(is_table, BOX, small_kind)
  top_kind = _choose(pole & ~is_table, ELLIPSOID, small_kind)
  slip = (half - top_half)[:, ::2].min(-1)
  slip = jnp.where(pole, 0, slip * draws.uniform(-0.7, 0.7, shape))
  # Crowns swallow the end of their pole.
  sunk = jnp.where(pole & ~is_table, 0.4, 1.0) * top_half[:, 1]
  top_y = -2 * half_y - sunk
  top_center = jnp.stack([where[:, 0] + slip, top_y, where[:, 1]], -1)
  turn = jnp.where(pole, 0, draws.uniform(-0.4, 0.4, shape))
  has_top = pole | (~is_ellipsoid & draws.chance(0.5, shape))
  below = top_half[:, 1] - top_y < site.ceiling - 0.2
  top = _solids(
    top_center, top_half, top_kind, yaw + turn, active & has_top & below
  )
  return base, top


def _sample_partitions(draws: Draws, site: _Site) -> Solids:
  """Draws walls between cells that begin at the border: one along x, one z."""
  shape = (_PARTITIONS,)
  line = 1 + draws.integer(_GRID - 1, shape)
  length = draws.uniform(0.8, 1.9, shape)  # Cells.
  middle = jnp.where(draws.chance(0.5, shape), length / 2, _GRID - length / 2)
  along_x = np.array([True, False])
  cell = jnp.where(
    along_x[:, None], jnp.stack([middle, line], -1), jnp.stack([line, middle], -1)
  )
  where = cell * site.cell - site.area
  tall = draws.uniform(0.5, 1.0, shape) * (site.ceiling - 0.35)
  height = jnp.where(site.open, draws.uniform(0.5, 1.6, shape), tall)
  thick = draws.uniform(0.03, 0.06, shape)
  half = jnp.where(
    along_x[:, None],
    jnp.stack([length * site.cell[0] / 2, height / 2, thick], -1),
    jnp.stack([thick, height / 2, length * site.cell[1] / 2], -1),
  )
  center = jnp.stack([where[:, 0], -height / 2, where[:, 1]], -1)
  active = draws.chance(0.45, shape) & ~site.round
  return _solids(center, half, BOX, 0.0, active)


def _sample_backdrop(draws: Draws, site: _Site) -> Solids:
  """Draws pictures and shelves on the walls; in the open, houses and hills."""
  shape = (_BACKDROP,)
  # On the walls: `across` the wall's normal x or z, `side` the low or high one.
  across = np.arange(_BACKDROP) % 2 == 0
  side = np.where(np.arange(_BACKDROP) % 4 < 2, -1.0, 1.0)
  size = draws.uniform(0.15, 0.55, (*shape, 2))
  thick = draws.log_uniform(0.01, 0.12, shape)
  length = jnp.where(across, site.area[1], site.area[0])
  at = draws.uniform(-0.8, 0.8, shape) * length
  wall = side * (jnp.where(across, site.area[0], site.area[1]) - thick)
  height = draws.uniform(0.9, site.ceiling - 0.8, shape)
  picture_center = _choose(
    across, jnp.stack([wall, -height, at], -1), jnp.stack([at, -height, wall], -1)
  )
  wide = jnp.minimum(size[:, 0], 0.9 * length - jnp.abs(at))
  picture_half = _choose(
    across,
    jnp.stack([thick, size[:, 1], wide], -1),
    jnp.stack([wide, size[:, 1], thick], -1),
  )
  pictures = _solids(
    picture_center,
    picture_half,
    BOX,
    0.0,
    draws.chance(0.7, shape) & ~site.round,
  )

  hill = draws.chance(0.4, shape)
  half = _choose(
    hill,
    draws.uniform(jnp.array([6, 1, 6]), jnp.array([14, 4, 14]), (*shape, 3)),
    draws.uniform(jnp.array([1, 1, 1]), jnp.array([4, 4, 4]), (*shape, 3)),
  )
  turn = (jnp.arange(_BACKDROP) + draws.uniform(0, 0.8, shape)) / _BACKDROP
  turn = 2 * jnp.pi * turn
  far = 1.5 * site.area.max() + half[:, ::2].max(-1)
  far = far + draws.log_uniform(1.0, 12.0, shape)
  center = jnp.stack(
    [
      far * jnp.sin(turn),
      jnp.where(hill, 0, -half[:, 1]),
      far * jnp.cos(turn),
    ],
    -1,
  )
  yaw = draws.uniform(0, 2 * jnp.pi, shape)
  outside = _solids(
    center, half, _choose(hill, ELLIPSOID, BOX), yaw, draws.chance(0.85, shape)
  )
  return jax.tree.map(
    lambda x, y: jnp.where(site.open, x, y), outside, pictures
  )


def _sample_movers(
  draws: Draws, site: _Site, moving: float
) -> tuple[Solids, Motion]:
  """Draws balls and boxes that move, and how; home is out of their way."""
  shape = (_MOVERS,)
  half = draws.uniform(0.08, 0.3, (*shape, 3))
  ball = draws.chance(0.5, shape)
  half = _choose(ball, half[:, :1], half)
  # Half of the moves are level.
  level = draws.chance(0.5, shape)
  heading = draws.uniform(0, 2 * jnp.pi, shape)
  climb = jnp.where(level, 0.0, draws.uniform(-1, 1, shape))
  way = jnp.stack([jnp.sin(heading), 0.5 * climb, jnp.cos(heading)], -1)
  reach = way * draws.uniform(0.1, 0.3, (*shape, 1)) * site.area.min()
  size = jnp.linalg.norm(half, axis=-1)
  extent = jnp.linalg.norm(reach, axis=-1) + size
  room = site.area / jnp.where(site.round, jnp.sqrt(2.0), 1.0)
  where = draws.uniform(-1, 1, (*shape, 2)) * (room - extent[:, None])
  low, high = size + jnp.abs(reach[:, 1]), jnp.minimum(site.ceiling, 3.0) - 0.1
  height = low + draws.uniform(shape=shape) * jnp.maximum(high - 2 * low, 0)
  center = jnp.stack([where[:, 0], -height, where[:, 1]], -1)
  clear = jnp.linalg.norm(where - site.home, axis=-1) > extent + 0.5
  solids = _solids(
    center,
    half,
    _choose(ball, ELLIPSOID, BOX),
    draws.uniform(0, 2 * jnp.pi, shape),
    draws.chance(moving) & clear,
  )
  motion = Motion(
    reach=reach,
    frequency=draws.uniform(0.05, 0.3, shape),
    phase=draws.uniform(shape=shape),
    linear=draws.chance(0.5, shape),
  )
  return solids, motion


def _colour(hue, saturation, value) -> jax.Array:
  """Returns (..., 3) colours; all arguments are in [0, 1]."""
  third = jnp.arange(3) / 3
  bright = 0.5 + 0.5 * jnp.cos(2 * jnp.pi * (hue[..., None] - third))
  return value[..., None] * (1 - saturation[..., None] * (1 - bright))


def _sample_materials(
  draws: Draws, site: _Site, count: int
) -> textures.Materials:
  """Draws materials: of `count` objects, then of walls, floor and ceiling."""
  shape = (count + 3,)
  hue = draws.uniform(shape=shape)
  saturation = draws.uniform(0.1, 0.95, shape)
  value = draws.uniform(0.12, 0.9, shape)
  # The room is paler than what is in it, and open ground earthy or green.
  room = np.arange(count + 3) >= count
  floor = np.arange(count + 3) == count + 1
  saturation = jnp.where(room, 0.35 * saturation, saturation)
  value = jnp.where(room & ~floor, 0.45 + 0.5 * value, value)
  value = jnp.where(floor, 0.15 + 0.5 * value, value)
  ground = floor & site.open
  hue = jnp.where(ground, draws.uniform(0.03, 0.33), hue)
  saturation = jnp.where(ground, draws.uniform(0.2, 0.6), saturation)
  first = _colour(hue, saturation, value)
  # The second colour is a shade of the first, or, of objects, any other.
  shade = first * draws.uniform(0.35, 0.8, (*shape, 1))
  other = _colour(
    draws.uniform(shape=shape),
    draws.uniform(0, 0.9, shape),
    draws.uniform(0.1, 0.9, shape),
  )
  second = _choose(draws.chance(0.5, shape) & ~room, other, shade)
  kind = draws.integer(textures.KINDS, shape)
  kind = jnp.where(
    ground & draws.chance(0.7), draws.integer(2), kind
  )
  period = draws.log_uniform(0.06, 0.5, shape)
  period = jnp.where(room, 2 * period, period)
  period = jnp.where(ground, 3 * period, period)
  quarter = jnp.pi / 2 * draws.integer(4, shape)
  angle = quarter + jnp.where(
    draws.chance(0.3, shape), draws.uniform(-0.7, 0.7, shape), 0
  )
  return textures.Materials(
    kind=kind,
    first=first,
    second=second,
    period=period,
    angle=jnp.where(kind == textures.TILES, 0, angle),
    shift=draws.uniform(0, 8, (*shape, 3)),
    grain=draws.uniform(0.15, 0.7, shape),
  )


def _sample_lights(draws: Draws, site: _Site) -> Lights:
  """Draws a lamp near the ceiling, or the sun, and a weaker lamp without one.

  A courtyard has the sun as well.
  """
  span = jnp.stack([site.area[0], jnp.zeros(()), site.area[1]])
  lamp = 0.5 * span * draws.uniform(-1, 1, (3,))
  lamp = lamp.at[1].set(0.15 - site.ceiling)
  heading = draws.uniform(0, 2 * jnp.pi)
  elevation = draws.uniform(0.4, 1.3)
  level = jnp.cos(elevation)
  sun = 100 * jnp.stack(
    [level * jnp.sin(heading), -jnp.sin(elevation), level * jnp.cos(heading)]
  )
  fill = 0.9 * span * draws.uniform(-1, 1, (3,))
  fill = fill.at[1].set(-jnp.minimum(site.ceiling - 0.3, 3.0))
  warmth = draws.uniform(-0.15, 0.15, (2, 1)) * jnp.array([1.0, 0.0, -1.0])
  strength = jnp.stack([draws.uniform(0.8, 1.2), draws.uniform(0.0, 0.5)])
  out = site.roofless
  strength *= jnp.where(out, jnp.array([1.1, 0.0]), 1)
  blue = jnp.where(out, jnp.array([-0.1, 0.0, 0.15]), 0)
  return Lights(
    position=jnp.stack([jnp.where(out, sun, lamp), fill]),
    colour=(1 + warmth) * strength[:, None],
    reach=jnp.stack([jnp.where(out, 100.0, site.ceiling), jnp.array(3.0)]),
    ambient=(1 + blue) * draws.uniform(0.25, 0.5),
  )


def sample_scene(key: jax.Array, *, indoor: float, moving: float) -> Scene:
  """Draws a scene.

  Args:
    key: a random key; the scene is a function of it.
    indoor: the share of rooms and courtyards.
    moving: the share of scenes with moving objects.
  """
  draws = Draws(key, 3000)
  site = _sample_site(draws, indoor)
  movers, motion = _sample_movers(draws, site, moving)
  parts = [
    movers,
    *_sample_furniture(draws, site),
    _sample_partitions(draws, site),
    _sample_backdrop(draws, site),
    _sample_shell(site),
  ]
  solids = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
  count = solids.half.shape[0]
  still = count - _MOVERS
  motion = jax.tree.map(
    lambda x: jnp.pad(x, ((0, still),) + ((0, 0),) * (x.ndim - 1)), motion
  )
  horizon = draws.uniform(0.55, 0.9, (1,)) + jnp.array([0.0, 0.03, 0.08])
  overhead = _colour(
    draws.uniform(0.55, 0.66), draws.uniform(0.3, 0.8), draws.uniform(0.5, 0.9)
  )
  return Scene(
    solids=solids,
    motion=motion,
    materials=_sample_materials(draws, site, count - 1),
    lights=_sample_lights(draws, site),
    sky_walls=site.open,
    sky_ceiling=site.roofless,
    sky=jnp.stack([horizon, overhead, jnp.full(3, 0.9)]),
    area=site.area,
    home=site.home,
    ceiling=site.ceiling,
  )
