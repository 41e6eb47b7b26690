"""What was written comes back as it was."""

import numpy as np
import pytest

from point3r_jax.export import read_scene
from point3r_jax.export.ply import read_ply, write_ply
from point3r_jax.export.scene import FrameResult, SceneOptions, SceneWriter
from tests.scenes import SIZE, frame


def write_scene(directory, frames=3, write=("scene", "cameras", "depth_npz")):
  """Writes random frames; returns their results."""
  rng = np.random.default_rng(0)
  writer = SceneWriter(directory, SceneOptions(write, percentile=0))
  results = []
  for index in range(frames):
    pose = np.eye(4)
    pose[:3, 3] = rng.normal(size=3)
    result = FrameResult(
      pose=np.append(pose[:3, 3], [1, 0, 0, 0]),
      camera_to_world=pose,
      points_world=rng.normal(size=(*SIZE, 3)).astype(np.float32),
      confidence_world=np.ones(SIZE, np.float32),
      depth=rng.uniform(1, 2, SIZE).astype(np.float32),
      confidence_camera=np.ones(SIZE, np.float32),
      intrinsics=np.diag([20.0 + index, 20.0 + index, 1]),
    )
    writer.commit(writer.prepare(index, frame(index), result))
    results.append(result)
  writer.close(True)
  return results


def test_a_scene_comes_back(tmp_path):
  results = write_scene(tmp_path)
  scene = read_scene.read_scene(tmp_path)
  for name in ("camera_to_world", "intrinsics", "depth"):
    want = np.stack([getattr(result, name) for result in results])
    np.testing.assert_array_equal(getattr(scene, name), want)
  assert scene.points.shape == scene.colors.shape
  assert 0 < len(scene.points) <= 3 * SIZE[0] * SIZE[1]
  assert (scene.colors == 100).all()


def test_a_missing_part_is_an_error(tmp_path):
  write_scene(tmp_path, write=("scene", "cameras", "depth"))
  with pytest.raises(OSError):
    read_scene.read_scene(tmp_path)


@pytest.mark.parametrize("count", [0, 7])
def test_a_cloud_comes_back(tmp_path, count):
  rng = np.random.default_rng(0)
  points = rng.normal(size=(count, 3)).astype(np.float32)
  colors = rng.integers(0, 256, (count, 3), np.uint8)
  write_ply(tmp_path / "cloud.ply", points, colors)
  again = read_ply(tmp_path / "cloud.ply")
  np.testing.assert_array_equal(again[0], points)
  np.testing.assert_array_equal(again[1], colors)


@pytest.mark.parametrize(
  "spoil",
  [
    lambda data: data[:-15],
    lambda data: data[:-1],
    lambda data: data.replace(b"uchar red", b"uchar rot"),
    lambda data: data[:40],
    lambda data: b"",
  ],
)
def test_other_files_are_refused(tmp_path, spoil):
  path = tmp_path / "cloud.ply"
  write_ply(path, np.zeros((3, 3), np.float32), np.zeros((3, 3), np.uint8))
  path.write_bytes(spoil(path.read_bytes()))
  with pytest.raises(ValueError):
    read_ply(path)
