"""Scenes from random numbers: rooms, courtyards and open ground.

The world frame is OpenCV's, in metres: x right, y down, z forward; the floor is
y = 0, and a height h is y = -h. A scene is one hollow solid (the room, or far
away the ends of the ground) with solids in it.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from point3r_jax.data.synthetic import textures
from point3r_jax.data.synthetic.draws import Draws
from point3r_jax.data.synthetic.objects import (
  Motion,
  Site,
  sample_site,
  sample_solids,
)
from point3r_jax.data.synthetic.shapes import Solids


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
    sky: (3, 3) linear colours: at the horizon, overhead, of clouds.
    site: where it is; on open ground, the sky is seen where walls would be.
  """

  solids: Solids
  motion: Motion
  materials: textures.Materials
  lights: Lights
  sky: jax.Array
  site: Site


def solids_at(scene: Scene, time: jax.Array) -> Solids:
  """Returns the solids where they are at a time, in seconds."""
  motion = scene.motion
  turn = motion.frequency * time + motion.phase
  zigzag = 4 * jnp.abs(turn - jnp.floor(turn) - 0.5) - 1
  way = jnp.where(motion.linear, zigzag, jnp.sin(2 * jnp.pi * turn))
  center = scene.solids.center + way[:, None] * motion.reach
  return scene.solids.replace(center=center)


def _colour(hue, saturation, value) -> jax.Array:
  """Returns (..., 3) colours; all arguments are in [0, 1]."""
  third = jnp.arange(3) / 3
  bright = 0.5 + 0.5 * jnp.cos(2 * jnp.pi * (hue[..., None] - third))
  return value[..., None] * (1 - saturation[..., None] * (1 - bright))


def _sample_materials(
  draws: Draws, site: Site, count: int
) -> textures.Materials:
  """Draws materials: of `count` objects, then of walls, floor and ceiling."""
  shape = (count + 3,)
  hue = draws.uniform(shape=shape)
  saturation = draws.uniform(0.1, 1.0, shape)
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
  shade = first * draws.uniform(0.3, 0.75, (*shape, 1))
  other = _colour(
    draws.uniform(shape=shape),
    draws.uniform(0, 0.9, shape),
    draws.uniform(0.1, 0.9, shape),
  )
  differs = draws.chance(0.5, shape) & ~room
  second = jnp.where(differs[:, None], other, shade)
  kind = draws.integer(textures.KINDS, shape)
  kind = jnp.where(ground & draws.chance(0.7), draws.integer(2), kind)
  period = draws.log_uniform(0.06, 0.5, shape)
  period = jnp.where(room, 2 * period, period)
  period = jnp.where(ground, 1.5 * period, period)
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
    grain=draws.uniform(0.3, 1.0, shape),
  )


def _sample_lights(draws: Draws, site: Site) -> Lights:
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
  draws = Draws(key, 1600)
  site = sample_site(draws, indoor)
  solids, motion = sample_solids(draws, site, moving)
  objects = solids.active.shape[0] - 1
  horizon = draws.uniform(0.55, 0.9, (1,)) + jnp.array([0.0, 0.03, 0.08])
  overhead = _colour(
    draws.uniform(0.55, 0.66), draws.uniform(0.3, 0.8), draws.uniform(0.5, 0.9)
  )
  return Scene(
    solids=solids,
    motion=motion,
    materials=_sample_materials(draws, site, objects),
    lights=_sample_lights(draws, site),
    sky=jnp.stack([horizon, overhead, jnp.full(3, 0.9)]),
    site=site,
  )
