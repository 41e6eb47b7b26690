import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial.transform import Rotation

from point3r_jax import geometry

_settings = settings(deadline=None, max_examples=40)

# Compiled once: op by op the same tests take several times as long.
_focal = jax.jit(geometry.estimate_focal)
_invert_pose = jax.jit(geometry.invert_pose)
_matrix_to_pose = jax.jit(geometry.matrix_to_pose)
_matrix_to_quaternion = jax.jit(geometry.matrix_to_quaternion)
_pose_to_matrix = jax.jit(geometry.pose_to_matrix)
_project = jax.jit(geometry.project)
_quaternion_to_matrix = jax.jit(geometry.quaternion_to_matrix)
_transform_points = jax.jit(geometry.transform_points)
_unproject = jax.jit(geometry.unproject)


def _vectors(size, low, high):
  number = st.floats(low, high, allow_nan=False, width=32)
  return hnp.arrays(np.float32, size, elements=number)


_quaternions = _vectors(4, -1, 1).filter(lambda q: np.linalg.norm(q) > 1e-3)
_poses = st.tuples(_vectors(3, -100, 100), _quaternions).map(np.concatenate)


def _scipy_matrix(quaternion):
  return Rotation.from_quat(np.roll(quaternion, -1)).as_matrix()


@_settings
@given(_quaternions, st.floats(1e-2, 1e3))
def test_quaternion_to_matrix_agrees_with_scipy_at_any_scale(quaternion, scale):
  matrix = _quaternion_to_matrix(quaternion * np.float32(scale))
  np.testing.assert_allclose(matrix, _scipy_matrix(quaternion), atol=2e-6)


def test_zero_quaternion_is_the_identity():
  matrix = _quaternion_to_matrix(jnp.zeros(4))
  np.testing.assert_array_equal(matrix, np.eye(3))


@_settings
@given(_quaternions)
def test_matrix_to_quaternion_inverts(quaternion):
  unit = quaternion / np.linalg.norm(quaternion)
  matrix = _scipy_matrix(unit).astype(np.float32)
  result = _matrix_to_quaternion(matrix)
  assert result[0] >= 0
  # Both signs are the same rotation, and the sign is free where w = 0.
  assert abs(np.dot(result, unit)) == pytest.approx(1, abs=1e-6)
  np.testing.assert_allclose(np.linalg.norm(result), 1, atol=1e-6)
  np.testing.assert_allclose(_quaternion_to_matrix(result), matrix, atol=2e-6)


# The identity, half turns about axes and diagonals, and all but half turns:
# where some or all but one of the components vanish.
_EDGES = np.array(
  [
    [1, 0, 0, 0],
    [0, 1, 0, 0],
    [0, 0, 1, 0],
    [0, 0, 0, 1],
    [0, 1, 1, 0],
    [0, 1, 1, 1],
    [1, 1, 1, 1],
    [1e-4, 1, 0, 0],
    [-1e-4, 0, 1, 1],
    [1, 1e-6, 0, 0],
  ],
  np.float32,
)


def test_quaternions_at_the_edges_have_finite_gradients():
  def loss(matrix):
    weights = jnp.arange(1.0, 5.0)
    return jnp.sum(_matrix_to_quaternion(matrix) * weights)

  matrices = _quaternion_to_matrix(jnp.asarray(_EDGES))
  gradients = jax.jit(jax.vmap(jax.grad(loss)))(matrices)
  assert np.isfinite(gradients).all()
  assert np.abs(gradients).max() < 20
  back = _matrix_to_quaternion(matrices)
  unit = _EDGES / np.linalg.norm(_EDGES, axis=1, keepdims=True)
  np.testing.assert_allclose(
    np.abs(np.sum(np.asarray(back) * unit, axis=1)), 1, atol=1e-6
  )
  forward = jax.jit(jax.vmap(jax.jacrev(geometry.quaternion_to_matrix)))
  edges = np.concatenate([_EDGES, np.zeros((1, 4), np.float32)])
  assert np.isfinite(forward(edges)).all()


@_settings
@given(_poses)
def test_pose_matrix_round_trip(pose):
  matrix = np.asarray(_pose_to_matrix(pose))
  np.testing.assert_array_equal(matrix[3], [0, 0, 0, 1])
  np.testing.assert_array_equal(matrix[:3, 3], pose[:3])
  again = _pose_to_matrix(_matrix_to_pose(matrix))
  np.testing.assert_allclose(again, matrix, atol=2e-6)


@_settings
@given(_poses, _vectors((6, 3), -10, 10))
def test_inverse_pose_undoes_the_pose(pose, points):
  matrix = _pose_to_matrix(pose)
  inverse = _invert_pose(matrix)
  np.testing.assert_allclose(inverse @ matrix, np.eye(4), atol=1e-4)
  moved = _transform_points(matrix, points)
  expected = points @ _scipy_matrix(pose[3:]).T + pose[:3]
  np.testing.assert_allclose(moved, expected, atol=1e-4)
  back = _transform_points(inverse, moved)
  np.testing.assert_allclose(back, points, atol=1e-4)


@pytest.mark.parametrize("layout", [(), (7,), (4, 5)])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_transform_points_layouts(batch, layout):
  rng = np.random.default_rng(0)
  pose = rng.normal(size=(*batch, 7)).astype(np.float32)
  points = rng.normal(size=(*batch, *layout, 3)).astype(np.float32)
  matrix = np.asarray(_pose_to_matrix(pose))
  moved = _transform_points(matrix, points)
  assert moved.shape == points.shape
  for index in np.ndindex(batch):
    rotation, translation = matrix[index][:3, :3], matrix[index][:3, 3]
    np.testing.assert_allclose(
      moved[index], points[index] @ rotation.T + translation, atol=1e-5
    )


