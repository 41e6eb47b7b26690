import dataclasses
import json

import numpy as np
import pytest

from point3r_jax.export import cameras


def _frame(index):
  return cameras.CameraFrame(
    camera_to_world=np.eye(4, dtype=np.float32) * (index + 1),
    intrinsics=np.diag([300.0, 300.0, 1.0]),
    image_size=(384, 512),
    original_intrinsics=np.diag([600.0, 600.0, 1.0]),
    original_size=(960, 1280),
    source_file='strange "näme".mp4',
    source_index=3 * index,
    timestamp=index / 30,
    depth_file=f"depth/{index:06d}.png" if index else None,
  )


def _read(path):
  return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_all_fields(tmp_path, count):
  path = tmp_path / "cameras.json"
  with cameras.CameraWriter(path) as writer:
    for i in range(count):
      writer.write(_frame(i))
  data = _read(path)
  assert data["complete"] is True
  assert "camera-to-world, OpenCV axes" in data["pose_convention"]
  assert "world = first camera" in data["pose_convention"]
  assert "predicted by the model" in data["units"]
  assert data["frames"] == [
    {
      "source_file": 'strange "näme".mp4',
      "source_index": 3 * i,
      "timestamp": i / 30,
      "camera_to_world": (np.eye(4) * (i + 1)).tolist(),
      "network": {
        "width": 512,
        "height": 384,
        "intrinsics": [[300, 0, 0], [0, 300, 0], [0, 0, 1]],
      },
      "original": {
        "width": 1280,
        "height": 960,
        "intrinsics": [[600, 0, 0], [0, 600, 0], [0, 0, 1]],
      },
      "depth_file": f"depth/{i:06d}.png" if i else None,
    }
    for i in range(count)
  ]


def test_valid_at_every_moment(tmp_path):
  path = tmp_path / "cameras.json"
  writer = cameras.CameraWriter(path)
  for i in range(4):
    data = _read(path)
    assert data["complete"] is False
    assert len(data["frames"]) == i
    writer.write(_frame(i))
  writer.close()
  writer.close()
  assert _read(path)["complete"] is True


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("count", [0, 2])
def test_valid_but_incomplete_after_an_exception(tmp_path, error, count):
  path = tmp_path / "cameras.json"
  with pytest.raises(error), cameras.CameraWriter(path) as writer:
    for i in range(count):
      writer.write(_frame(i))
    raise error
  data = _read(path)
  assert data["complete"] is False
  assert len(data["frames"]) == count


def test_a_frame_that_cannot_be_written_leaves_no_trace(tmp_path):
  path = tmp_path / "cameras.json"
  bad = dataclasses.replace(_frame(0), camera_to_world=np.full((4, 4), np.nan))
  with cameras.CameraWriter(path) as writer:
    with pytest.raises(ValueError, match="JSON"):
      writer.write(bad)
    writer.write(_frame(0))
    with pytest.raises(ValueError, match="JSON"):
      writer.write(bad)
    writer.write(_frame(1))
  assert len(_read(path)["frames"]) == 2
