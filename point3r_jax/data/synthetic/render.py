"""Pictures of a scene: one ray a pixel, lambertian, with shadows.

Letters: T views, H W rows and columns, R rays (all pixels of a view, row by
row); vectors of rays are (3, R).
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from point3r_jax.data.synthetic import cameras, textures
from point3r_jax.data.synthetic.scene import (
  Lights,
  Scene,
  sample_scene,
  solids_at,
)
from point3r_jax.data.synthetic.shapes import (
  Solids,
  cast,
  dot,
  occluded,
  rotate,
  surface,
  take,
)
from point3r_jax.errors import InputError

_SHADOW_MARGIN = 2e-3  # Metres.


@dataclasses.dataclass(frozen=True)
class Options:
  """What is made up; hashable, so that programs can be compiled for it.

  Attributes:
    indoor: the share of rooms and courtyards, 0 to 1; the rest is open ground.
    moving: the share of scenes in which objects move, 0 to 1.
    paths: the kinds of camera paths, of `cameras.PATHS`, equally often.
  """

  indoor: float = 0.7
  moving: float = 0.2
  paths: tuple[str, ...] = cameras.PATHS

  def __post_init__(self):
    """Checks the values.

    Raises:
      InputError: if one does not suit.
    """
    for name in ("indoor", "moving"):
      share = getattr(self, name)
      if not 0 <= share <= 1:
        raise InputError(f"{name} is {share}, but a share is from 0 to 1")
    unknown = [path for path in self.paths if path not in cameras.PATHS]
    if unknown or not self.paths:
      raise InputError(
        f"paths are {self.paths}; give one or more of {cameras.PATHS}"
      )


def _light(
  lights: Lights, solids: Solids, points: jax.Array, normals: jax.Array
) -> jax.Array:
  """Returns the (3, R) irradiance of surfaces at points; vectors are (3, R)."""
  up = -normals[1]
  total = lights.ambient[:, None] * (0.8 + 0.2 * up)
  for i in range(lights.reach.shape[0]):
    offset = lights.position[i, :, None] - points
    square = dot(offset, offset)
    cosine = dot(normals, offset) / jnp.sqrt(square)
    # Of the inverse square, but bounded near the lamp; 1 at its reach.
    reach = lights.reach[i] ** 2
    strength = jnp.maximum(cosine, 0) * 1.5 * reach / (square + 0.5 * reach)
    if i == 0:
      shade = occluded(solids, lights.position[0], points, _SHADOW_MARGIN)
      strength = jnp.where(shade, 0, strength)
    total = total + lights.colour[i, :, None] * strength
  return total


def _sky_point(scene: Scene, directions: jax.Array) -> jax.Array:
  """Returns where clouds are looked up: on a plane above, other in each scene.

  Args:
    scene: the scene.
    directions: (3, R), unit length.
  """
  x, z = 1.3 * directions[::2] / (jnp.maximum(-directions[1], 0) + 0.15)
  return jnp.stack([x, jnp.full_like(x, 99 * scene.site.area[0]), z])


def _sky(scene: Scene, directions: jax.Array, cloud: jax.Array) -> jax.Array:
  """Returns the (3, R) colours of the sky, `cloud` being noise."""
  height = jnp.clip(-directions[1], 0, 1)
  horizon, overhead, clouds = scene.sky[..., None]
  colour = horizon + (overhead - horizon) * jnp.sqrt(height)
  cover = jnp.clip(4 * cloud - 2.1, 0, 1) * jnp.clip(5 * height, 0, 1)
  return colour + (clouds - colour) * cover


def _render_view(
  scene: Scene,
  pose: jax.Array,
  time: jax.Array,
  intrinsics: jax.Array,
  image_size: tuple[int, int],
) -> tuple[jax.Array, jax.Array]:
  """Renders one view.

  Args:
    scene: the scene.
    pose: (4, 4), camera-to-world.
    time: () seconds.
    intrinsics: (3, 3), pixels.
    image_size: (H, W).

  Returns:
    (H, W, 3) uint8 colours and (H, W) z-depth, -1 in the sky.
  """
  height, width = image_size
  solids = solids_at(scene, time)
  v, u = np.divmod(np.arange(height * width), width)
  x = (u - intrinsics[0, 2]) / intrinsics[0, 0]
  y = (v - intrinsics[1, 2]) / intrinsics[1, 1]
  rays = jnp.stack([x, y, jnp.ones_like(x)])
  directions = rotate(pose[:3, :3], rays)
  # The camera's z is 1 along every ray, so what is met is met at its z-depth.
  depth, index = cast(solids, pose[:3, 3], directions)
  points = pose[:3, 3, None] + depth * directions
  met = surface(solids, index, points)

  # The hollow solid has walls, floor and ceiling, or sky.
  count = solids.hollow.shape[0]
  last = index == count - 1
  floor, ceiling = last & (met.normal[1] < -0.5), last & (met.normal[1] > 0.5)
  walls = last & ~floor & ~ceiling
  sky = (walls & scene.site.open) | (ceiling & scene.site.roofless)
  material = index + jnp.where(floor, 1, jnp.where(ceiling, 2, 0))

  length = jnp.sqrt(dot(directions, directions))
  unit = directions / length
  cosine = jnp.abs(dot(unit, met.normal))
  # The mean of along and across; along alone would blur floors too early.
  footprint = depth / intrinsics[0, 0] / jnp.sqrt(jnp.maximum(cosine, 0.05))
  looks = take(scene.materials, material)
  # Noise is the dearest part of a texture: surfaces and clouds share it.
  place = textures.noise_point(looks, met.point)
  place = jnp.where(sky, _sky_point(scene, unit), place)
  blur = jnp.where(sky, 0, 1.5 * footprint / looks.period)
  cloud = textures.noise(place, blur)
  colour = textures.albedo(looks, met.uv, footprint, cloud)
  colour = colour * _light(scene.lights, solids, points, met.normal)
  colour = jnp.where(sky, _sky(scene, unit, cloud), colour)
  colour = 255 * jnp.clip(colour, 0, 1) ** (1 / 2.2)
  image = (colour + 0.5).astype(jnp.uint8)
  depth = jnp.where(sky, -1.0, depth)
  return image.T.reshape(height, width, 3), depth.reshape(height, width)


@flax.struct.dataclass
class Sequence:
  """What is rendered: T views of a scene.

  Attributes:
    scene: the scene.
    intrinsics: (3, 3), pixels, of all views.
    poses: (T, 4, 4), camera-to-world, OpenCV axes, metres.
    times: (T,) seconds.
  """

  scene: Scene
  intrinsics: jax.Array
  poses: jax.Array
  times: jax.Array


def sample_sequence(
  key: jax.Array,
  camera_key: jax.Array,
  *,
  views: int,
  image_size: tuple[int, int],
  options: Options = Options(),
) -> Sequence:
  """Makes up a scene and a camera path; see `render_sequence`."""
  scene = sample_scene(key, indoor=options.indoor, moving=options.moving)
  lens_key, time_key, path_key = jax.random.split(camera_key, 3)
  intrinsics = cameras.sample_intrinsics(lens_key, image_size)
  interval = jax.random.uniform(time_key, minval=0.1, maxval=0.6)
  times = interval * jnp.arange(views)
  poses = cameras.sample_path(
    path_key,
    scene,
    intrinsics,
    times,
    image_size=image_size,
    paths=options.paths,
  )
  return Sequence(scene, intrinsics, poses, times)


def render_sequence(
  key: jax.Array,
  camera_key: jax.Array,
  *,
  views: int,
  image_size: tuple[int, int],
  options: Options = Options(),
) -> dict[str, jax.Array]:
  """Makes up a scene and a camera path, and renders it.

  Pure: jit it (`views`, `image_size` and `options` are static), vmap it over
  keys. Views are rendered one after the other, for the memory.

  Args:
    key: random key of the scene.
    camera_key: random key of the camera and its path.
    views: T.
    image_size: (H, W).
    options: what is made up.

  Returns:
    image (T, H, W, 3) uint8; depth (T, H, W) float32, z-depth in metres, -1 in
    the sky; intrinsics (T, 3, 3) float32, pixels; camera_to_world (T, 4, 4)
    float32, OpenCV axes; is_metric () bool, True.
  """
  sequence = sample_sequence(
    key, camera_key, views=views, image_size=image_size, options=options
  )
  intrinsics, poses = sequence.intrinsics, sequence.poses
  image, depth = lax.map(
    lambda x: _render_view(sequence.scene, *x, intrinsics, image_size),
    (poses, sequence.times),
  )
  return {
    "image": image,
    "depth": depth,
    "intrinsics": jnp.broadcast_to(intrinsics, (views, 3, 3)),
    "camera_to_world": poses,
    "is_metric": jnp.array(True),
  }
