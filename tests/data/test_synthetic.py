"""Geometry that is exact, and scenes that are functions of their numbers."""

import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from point3r_jax.data.record import check_record, complete_record
from point3r_jax.data.synthetic import shapes, textures
from point3r_jax.data.synthetic.cameras import MIN_CLEARANCE
from point3r_jax.data.synthetic.render import Options, sample_sequence
from point3r_jax.data.synthetic.scene import solids_at
from point3r_jax.data.synthetic.source import SyntheticSource, sequence_keys
from point3r_jax.errors import InputError
from point3r_jax.geometry import quaternion_to_matrix

# One program serves all: what is compiled depends on these alone.
VIEWS, SIZE = 3, (24, 32)
SOURCE = SyntheticSource(scenes=16, moving=0.25)
OPTIONS = Options(moving=0.25)


def get(index, source=SOURCE, seed=0):
  return source.sequence(index, VIEWS, SIZE, np.random.default_rng(seed))


@pytest.fixture(scope="module")
def records():
  return [get(index) for index in range(len(SOURCE))]


def test_records_are_valid(records):
  for index, record in enumerate(records):
    check_record(complete_record(record, 0, index), f"{index}", VIEWS, SIZE)
    assert record["is_metric"]
    sky = record["depth"] == -1
    assert (sky | (record["depth"] > 0.1)).all()
    assert np.mean(~sky & (record["depth"] < 20)) > 0.5
  assert any((record["depth"] < 0).any() for record in records)


def test_pictures_have_texture_and_are_well_exposed(records):
  for record in records:
    image = record["image"].astype(float)
    assert image.std((1, 2)).max() > 10
    assert 50 < image.mean() < 220


def test_textures_vary_nearby_and_fade_far_away():
  """Black and white, of a period of 1 m, on a square of 8 m."""
  kinds = np.arange(textures.KINDS)
  one = np.ones(textures.KINDS, np.float32)
  materials = textures.Materials(
    kind=kinds,
    first=np.zeros((len(kinds), 3), np.float32),
    second=np.ones((len(kinds), 3), np.float32),
    period=one,
    angle=0 * one,
    shift=np.full((len(kinds), 3), 0.25, np.float32),
    grain=0 * one,
  )

  @jax.jit
  def paint(footprint):
    u, v = jnp.meshgrid(jnp.arange(0, 8, 0.04), jnp.arange(0, 8, 0.04))
    uv = jnp.stack([u.ravel(), v.ravel()])
    point = jnp.stack([uv[0], 0 * uv[0], uv[1]])
    footprint = jnp.full(uv.shape[1], footprint)

    def paint_one(material):
      looks = jax.tree.map(lambda x: x[..., None], material)
      place = textures.noise_point(looks, point)
      cloud = textures.noise(place, 1.5 * footprint)
      return textures.albedo(looks, uv, footprint, cloud)[0]

    return jax.vmap(paint_one)(materials)

  near, far = np.asarray(paint(0.04)), np.asarray(paint(2.0))
  assert near.std(1).min() > 0.1
  assert far.std(1).max() < 0.04
  # What is far has the mean colour of what is near.
  np.testing.assert_allclose(far.mean(1), near.mean(1), atol=0.06)
  assert np.corrcoef(near)[~np.eye(len(kinds), dtype=bool)].max() < 0.98


def seen_from(record, i, j):
  """Looks for the points of view i in view j.

  Returns:
    Of the points that fall into view j, over what view j has seen there: their
    inverse depth. It is 1 for what both see, less for what view j sees
    something in front of. And whether view j has seen one plane around there.
  """
  k, pose = record["intrinsics"][0], record["camera_to_world"].astype(float)
  height, width = SIZE
  v, u = np.mgrid[:height, :width]
  depth = record["depth"][i]
  rays = np.linalg.inv(k) @ np.stack([u, v, np.ones(SIZE)]).reshape(3, -1)
  world = pose[i][:3, :3] @ (rays * depth.ravel()) + pose[i][:3, 3:]
  local = pose[j][:3, :3].T @ (world - pose[j][:3, 3:])
  local = local[:, (depth.ravel() > 0) & (local[2] > 0)]
  x, y, _ = k @ (local / local[2])
  within = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
  x, y, z = x[within], y[within], local[2][within]
  # On a plane, inverse depth is linear in the pixel. The sky is far away.
  target = record["depth"][j]
  inverse = np.where(target > 0, 1 / target, 0)
  there = map_coordinates(inverse, [y, x], order=1, mode="nearest")
  ((a, b), (c, d)) = (
    [inverse[g(y).astype(int), h(x).astype(int)] for h in (np.floor, np.ceil)]
    for g in (np.floor, np.ceil)
  )
  plane = np.abs(a - b - c + d) < 1e-4 * there
  plane &= np.maximum(np.abs(a - d), np.abs(b - c)) < 0.5 * there
  return 1 / np.maximum(z * there, 1e-9), plane


