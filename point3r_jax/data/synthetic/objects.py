"""The site of a scene and the solids that may be on it.

Objects stand in the cells of a grid, so they do not meet each other. One of the
inner cells, home, stays empty: there is room for a camera in every scene. The
number of solids is fixed; those that a scene does not have are inactive.

The world frame is that of scene.py: metres, y down, the floor at y = 0.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from point3r_jax.data.synthetic.draws import Draws
from point3r_jax.data.synthetic.shapes import (
  BOX,
  CYLINDER,
  ELLIPSOID,
  KINDS,
  Solids,
  dot,
)
from point3r_jax.geometry import quaternion_to_matrix

_GRID = 4
_CELLS = _GRID * _GRID
_PARTITIONS = 2
_BACKDROP = 8
_MOVERS = 6
_OPEN_HALF = (60.0, 20.0, 60.0)  # The ends of open ground.
_ROUND = 1.3  # The radius of a round room, over half the width of its grid.


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
class Site:
  """Where a scene is.

  Attributes:
    open: () bool, open ground; otherwise a room or a courtyard.
    roofless: () bool, there is no ceiling.
    round: () bool, the room is a cylinder.
    area: (2,) metres, half the extent in x and z of where objects stand.
    cell: (2,) metres, the extent of a cell in x and z.
    home_cell: (2,) int32, column and row of the cell that stays empty.
    ceiling: () metres, the height of the room.
  """

  open: jax.Array
  roofless: jax.Array
  round: jax.Array
  area: jax.Array
  cell: jax.Array
  home_cell: jax.Array
  ceiling: jax.Array

  @property
  def home(self) -> jax.Array:
    """Returns (2,), x and z of the middle of the empty cell."""
    return (self.home_cell + 0.5) * self.cell - self.area


@flax.struct.dataclass
class _Draft:
  """P solids as the parts of a scene draw them; see Solids.

  Attributes:
    center: (P, 3).
    half: (P, 3).
    kind: (P,) int, of shapes.KINDS.
    turn: (P, 4) quaternion of any length, real part first.
    active: (P,) bool.
  """

  center: jax.Array
  half: jax.Array
  kind: jax.Array
  turn: jax.Array
  active: jax.Array


def _draft(center, half, kind, yaw, active) -> _Draft:
  """Drafts upright solids; vectors are x, y, z, and all broadcasts to (P,)."""
  half_yaw = jnp.asarray(yaw) / 2
  turn = (jnp.cos(half_yaw), 0, jnp.sin(half_yaw), 0)
  rows = jnp.broadcast_arrays(*center, *half, kind, active, *turn)
  return _Draft(
    center=jnp.stack(rows[:3], axis=-1),
    half=jnp.stack(rows[3:6], axis=-1),
    kind=rows[6],
    turn=jnp.stack(rows[8:], axis=-1),
    active=rows[7],
  )


def sample_site(draws: Draws, indoor: float) -> Site:
  """Draws the kind of scene and its size."""
  is_open = ~draws.chance(indoor)
  is_round = draws.chance(0.12) & ~is_open
  area = draws.uniform(2.0, 4.5, (2,))
  area = jnp.where(is_round, area.max(), area)
  area = jnp.where(is_open, draws.uniform(5.0, 9.0, (2,)), area)
  height = draws.uniform(2.3, 3.6)
  return Site(
    open=is_open,
    roofless=is_open | draws.chance(0.15),
    round=is_round,
    area=area,
    cell=2 * area / _GRID,
    home_cell=1 + draws.integer(2, (2,)),
    ceiling=jnp.where(is_open, 2 * _OPEN_HALF[1], height),
  )


def _draft_shell(site: Site) -> _Draft:
  """The room, or the ends of open ground."""
  width, depth = site.area * jnp.where(site.round, _ROUND, 1.0)
  width = jnp.where(site.open, _OPEN_HALF[0], width)
  depth = jnp.where(site.open, _OPEN_HALF[2], depth)
  half_y = site.ceiling / 2
  kind = jnp.where(site.round, CYLINDER, BOX)
  one = jnp.ones(1)
  return _draft((0, -half_y, 0), (width, half_y, depth), kind, 0 * one, True)


def _draft_furniture(draws: Draws, site: Site) -> tuple[_Draft, _Draft]:
  """Draws what stands in the cells, and what stands on that.

  A third of it are poles with something wider on top: tables, lamps, trees. The
  rest are boxes, cylinders and ellipsoids, many with a smaller solid on top.
  """
  shape = (_CELLS,)
  row, column = np.divmod(np.arange(_CELLS), _GRID)
  last = _GRID - 1
  inner = (row > 0) & (row < last) & (column > 0) & (column < last)
  pole = draws.chance(0.3, shape)
  table = pole & draws.chance(jnp.where(site.open, 0.1, 0.5), shape)
  lamp = pole & ~table
  choice = draws.uniform(shape=shape)
  box, ellipsoid = (choice < 0.65) & ~pole, (choice > 0.85) & ~pole

  # Whatever the yaw, within `reach` of its middle a solid stays in its cell.
  reach = 0.44 * site.cell.min() * draws.uniform(0.5, 1.0, shape)
  aspect = draws.uniform(0.5, 1.07, shape)
  wide, deep = reach * jnp.sin(aspect), reach * jnp.cos(aspect)
  size = jnp.where(site.open, 1.6, 1.0)
  thick = size**2 * draws.uniform(0.03, 0.06, shape)
  # What is low can stand in the middle of the room: it leaves a way to see.
  height = draws.log_uniform(0.25, 1.9, shape)
  low = inner & draws.chance(0.7, shape)
  height = size * jnp.where(low, jnp.minimum(height, 0.8), height)
  lamp_height = size * draws.uniform(1.0, 1.6, shape)
  height = jnp.where(lamp, lamp_height, height)
  height = jnp.where(table, draws.uniform(0.45, 0.9, shape), height)
  height = jnp.minimum(height, site.ceiling - 0.7)
  half_x = jnp.where(pole, thick, jnp.where(box, wide, 0.9 * reach))
  half_z = jnp.where(pole, thick, jnp.where(box, deep, 0.9 * reach))

  # Boxes in border cells may stand against the wall.
  to_wall = box & ~(site.open | site.round) & draws.chance(0.8, shape)
  cell_x, cell_z = site.cell
  free = draws.uniform(-1, 1, (2, *shape))
  x = (column + 0.5) * cell_x - site.area[0] + free[0] * (cell_x / 2 - reach)
  z = (row + 0.5) * cell_z - site.area[1] + free[1] * (cell_z / 2 - reach)
  side_x = np.where(column == 0, -1, np.where(column == last, 1, 0))
  side_z = np.where(row == 0, -1, np.where(row == last, 1, 0))
  side_z[side_x != 0] = 0  # In corners, along one wall.
  x = jnp.where(to_wall & (side_x != 0), side_x * (site.area[0] - half_x), x)
  z = jnp.where(to_wall & (side_z != 0), side_z * (site.area[1] - half_z), z)
  yaw = draws.uniform(0, 2 * jnp.pi, shape)
  yaw = jnp.where(to_wall & ~inner, 0.0, yaw)

  active = draws.chance(draws.uniform(0.5, 0.95), shape)
  active &= (column != site.home_cell[0]) | (row != site.home_cell[1])
  within = jnp.sqrt(x * x + z * z) + reach < _ROUND * site.area[0]
  active &= within | ~site.round
  kind = jnp.where(box, BOX, jnp.where(ellipsoid, ELLIPSOID, CYLINDER))
  half = (half_x, height / 2, half_z)
  base = _draft((x, -height / 2, z), half, kind, yaw, active)

  # Tables have a slab on top, lamps and trees an ellipsoid, which swallows the
  # end of the pole, and some boxes and cylinders something smaller.
  crown = jnp.where(site.open, 1.0, draws.uniform(0.4, 0.9, shape)) * reach
  tall = crown * draws.uniform(0.5, 1.2, shape)
  share = draws.uniform(0.3, 0.7, shape)
  small = size * draws.log_uniform(0.06, 0.35, shape)

  def choose(of_table, of_lamp, other):
    return jnp.where(table, of_table, jnp.where(lamp, of_lamp, other))

  top = (
    choose(wide, crown, share * half_x),
    choose(thick / 2, tall, small),
    choose(deep, crown, share * half_z),
  )
  top_y = -height - jnp.where(lamp, 0.4, 1.0) * top[1]
  slip = (1 - share) * jnp.minimum(half_x, half_z)
  slip = jnp.where(pole, 0, slip * draws.uniform(-0.7, 0.7, shape))
  kind = choose(BOX, ELLIPSOID, draws.integer(3, shape))
  yaw += jnp.where(pole, 0, draws.uniform(-0.4, 0.4, shape))
  active &= pole | (~ellipsoid & draws.chance(0.5, shape))
  active &= top[1] - top_y < site.ceiling - 0.2
  return base, _draft((x + slip, top_y, z), top, kind, yaw, active)


def _draft_partitions(draws: Draws, site: Site) -> _Draft:
  """Draws walls between cells that begin at the border: one along x, one z."""
  shape = (_PARTITIONS,)
  along_x = np.arange(_PARTITIONS) % 2 == 0
  line = 1 + draws.integer(_GRID - 1, shape)
  length = draws.uniform(0.8, 1.9, shape)  # Cells.
  middle = jnp.where(draws.chance(0.5, shape), length / 2, _GRID - length / 2)
  cell_x, cell_z = site.cell
  x = jnp.where(along_x, middle, line) * cell_x - site.area[0]
  z = jnp.where(along_x, line, middle) * cell_z - site.area[1]
  tall = draws.uniform(0.5, 1.0, shape) * (site.ceiling - 0.35)
  height = jnp.where(site.open, draws.uniform(0.5, 1.6, shape), tall)
  thick = draws.uniform(0.03, 0.06, shape)
  half_x = jnp.where(along_x, length * cell_x / 2, thick)
  half_z = jnp.where(along_x, thick, length * cell_z / 2)
  active = draws.chance(0.45, shape) & ~site.round
  half = (half_x, height / 2, half_z)
  return _draft((x, -height / 2, z), half, BOX, jnp.zeros(shape), active)


def _draft_wall_objects(draws: Draws, site: Site) -> _Draft:
  """Draws pictures and shelves on the walls of a room."""
  shape = (_BACKDROP,)
  across_x = np.arange(_BACKDROP) % 2 == 0  # The wall's normal is x, not z.
  side = np.where(np.arange(_BACKDROP) % 4 < 2, -1.0, 1.0)
  thick = draws.log_uniform(0.01, 0.12, shape)
  along = jnp.where(across_x, site.area[1], site.area[0])
  away = jnp.where(across_x, site.area[0], site.area[1])
  at = draws.uniform(-0.8, 0.8, shape) * along
  wall = side * (away - thick)
  wide = jnp.minimum(draws.uniform(0.15, 0.55, shape), along - jnp.abs(at))
  center = (
    jnp.where(across_x, wall, at),
    -draws.uniform(0.9, site.ceiling - 0.8, shape),
    jnp.where(across_x, at, wall),
  )
  half = (
    jnp.where(across_x, thick, wide),
    draws.uniform(0.15, 0.55, shape),
    jnp.where(across_x, wide, thick),
  )
  active = draws.chance(0.7, shape) & ~site.round
  return _draft(center, half, BOX, 0.0, active)


def _draft_horizon(draws: Draws, site: Site) -> _Draft:
  """Draws houses and hills around open ground."""
  shape = (_BACKDROP,)
  hill = draws.chance(0.4, shape)
  half = [
    jnp.where(hill, draws.uniform(*of_hill, shape), draws.uniform(1, 4, shape))
    for of_hill in ((6, 14), (1, 4), (6, 14))
  ]
  turn = (jnp.arange(_BACKDROP) + draws.uniform(0, 0.8, shape)) / _BACKDROP
  turn = 2 * jnp.pi * turn
  far = 1.5 * site.area.max() + jnp.maximum(half[0], half[2])
  far = far + draws.log_uniform(1.0, 12.0, shape)
  y = jnp.where(hill, 0, -half[1])
  return _draft(
    (far * jnp.sin(turn), y, far * jnp.cos(turn)),
    half,
    jnp.where(hill, ELLIPSOID, BOX),
    draws.uniform(0, 2 * jnp.pi, shape),
    draws.chance(0.85, shape),
  )


def _draft_movers(
  draws: Draws, site: Site, moving: float
) -> tuple[_Draft, Motion]:
  """Draws tumbled solids in the air; in moving scenes they move.

  Home is out of their way. Some of the other scenes have them as well, at rest.
  """
  shape = (_MOVERS,)
  moves = draws.chance(moving)
  half = draws.uniform(0.08, 0.3, (3, *shape))
  heading = draws.uniform(0, 2 * jnp.pi, shape)
  climb = draws.uniform(-0.5, 0.5, shape) * draws.chance(0.5, shape)
  length = draws.uniform(0.1, 0.3, shape) * site.area.min() * moves
  way = length * jnp.stack([jnp.sin(heading), climb, jnp.cos(heading)])
  size = jnp.sqrt(dot(half, half))
  extent = jnp.sqrt(dot(way, way)) + size
  room = site.area * jnp.where(site.round, _ROUND / jnp.sqrt(2.0), 1.0)
  x, z = draws.uniform(-1, 1, (2, *shape)) * (room[:, None] - extent)
  low = size + jnp.abs(way[1])
  high = jnp.minimum(site.ceiling - 0.3, 3.0) - low  # Below the lamp.
  height = low + draws.uniform(shape=shape) * jnp.maximum(high - low, 0)
  off_x, off_z = x - site.home[0], z - site.home[1]
  clear = jnp.sqrt(off_x * off_x + off_z * off_z) > extent + 0.5
  active = clear & (moves | draws.chance(0.3))
  draft = _draft((x, -height, z), half, draws.integer(3, shape), 0.0, active)
  motion = Motion(
    reach=way.T,
    frequency=draws.uniform(0.05, 0.3, shape),
    phase=draws.uniform(shape=shape),
    linear=draws.chance(0.5, shape),
  )
  return draft.replace(turn=draws.uniform(-1, 1, (*shape, 4))), motion


def sample_solids(
  draws: Draws, site: Site, moving: float
) -> tuple[Solids, Motion]:
  """Draws what is on a site; the last solid is the hollow one.

  Args:
    draws: random numbers.
    site: where.
    moving: the chance that there are objects that move.
  """
  movers, motion = _draft_movers(draws, site, moving)
  backdrop = jax.tree.map(
    lambda x, y: jnp.where(site.open, x, y),
    _draft_horizon(draws, site),
    _draft_wall_objects(draws, site),
  )
  parts = [
    movers,
    *_draft_furniture(draws, site),
    _draft_partitions(draws, site),
    backdrop,
    _draft_shell(site),
  ]
  draft = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
  count = draft.kind.shape[0]
  solids = Solids(
    center=draft.center,
    rotation=quaternion_to_matrix(draft.turn),
    half=draft.half,
    round=jnp.asarray(KINDS)[draft.kind],
    hollow=jnp.arange(count) == count - 1,
    active=draft.active,
  )
  # All but the first stand still.
  motion = jax.tree.map(
    lambda x: jnp.pad(x, [(0, count - _MOVERS), *[(0, 0)] * (x.ndim - 1)]),
    motion,
  )
  return solids, motion
