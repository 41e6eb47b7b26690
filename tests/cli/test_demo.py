"""The demo's clip, and the whole of it with a tiny model."""

import json

import numpy as np
import pytest
from PIL import Image

import point3r_jax as p3r
from point3r_jax.cli import demo
from point3r_jax.data.frames import open_frames
from tests import micro

SIZE = (48, 64)


@pytest.fixture(scope="module")
def images():
  return [demo.render(pose, SIZE) for pose in demo.walk(4)]


def test_poses_are_rigid_and_inside_the_room():
  low, high, _ = demo._ROOM
  for pose in demo.walk(10):
    rotation = pose[:, :3]
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(rotation) > 0
    assert (pose[:, 3] > low).all() and (pose[:, 3] < high).all()


def test_rendering_is_deterministic_detailed_and_moves(images):
  again = demo.render(next(demo.walk(4)), SIZE)
  np.testing.assert_array_equal(images[0], again)
  for image in images:
    assert image.shape == (*SIZE, 3) and image.dtype == np.uint8
    assert image.std() > 20
  assert np.abs(images[0] - images[1].astype(float)).mean() > 5


@pytest.mark.parametrize("thing", [*demo._BOXES, demo._BALL])
def test_a_ray_meets_what_is_straight_ahead(thing):
  x, y = thing[0][:2] if thing is demo._BALL else np.add(*thing[:2])[:2] / 2
  pose = np.hstack([np.eye(3), [[x], [y], [-1.0]]])
  pixel = demo.render(pose, (1, 1))[0, 0]
  assert pixel.argmax() == np.argmax(thing[2])


def test_the_clip_reads_back(tmp_path, images):
  demo.write_clip(tmp_path / "clip.mp4", images)
  frames = list(open_frames(tmp_path / "clip.mp4", size=SIZE[1]))
  assert len(frames) == len(images)
  for frame, image in zip(frames, images, strict=True):
    assert np.abs(frame.image - image.astype(float)).mean() < 8


def test_the_whole_demo(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(p3r.PRESETS, "small", micro.CONFIG)
  monkeypatch.setattr(demo, "_SIZE", micro.IMAGE_SIZE)
  arguments = ["--output", str(tmp_path / "demo"), "--frames", "4"]
  assert demo.main(arguments) == 0
  assert capsys.readouterr().out.count(demo._NOTICE) == 2
  summary = json.loads((tmp_path / "demo/scene/summary.json").read_text())
  assert summary["frames"] == 4
  with Image.open(tmp_path / "demo/demo.png") as sheet:
    sheet.load()
    assert sheet.size == (1200, 640)


def test_a_failed_reconstruction_is_reported(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(demo, "_SIZE", micro.IMAGE_SIZE)
  monkeypatch.setattr(demo, "_CHECKPOINT", "untrained:nothing")
  status = demo.main(["--output", str(tmp_path), "--frames", "1"])
  assert status == 2
  assert "unknown preset" in capsys.readouterr().err
  assert not (tmp_path / "demo.png").exists()


def test_no_frames_are_refused(tmp_path):
  with pytest.raises(SystemExit):
    demo.main(["--output", str(tmp_path), "--frames", "0"])
