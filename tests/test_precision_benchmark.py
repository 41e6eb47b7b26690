"""The precision benchmark's measures, of predictions whose errors are known."""

import jax.numpy as jnp
import numpy as np

from benchmarks.precision import differences
from point3r_jax.streaming import Prediction


def prediction(points, pose):
  return Prediction(
    points_camera=jnp.asarray(points, jnp.float32),
    confidence_camera=None,
    points_world=jnp.asarray(points + pose[:, None, None, :3], jnp.float32),
    confidence_world=None,
    pose=jnp.asarray(pose, jnp.float32),
    pointer_count=None,
    overflow=None,
  )


def test_differences_are_those_put_in():
  rng = np.random.default_rng(0)
  points = rng.uniform(-1, 1, (2, 4, 6, 3))
  points[..., 2] = rng.uniform(2, 4, (2, 4, 6))
  pose = np.array([[1, 2, 3, 1, 0, 0, 0], [0, 0, 0, 0.6, 0, 0.8, 0]], float)
  want = prediction(points, pose)

  same = differences(want, want)
  for name, value in same.items():
    np.testing.assert_allclose(value, 0, atol=1e-6, err_msg=name)

  angle = np.radians(0.2)
  turned = pose.copy()
  # Quaternions of either sign are the same rotation.
  turned[0, 3:] = -np.cos(angle / 2), 0, 0, -np.sin(angle / 2)
  turned[1, :3] = 0.3, 0, 0
  found = prediction(1.01 * points, turned)
  got = differences(found, want)
  np.testing.assert_allclose(got["depth"], 0.01, rtol=1e-3)
  np.testing.assert_allclose(got["points_world"][0], 0.01, rtol=1e-3)
  assert got["points_world"][1] > 0.05
  np.testing.assert_allclose(
    got["rotation_deg"], [0.2, 0], rtol=1e-2, atol=1e-4
  )
  shift = 0.3 / np.median(points[1, ..., 2])
  np.testing.assert_allclose(
    got["translation"], [0, shift], rtol=1e-4, atol=1e-6
  )
