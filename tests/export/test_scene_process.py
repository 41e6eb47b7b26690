"""Scenes written by another process: what goes wrong there is said here."""

import dataclasses
import functools
import json
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from point3r_jax.export import scene_process
from point3r_jax.export.scene import (
  OUTPUTS,
  FrameResult,
  OutputError,
  SceneOptions,
  SceneWriter,
)
from point3r_jax.export.scene_process import SceneProcess
from tests.scenes import SIZE, frame

ROOT = pathlib.Path(__file__).parents[2]


def result(number, maps=()):
  def filled(value, *channels):
    return np.full((*SIZE, *channels), value, np.float32)

  values = {
    "points_world": filled(number, 3),
    "confidence_world": filled(1),
    "depth": filled(number + 1),
    "confidence_camera": filled(number + 2),
  }
  return FrameResult(
    pose=np.float32([number, 0, 0, 1, 0, 0, 0]),
    camera_to_world=np.eye(4, dtype=np.float32),
    intrinsics=np.eye(3, dtype=np.float32),
    **{name: x if name in maps else None for name, x in values.items()},
  )


def write(scene, frames):
  for number in range(frames):
    scene.put(frame(number), result(number, scene.maps))
  scene.drain()


def test_more_frames_than_there_is_room_for_at_once(tmp_path):
  scene = SceneProcess(tmp_path, SceneOptions(tuple(OUTPUTS)), SIZE)
  done = []
  for number in range(40):
    values = result(number, scene.maps)
    scene.put(frame(number), values, functools.partial(done.append, number))
    # What was handed over is the caller's again.
    for name in scene.maps:
      getattr(values, name)[:] = -1
  scene.drain()
  assert done == list(range(40))
  facts = scene.close(complete=True)
  assert facts["cloud"]["added"] == 40 * 16 * 32
  for number in range(40):
    depth = np.asarray(Image.open(tmp_path / f"depth/{number:06d}.png"))
    assert (depth == 1000 * (number + 1)).all()
    with np.load(tmp_path / f"confidence/{number:06d}.npz") as file:
      assert (file["confidence"] == number + 2).all()
  cameras = json.loads((tmp_path / "cameras.json").read_text())
  assert cameras["complete"] is True
  assert [x["source_index"] for x in cameras["frames"]] == list(range(40))


@pytest.mark.parametrize("output", OUTPUTS)
def test_an_output_needs_the_maps_that_it_names(tmp_path, output):
  scene = SceneProcess(tmp_path, SceneOptions((output,)), SIZE)
  write(scene, 2)
  scene.close(complete=True)
  assert (tmp_path / OUTPUTS[output]).exists()


def test_a_process_that_is_killed_is_an_error(tmp_path):
  scene = SceneProcess(tmp_path, SceneOptions(), SIZE)
  write(scene, 1)
  os.kill(scene._process.pid, signal.SIGKILL)
  with pytest.raises(OutputError, match=r"ended by itself, with exit code -9"):
    write(scene, 100)
  with pytest.raises(OutputError, match=r"ended by itself"):
    scene.close(complete=True)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_ctrl_c_at_any_time_is_left_to_the_program(
  tmp_path, monkeypatch, method
):
  monkeypatch.setattr(scene_process, "_START_METHOD", method)
  scene = SceneProcess(tmp_path, SceneOptions(), SIZE)
  for _ in range(3):
    os.kill(scene._process.pid, signal.SIGINT)
    write(scene, 1)
  assert scene.close(complete=True)["cloud"]["added"] == 3 * 16 * 32


def test_files_that_cannot_be_made_are_an_error(tmp_path):
  scene = SceneProcess(tmp_path / "missing", SceneOptions(), SIZE)
  with pytest.raises(FileNotFoundError, match="missing"):
    write(scene, 100)
  with pytest.raises(FileNotFoundError, match="missing"):
    scene.close(complete=True)


class Peculiar(Exception):
  """Cannot be made from its arguments."""

  def __init__(self, one, two):
    super().__init__(f"{one} and {two}")


class Failing(SceneWriter):
  def commit(self, prepared):
    if prepared.frame.index == 3:
      raise Peculiar("this", "that")
    super().commit(prepared)


def test_an_error_of_any_kind_arrives_and_the_rest_is_written(tmp_path):
  scene = SceneProcess(tmp_path, SceneOptions(), SIZE, Failing)
  with pytest.raises(OutputError, match="Peculiar: this and that") as caught:
    write(scene, 100)
  assert "in commit" in "".join(caught.value.__notes__)
  assert scene.close(complete=False)["cloud"]["added"] == 3 * 16 * 32
  assert len(list((tmp_path / "depth").iterdir())) == 4  # Its own map stays.


def test_closing_raises_what_nobody_was_told(tmp_path):
  scene = SceneProcess(tmp_path, SceneOptions(), SIZE, Failing)
  for number in range(4):
    scene.put(frame(number), result(number, scene.maps))
  with pytest.raises(OutputError, match="Peculiar"):
    scene.close(complete=True)
  cameras = json.loads((tmp_path / "cameras.json").read_text())
  assert len(cameras["frames"]) == 3 and cameras["complete"] is False


