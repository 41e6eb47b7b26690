import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from point3r_jax.export import ply

_TYPES = {"float": "<f4", "uchar": "u1"}


def read_ply(path):
  """Reads what `write_ply` writes: positions and colours."""
  data = path.read_bytes()
  header, body = data.split(b"end_header\n", 1)
  lines = header.decode("ascii").splitlines()
  assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
  count = int(lines[2].removeprefix("element vertex "))
  fields = [line.split()[1:] for line in lines[3:]]
  dtype = np.dtype([(name, _TYPES[kind]) for kind, name in fields])
  assert len(body) == count * dtype.itemsize
  vertices = np.frombuffer(body, dtype)
  points = np.stack([vertices[axis] for axis in "xyz"], axis=-1)
  colors = [vertices[name] for name in ("red", "green", "blue")]
  return points, np.stack(colors, axis=-1)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_round_trip_is_exact(tmp_path_factory, count, seed):
  rng = np.random.default_rng(seed)
  # Any bits at all, so NaN and infinity too.
  bits = rng.integers(0, 2**32, (count, 3), dtype=np.uint32)
  points = bits.view(np.float32)
  colors = rng.integers(0, 256, (count, 3), dtype=np.uint8)
  path = tmp_path_factory.mktemp("ply") / "cloud.ply"
  ply.write_ply(path, points, colors)
  read_points, read_colors = read_ply(path)
  np.testing.assert_array_equal(read_points.view(np.uint32), bits)
  np.testing.assert_array_equal(read_colors, colors)


def test_chunks_join(tmp_path, monkeypatch):
  monkeypatch.setattr(ply, "_CHUNK", 4)
  points = np.arange(30, dtype=np.float32).reshape(10, 3)
  colors = points.astype(np.uint8)
  ply.write_ply(tmp_path / "cloud.ply", points, colors)
  read_points, read_colors = read_ply(tmp_path / "cloud.ply")
  np.testing.assert_array_equal(read_points, points)
  np.testing.assert_array_equal(read_colors, colors)


def test_failure_leaves_no_file(tmp_path, monkeypatch):
  points = np.zeros((3, 3), np.float32)
  colors = np.zeros((3, 3), np.uint8)
  monkeypatch.setattr(ply, "_VERTEX", np.dtype([("position", "<f4", 3)]))
  with pytest.raises(ValueError, match="color"):
    ply.write_ply(tmp_path / "cloud.ply", points, colors)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("points", "colors"),
  [
    (np.zeros((3, 2)), np.zeros((3, 2), np.uint8)),
    (np.zeros((3, 3)), np.zeros((2, 3), np.uint8)),
    (np.zeros((3, 3)), np.zeros((3, 3), np.float32)),
  ],
)
def test_wrong_arrays_are_refused(tmp_path, points, colors):
  with pytest.raises(ValueError, match="olours"):
    ply.write_ply(tmp_path / "cloud.ply", points, colors)
