"""The benchmark from a video to files, with a small model; nothing is timed."""

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import reconstruction
from point3r_jax.data.frames import open_frames
from tests import micro


@pytest.fixture
def _micro_model(monkeypatch):
  def load(name, precision):
    return micro.CONFIG, micro.params()

  monkeypatch.setattr(reconstruction, "load_checkpoint", load)


@pytest.mark.slow
def test_made_up_video(tmp_path):
  path = tmp_path / "walk.mp4"
  reconstruction.make_video(path, (64, 96), frames=7, views=4)
  frames = list(open_frames([str(path)], size=48))
  assert len(frames) == 7
  assert frames[0].image.shape == (32, 48, 3)
  # Up and down: the fourth picture is where it turns.
  there, back, other = (frames[i].image.astype(int) for i in (2, 4, 3))
  assert abs(there - back).mean() < abs(there - other).mean() / 2


@pytest.mark.slow
@pytest.mark.usefixtures("_micro_model")
def test_reads_steps_and_writes_the_same_frames(tmp_path):
  flags = reconstruction.parse(["--frames=9", "--size=48"])
  flags.source, flags.precision = (64, 96), "float32"
  result = reconstruction.measure(flags, tmp_path)
  json.dumps(result)
  assert result["frames"] == 9
  assert result["image_size"] == list(micro.IMAGE_SIZE)
  assert result["pointers"] > 0
  assert min(result[x] for x in ("read", "step", "written", "share")) > 0
  assert len(list((tmp_path / "output" / "depth").iterdir())) == 9
  # A fifth of each frame's pixels is left out.
  near = {"rel": 0.01}
  assert result["cloud"]["added"] == pytest.approx(9 * 0.8 * 32 * 48, **near)
  surfaces = result["surfaces"]
  assert surfaces["cloud"]["added"] == pytest.approx(9 * 0.8 * 32 * 48, **near)
  depth = Image.open(tmp_path / "surfaces" / "depth" / "000000.png")
  assert np.min(depth) > 1400 and np.max(depth) < 2600