def test_views_agree_with_each_other(records):
  same_at_all = []
  for record, i in itertools.product(records, range(VIEWS - 1)):
    ratio, plane = seen_from(record, i, i + 1)
    # Consecutive views overlap.
    same = np.abs(ratio - 1) < 2e-3
    assert np.sum(np.abs(ratio - 1) < 0.02) > 0.2 * SIZE[0] * SIZE[1]
    # A point is on the plane or hidden by it, but for what moves and for what
    # is thinner than a pixel.
    assert np.mean((same | (ratio < 1))[plane]) > 0.88
    same_at_all.append(np.mean(same[plane]))
  assert np.median(same_at_all) > 0.97


@pytest.fixture(scope="module")
def views(records):
  """What a mapped program finds for the records' cameras, by name.

  depth (S, T, H·W), room (S, T, P) around the cameras, center (S, T, P, 3).
  """

  def sample(number, draw, poses, rays):
    keys = sequence_keys([jnp.uint32(SOURCE.seed), number, draw])
    # The poses are not asked for, so they are not computed again.
    sequence = sample_sequence(
      *keys, views=VIEWS, image_size=SIZE, options=OPTIONS
    )

    def look(time, pose):
      solids = solids_at(sequence.scene, time)
      origin, directions = pose[:3, 3], shapes.rotate(pose[:3, :3], rays)
      return {
        "depth": shapes.cast(solids, origin, directions)[0],
        "room": shapes.clearance(solids, origin),
        "center": solids.center,
      }

    return jax.vmap(look)(sequence.times, poses)

  numbers = 2 * np.arange(len(SOURCE), dtype=np.uint32)
  draw = np.uint32(np.random.default_rng(0).integers(2**32))
  poses = np.stack([record["camera_to_world"] for record in records])
  v, u = np.mgrid[: SIZE[0], : SIZE[1]]
  pixels = np.stack([u, v, np.ones(SIZE)]).reshape(3, -1)
  matrices = np.stack([record["intrinsics"][0] for record in records])
  rays = (np.linalg.inv(matrices) @ pixels).astype(np.float32)
  sample = jax.jit(jax.vmap(sample, (0, None, 0, 0)))
  return jax.tree.map(np.asarray, sample(numbers, draw, poses, rays))


@pytest.mark.slow
def test_mapped_program_makes_the_same_scenes(records, views):
  depth = np.stack([record["depth"] for record in records])
  again = views["depth"].reshape(depth.shape)
  difference = np.abs(depth - again)[depth > 0]
  # A silhouette may fall on either side of a pixel.
  assert np.mean(difference > 1e-3) < 1e-3
  assert np.median(difference) < 1e-5


def test_cameras_have_room(views):
  assert views["room"].min() > MIN_CLEARANCE - 1e-4
  objects = np.isfinite(views["room"]).sum(-1)
  assert objects.min() > 5


def test_objects_move_in_some_scenes(views):
  center, active = views["center"], np.isfinite(views["room"][:, 0])
  moves = np.any(center[:, 0] != center[:, -1], axis=-1) & active
  assert 0 < moves.any(1).sum() < len(SOURCE)


@jax.jit
def meet(solids, origin, rays):
  """Casts rays and describes where they end; far away is the origin."""
  distance, index = shapes.cast(solids, origin, rays)
  points = origin[:, None] + jnp.where(distance < 99, distance, 0) * rays
  return distance, index, shapes.surface(solids, index, points).normal


def random_solids(rng, count, hollow):
  kind = rng.integers(0, 3, count)
  turn = rng.normal(size=(count, 4)).astype(np.float32)
  return shapes.Solids(
    center=rng.uniform(-1, 1, (count, 3)).astype(np.float32),
    rotation=np.asarray(quaternion_to_matrix(turn)),
    half=rng.uniform(0.3, 1.0, (count, 3)).astype(np.float32),
    round=shapes.KINDS[kind],
    hollow=np.full(count, hollow),
    active=np.full(count, True),
  )


