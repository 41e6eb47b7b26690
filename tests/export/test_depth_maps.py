import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from point3r_jax.export import depth as depth_export


def _read_png(path):
  with Image.open(path) as image:
    image.load()
    return np.array(image), float(image.text["depth_scale"])


def test_sixteen_bit_values(tmp_path):
  path = tmp_path / "depth.png"
  depth = np.array(
    [
      [1.2344, 1.2346, 65.535, 65.536],
      [0.0, -1.0, np.nan, np.inf],
      [0.0004, 0.0006, -np.inf, 1e30],
    ],
    np.float32,
  )
  counts = depth_export.write_depth_png(path, depth, 1000)
  assert path.read_bytes()[24:26] == b"\x10\x00"  # 16 bits, grey.
  values, scale = _read_png(path)
  assert scale == 1000
  expected = [[1234, 1235, 65535, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
  np.testing.assert_array_equal(values, expected)
  assert counts == depth_export.DepthPngCounts(
    invalid=5, saturated=2, vanished=1
  )


@settings(deadline=None, max_examples=40)
@given(
  hnp.arrays(np.float32, (5, 7), elements=st.floats(width=32)),
  st.floats(1e-3, 1e5),
)
def test_zeros_are_all_accounted_for(tmp_path_factory, depth, scale):
  path = tmp_path_factory.mktemp("depth") / "depth.png"
  counts = depth_export.write_depth_png(path, depth, scale)
  values, read_scale = _read_png(path)
  assert read_scale == scale
  assert np.count_nonzero(values == 0) == sum(counts)
  kept = values > 0
  exact = depth[kept].astype(np.float64) * scale
  assert np.abs(values[kept] - exact).max(initial=0) <= 0.5


@pytest.mark.parametrize("scale", [0, -1, np.nan, np.inf])
def test_wrong_scales_are_refused(tmp_path, scale):
  with pytest.raises(ValueError, match="scale"):
    depth_export.write_depth_png(tmp_path / "d.png", np.ones((2, 2)), scale)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("write", "key"),
  [
    (depth_export.write_depth_npz, "depth"),
    (depth_export.write_confidence_npz, "confidence"),
  ],
)
def test_npz_is_exact(tmp_path, write, key):
  values = np.array([[1e-30, np.nan], [np.inf, -3.3]], np.float32)
  write(tmp_path / "map.npz", values)
  with np.load(tmp_path / "map.npz") as data:
    assert list(data) == [key]
    assert data[key].dtype == np.float32
    np.testing.assert_array_equal(data[key], values)
  assert len(list(tmp_path.iterdir())) == 1
