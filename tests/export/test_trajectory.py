import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from point3r_jax.export import trajectory


def test_real_part_comes_last():
  line = trajectory.tum_line(1.5, np.array([1, 2, 3, 0.4, 0.5, 0.6, 0.7]))
  assert line == "1.5 1 2 3 0.5 0.6 0.7 0.4"


@settings(deadline=None)
@given(
  st.floats(0, 2e9),
  hnp.arrays(
    np.float32, 7, elements=st.floats(-1e6, 1e6, allow_nan=False, width=32)
  ),
)
def test_numbers_survive(timestamp, pose):
  line = trajectory.tum_line(timestamp, pose)
  time, *values = line.split(" ")
  assert "e" not in time
  assert float(time) == timestamp
  values = np.array(values, np.float32)
  np.testing.assert_array_equal(values[:3], pose[:3])
  np.testing.assert_array_equal(np.roll(values[3:], 1), pose[3:])


def test_epoch_timestamps_keep_their_digits():
  line = trajectory.tum_line(1305031102.175304, np.zeros(7))
  assert line.startswith("1305031102.175304 0 ")


def test_each_line_is_in_the_file_at_once(tmp_path):
  path = tmp_path / "trajectory.txt"
  pose = np.array([0, 0, 0, 1, 0, 0, 0], np.float32)
  with (
    pytest.raises(KeyboardInterrupt),
    trajectory.TrajectoryWriter(path) as writer,
  ):
    for i in range(3):
      writer.write(i, pose)
      assert np.loadtxt(path, ndmin=2).shape == (i + 1, 8)
    raise KeyboardInterrupt
  lines = path.read_text().splitlines()
  assert lines[0] == "# timestamp tx ty tz qx qy qz qw"
  assert lines[1:] == [f"{i}.0 0 0 0 0 0 0 1" for i in range(3)]


@pytest.mark.parametrize("where", range(8))
def test_numbers_must_be_finite(tmp_path, where):
  numbers = np.ones(8)
  numbers[where] = np.nan
  path = tmp_path / "trajectory.txt"
  with trajectory.TrajectoryWriter(path) as writer:
    with pytest.raises(ValueError, match="finite"):
      writer.write(numbers[0], numbers[1:])
    writer.write(0.0, np.ones(7))
  assert len(path.read_text().splitlines()) == 2