class FailingTwice(Failing):
  def close(self, complete):
    super().close(complete)
    raise OSError("no room")


def test_an_error_of_closing_is_not_hidden_by_an_earlier_one(tmp_path):
  scene = SceneProcess(tmp_path, SceneOptions(), SIZE, FailingTwice)
  with pytest.raises(OutputError, match="Peculiar"):
    write(scene, 100)
  with pytest.raises(OSError, match="no room"):
    scene.close(complete=False)


def test_nothing_is_taken_after_the_end(tmp_path):
  scene = SceneProcess(tmp_path, SceneOptions(("trajectory",)), SIZE)
  assert scene.close(complete=True) == {}
  with pytest.raises(OutputError, match="closed already"):
    scene.put(frame(0), result(0))
  assert scene.close(complete=True) == {}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"depth": None}, r"depth of \(16, 32\) is needed .* got None"),
    ({"depth": np.float32(1)}, r"depth of \(16, 32\) is needed .* got \(\)"),
  ],
)
def test_maps_must_be_there(tmp_path, changes, message):
  scene = SceneProcess(tmp_path, SceneOptions(("depth",)), SIZE)
  with pytest.raises(ValueError, match=message):
    scene.put(frame(0), dataclasses.replace(result(0), **changes))
  write(scene, 2)  # Nothing came of it.
  scene.close(complete=True)
  assert len(list((tmp_path / "depth").iterdir())) == 2


class Unreadable:
  """Can be sent, but not received."""

  def __reduce__(self):
    return int, ("none",)


def test_what_cannot_be_sent_or_received_is_an_error(tmp_path):
  scene = SceneProcess(tmp_path, SceneOptions(("trajectory",)), SIZE)
  with pytest.raises((AttributeError, pickle.PicklingError)):
    scene.put(dataclasses.replace(frame(0), source=lambda: 0), result(0))
  write(scene, 1)
  scene.put(dataclasses.replace(frame(1), source=Unreadable()), result(1))
  with pytest.raises(ValueError, match="invalid literal"):
    scene.drain()
  scene.close(complete=False)
  assert len((tmp_path / "trajectory.txt").read_text().splitlines()) == 2


def test_an_error_of_who_is_told_is_raised(tmp_path):
  scene = SceneProcess(tmp_path, SceneOptions(("trajectory",)), SIZE)
  scene.put(frame(0), result(0), lambda: 1 // 0)
  with pytest.raises(ZeroDivisionError):
    scene.drain()
  scene.close(complete=False)
  assert len((tmp_path / "trajectory.txt").read_text().splitlines()) == 2


class Slow(SceneWriter):
  def commit(self, prepared):
    time.sleep(0.05)
    super().commit(prepared)


def die(folder):
  """Hands over ten frames and dies while they are written."""
  scene = SceneProcess(folder, SceneOptions(), SIZE, Slow)
  for number in range(10):
    scene.put(frame(number), result(number, scene.maps))
  os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_what_was_handed_over_is_written_if_the_program_dies(tmp_path):
  code = (
    "import pathlib, sys; from tests.export import test_scene_process as t; "
    "t.die(pathlib.Path(sys.argv[1]))"
  )
  command = [sys.executable, "-c", code, tmp_path]
  assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL
  deadline = time.monotonic() + 60
  while not (tmp_path / "scene.ply").exists():
    assert time.monotonic() < deadline
    time.sleep(0.05)
  cameras = json.loads((tmp_path / "cameras.json").read_text())
  assert len(cameras["frames"]) == 10 and cameras["complete"] is False


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, "-"])
def test_scripts_are_not_run_again_by_the_process(tmp_path, name):
  """Neither one of a file nor one of standard input."""
  script = tmp_path / "script.py"
  script.write_text(
    "import pathlib\n"
    "from tests.export import test_scene_process as t\n"
    "print('once')\n"
    "folder = pathlib.Path('out')\n"
    "folder.mkdir()\n"
    "scene = t.SceneProcess(folder, t.SceneOptions(), t.SIZE)\n"
    "t.write(scene, 2)\n"
    "scene.close(complete=True)\n"
  )
  done = subprocess.run(
    [sys.executable, name or script],
    input=script.read_text(),
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    cwd=tmp_path,
    capture_output=True,
    text=True,
  )
  assert (done.returncode, done.stdout) == (0, "once\n"), done.stderr
  assert (tmp_path / "out" / "scene.ply").exists()


def test_a_slot_holds_what_is_written_and_no_more():
  fields = {field.name for field in dataclasses.fields(FrameResult)}
  pixels = SIZE[0] * SIZE[1]
  for write, size in (
    (("trajectory", "cameras"), 0),
    (("depth", "depth_npz"), 4),
    (("scene",), 3 * 4 + 4 + 3),
    (tuple(OUTPUTS), 3 * 4 + 3 * 4 + 3),
  ):
    maps = SceneOptions(write).maps
    assert maps <= fields
    assert scene_process._slot(SIZE, maps).itemsize == size * pixels