def test_transform_points_broadcasts():
  matrices = _pose_to_matrix(jax.random.normal(jax.random.key(0), (3, 7)))
  points = np.ones((1, 5, 3), np.float32)
  moved = _transform_points(matrices, points)
  assert moved.shape == (3, 5, 3)


def test_vmap_equals_batch_axes():
  pose = jax.random.normal(jax.random.key(1), (4, 7))
  matrix = _pose_to_matrix(pose)
  for function, value in [
    (_pose_to_matrix, pose),
    (_matrix_to_pose, matrix),
    (_invert_pose, matrix),
  ]:
    expected = function(value)
    mapped = jax.jit(jax.vmap(function))(value)
    np.testing.assert_allclose(mapped, expected, atol=1e-6)


def _scene(focal, size, seed=0):
  """A camera-frame point map seen with this focal length."""
  height, width = size
  depth = np.random.default_rng(seed).uniform(1, 5, size).astype(np.float32)
  intrinsics = geometry.intrinsics_matrix(jnp.float32(focal), (height, width))
  return np.array(_unproject(depth, intrinsics))


def _reference_focal(points):
  """Evaluation specification 1.3, in float64 NumPy."""
  height, width = points.shape[:2]
  v, u = np.mgrid[:height, :width]
  p = np.stack([u - width // 2, v - height // 2], axis=-1).reshape(-1, 2)
  with np.errstate(all="ignore"):
    q = points[..., :2].astype(np.float64) / points[..., 2:]
  q = np.nan_to_num(q, nan=0, posinf=0, neginf=0).reshape(-1, 2)
  weight = np.ones(len(p))
  for _ in range(11):
    focal = np.mean(weight * (p * q).sum(1)) / np.mean(weight * (q * q).sum(1))
    weight = 1 / np.maximum(np.linalg.norm(p - focal * q, axis=1), 1e-8)
  return max(focal, 0)


@_settings
@given(st.floats(20, 200), st.integers(0, 5))
def test_focal_of_an_exact_point_map(focal, seed):
  points = _scene(focal, (24, 33), seed)
  assert _focal(points) == pytest.approx(focal, rel=1e-4)


def test_focal_agrees_with_the_specification():
  rng = np.random.default_rng(3)
  points = _scene(50.0, (24, 32))
  points += rng.normal(scale=0.01, size=points.shape)
  outliers = rng.random((24, 32)) < 0.2
  points[outliers, :2] *= rng.uniform(0.5, 1.2, size=(outliers.sum(), 1))
  points[0, 0] = [1, np.nan, 2]
  points[0, 1] = [1, 1, 0]
  points[0, 2] = [np.inf, 1, 1]
  points[0, 3] = 0
  focal = _focal(points)
  assert focal == pytest.approx(_reference_focal(points), rel=1e-4)
  assert focal == pytest.approx(50, rel=0.1)


def test_focal_of_a_batch():
  points = np.stack([_scene(f, (16, 20)) for f in (20, 40, 60)])
  points = points.reshape(3, 1, 16, 20, 3)
  focal = _focal(points)
  assert focal.shape == (3, 1)
  np.testing.assert_allclose(focal[:, 0], [20, 40, 60], rtol=1e-4)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, -np.inf])
def test_focal_without_information_is_zero(value):
  assert _focal(np.full((4, 6, 3), value, np.float32)) == 0


def test_focal_is_not_negative():
  points = _scene(30.0, (8, 8)) * np.array([-1, -1, 1], np.float32)
  assert _focal(points) == 0


def test_focal_has_finite_gradients():
  points = _scene(30.0, (12, 16))
  points[0, 0], points[1, 1], points[2, 2] = 0, np.nan, [1, 2, 0]
  gradient = jax.jit(jax.grad(geometry.estimate_focal))(jnp.asarray(points))
  assert np.isfinite(gradient).all()
  assert np.abs(gradient).max() > 0


@_settings
@given(st.floats(20, 500), st.integers(0, 3))
def test_project_inverts_unproject(focal, seed):
  depth = np.random.default_rng(seed).uniform(0.1, 9, (2, 6, 8))
  intrinsics = np.array(
    [[focal, 0.5, 3.2], [0, focal * 1.1, 2.7], [0, 0, 1]], np.float32
  )
  points = _unproject(depth.astype(np.float32), np.stack([intrinsics] * 2))
  np.testing.assert_allclose(points[..., 2], depth, rtol=1e-6)
  homogeneous = np.asarray(points) @ intrinsics.T
  pixels = _project(points, np.stack([intrinsics] * 2))
  v, u = np.mgrid[:6, :8]
  expected = np.broadcast_to(np.stack([u, v], -1), (2, 6, 8, 2))
  np.testing.assert_allclose(pixels, expected, atol=1e-3)
  np.testing.assert_allclose(
    homogeneous[..., :2] / homogeneous[..., 2:], expected, atol=1e-3
  )


def test_points_behind_the_camera_have_no_image():
  intrinsics = geometry.intrinsics_matrix(10.0, (4, 6))
  points = jnp.array([[1.0, 2, 2], [1, 2, 0], [1, 2, -2]])
  pixels = _project(points, intrinsics)
  np.testing.assert_array_equal(pixels[0], [8, 12])
  assert np.isnan(pixels[1:]).all()

  def loss(points):
    return jnp.nansum(_project(points, intrinsics))

  assert np.isfinite(jax.grad(loss)(points)).all()


def test_intrinsics_matrix():
  matrix = geometry.intrinsics_matrix(jnp.array([10.0, 20.0]), (5, 8))
  np.testing.assert_array_equal(
    matrix,
    [[[f, 0, 4], [0, f, 2], [0, 0, 1]] for f in (10, 20)],
  )