@pytest.mark.parametrize("hollow", [False, True])
def test_rays_meet_solids_where_they_enter_or_leave(hollow):
  """Against the definition of a solid, tried all along the rays."""
  rng = np.random.default_rng(0)
  solids = random_solids(rng, 30, hollow)
  # Hollow ones are seen from their middle, others from outside.
  origin = solids.center if hollow else np.tile([0.0, 0, -4], (30, 1))
  rays = rng.normal(size=(3, 200)) if hollow else rng.uniform(-1, 1, (3, 200))
  rays[2] = rays[2] if hollow else 2
  rays, origin = rays.astype(np.float32), origin.astype(np.float32)

  one_each = jax.tree.map(lambda x: x[:, None], solids)
  mapped = jax.vmap(meet, (0, 0, None))(one_each, origin, rays)
  distance, _, normal = map(np.asarray, mapped)

  def inside(t):
    offset = origin[:, :, None] + t * rays - solids.center[:, :, None]
    p = np.einsum("pji,pjr->pir", solids.rotation, offset)
    p = (p / solids.half[:, :, None]).astype(float)
    ball = np.einsum("pi,pir->pr", solids.round, p * p)
    return (np.abs(p) <= 1).all(1) & (ball <= 1)

  met = np.isfinite(distance)
  steps = np.linspace(0, 5, 400)
  was = np.stack([inside(t) for t in steps])  # (steps, P, R)
  first = steps[np.argmax(was != hollow, axis=0)]
  sure = (was != hollow).any(0)
  assert met.all() if hollow else 0.1 < met.mean() < 0.9
  assert met[sure].all()
  step = steps[1]
  gap = (first - distance)[sure]
  assert (gap > -1e-4).all() and (gap < step + 1e-4).all()
  # The surface turns to the ray, and a step along the normal leaves it.
  against = np.sum(normal * rays, axis=1)
  assert (against[met] < 0).all()
  np.testing.assert_allclose(np.linalg.norm(normal, axis=1), 1, atol=1e-5)


def test_known_scene_has_the_depth_and_normals_of_the_formula():
  """A ball of radius 1 at z = 5 in a room that ends at z = 8."""
  solids = shapes.Solids(
    center=np.array([[0.0, 0, 5], [0, 0, 0]], np.float32),
    rotation=np.stack([np.eye(3, dtype=np.float32)] * 2),
    half=np.array([[1, 1, 1], [9, 9, 8]], np.float32),
    round=shapes.KINDS[[shapes.ELLIPSOID, shapes.BOX]],
    hollow=np.array([False, True]),
    active=np.array([True, True]),
  )
  x, y = np.meshgrid(np.linspace(-0.4, 0.4, 21), np.linspace(-0.3, 0.3, 15))
  rays = np.stack([x, y, np.ones_like(x)]).reshape(3, -1).astype(np.float32)
  origin = np.zeros(3, np.float32)
  depth, index, normal = meet(solids, origin, rays)
  square = np.sum(rays.astype(float) ** 2, axis=0)
  root = 25 - 24 * square
  ball = root > 0
  np.testing.assert_array_equal(index, np.where(ball, 0, 1))
  want = np.where(ball, (5 - np.sqrt(np.maximum(root, 0))) / square, 8)
  np.testing.assert_allclose(depth, want, rtol=1e-5)
  points = np.asarray(depth) * rays
  on_ball = points - np.array([[0], [0], [5]])
  wall = np.array([[0], [0], [-1]])
  np.testing.assert_allclose(normal, np.where(ball, on_ball, wall), atol=1e-4)
  hidden = jax.jit(shapes.occluded, static_argnums=3)(
    solids, origin, rays * 8, 1e-3
  )
  np.testing.assert_array_equal(hidden, ball)


def test_same_numbers_same_record(records):
  copy = pickle.loads(pickle.dumps(SOURCE))
  with ThreadPoolExecutor(4) as pool:
    again = list(pool.map(lambda index: get(index, copy), range(4)))
  chex.assert_trees_all_equal(again, records[:4])


def test_scenes_differ_by_seed_split_and_index_and_paths_by_draw(records):
  others = [
    get(0, SyntheticSource(scenes=16, moving=0.25, seed=1)),
    get(0, seed=1),
    *(
      get(i, SyntheticSource(scenes=16, moving=0.25, split="test"))
      for i in range(8)
    ),
  ]
  everything = [*records, *others]
  for one, two in itertools.combinations(everything, 2):
    difference = one["image"].astype(int) - two["image"]
    assert np.abs(difference).mean() > 3


def test_caller_may_have_set_a_mesh_and_a_guard(records):
  mesh = jax.make_mesh((1,), ("data",))
  with jax.set_mesh(mesh), jax.transfer_guard("disallow"):
    record = get(0)
  chex.assert_trees_all_equal(record, records[0])
  record["image"][:] = 0  # Ours to write to.


@pytest.mark.parametrize(
  "option",
  [
    {"scenes": 0},
    {"seed": -1},
    {"split": "val"},
    {"moving": 1.5},
    {"indoor": -0.1},
    {"paths": ("walk", "fly")},
    {"paths": ()},
  ],
)
def test_unknown_options_are_refused(option):
  with pytest.raises(InputError, match=next(iter(option))):
    SyntheticSource(**option)


def test_what_cannot_be_rendered_is_refused():
  with pytest.raises(InputError, match="no scene 16 among 16"):
    get(16)
  with pytest.raises(InputError, match="0 views"):
    SOURCE.sequence(0, 0, SIZE, np.random.default_rng(0))
