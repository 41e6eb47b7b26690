"""From predictions to files: in order, and none of what came after an error."""

import dataclasses
import json
import sys
import time

import jax
import numpy as np
import pytest

from point3r_jax.export.scene import OutputError, SceneOptions, SceneWriter
from point3r_jax.export.scene_process import SceneProcess
from point3r_jax.pipeline import Progress, reconstruct
from point3r_jax.streaming import StepOptions, empty_prediction
from tests.scenes import SIZE, frame

FRAMES = 12


def frames():
  for index in range(FRAMES):
    yield frame(index, value=index)


@dataclasses.dataclass
class Fake:
  """A stream that knows the answer: frame n is at x = n, n + 1 deep."""

  broken: int = FRAMES
  look_ahead: int = 2

  def extend(self, images):
    empty = empty_prediction(StepOptions(), (1, *SIZE, 3))
    for number, image in enumerate(images):
      assert (image == number).all()
      assert sys.getswitchinterval() < 1e-3  # The device is fed in time.
      depth = np.nan if number == self.broken else number + 1.0
      points = np.zeros((1, *SIZE, 3), np.float32) + np.float32([0, 0, depth])
      pose = np.float32([[number, 0, 0, 1, 0, 0, 0]])
      if number == self.broken:
        pose[:] = np.nan
      yield jax.device_put(
        empty.replace(
          points_camera=points,
          points_world=points,
          pose=pose,
          pointer_count=np.int32([number]),
        )
      )


class Slow(SceneWriter):
  """Takes the longer for a frame the earlier it is."""

  def prepare(self, number, frame, result):
    time.sleep(0.01 * (FRAMES - number))
    return super().prepare(number, frame, result)


def run(directory, stream):
  outputs = ("scene", "trajectory", "cameras", "depth", "confidence")
  options = SceneOptions(outputs, percentile=0)
  scene = SceneProcess(directory, options, SIZE, Slow)
  progress = Progress()
  try:
    reconstruct(frames(), stream, scene, progress)
  finally:
    scene.close(complete=False)
  return progress


def written(directory):
  names = sorted(path.name for path in (directory / "depth").iterdir())
  cameras = json.loads((directory / "cameras.json").read_text())["frames"]
  return names, cameras


def test_frames_are_written_in_order(tmp_path):
  progress = run(tmp_path, Fake())
  assert progress.pointers == list(range(FRAMES))
  lines = (tmp_path / "trajectory.txt").read_text().splitlines()
  positions = [float(x.split()[1]) for x in lines if not x.startswith("#")]
  assert positions == list(range(FRAMES))
  names, cameras = written(tmp_path)
  assert names == [f"{number:06d}.png" for number in range(FRAMES)]
  assert [f"depth/{name}" for name in names] == [
    camera["depth_file"] for camera in cameras
  ]


def test_an_error_leaves_what_was_before_it(tmp_path):
  with pytest.raises(OutputError, match=r"film, frame 4: .* not finite"):
    run(tmp_path, Fake(broken=4))
  names, cameras = written(tmp_path)
  assert len(cameras) == 4
  assert names == [f"{number:06d}.png" for number in range(4)]
