"""reconstruct.py from end to end: all kinds of input, outputs that hold."""

import functools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import av
import jax
import numpy as np
import pytest
from PIL import Image

import point3r_jax as p3r
from point3r_jax import geometry, pretrained
from point3r_jax.checkpoints import write_config
from point3r_jax.cli import reconstruct as cli
from point3r_jax.data.frames import open_frames
from point3r_jax.export import scene
from point3r_jax.export.scene import OUTPUTS, SceneWriter
from point3r_jax.export.scene_process import SceneProcess
from tests import micro

ROOT = pathlib.Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("shared_programs", "checkpoints_read_once")

SIZE = 64  # The micro model's; photos of 128×96 become 64×48.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  path = tmp_path_factory.mktemp("model") / "micro"
  p3r.save_checkpoint(path, micro.CONFIG, micro.params())
  return path


def pixels(index, height=96, width=128):
  """Smooth coloured waves that move with the index."""
  y, x = np.mgrid[:height, :width]
  waves = [
    np.sin(0.07 * (k + 1) * x + 0.05 * y + 0.3 * index) for k in range(3)
  ]
  return np.uint8(127 + 120 * np.stack(waves, axis=-1))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  folder = tmp_path_factory.mktemp("photos")
  for index in range(8):
    Image.fromarray(pixels(index)).save(folder / f"{index}.png")
  return folder


def write_video(path, frames, options=None):
  with av.open(str(path), "w", options=options or {}) as container:
    stream = container.add_stream("mpeg4", rate=25)
    stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
    for index in range(frames):
      frame = av.VideoFrame.from_ndarray(pixels(index), format="rgb24")
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  return path


def reconstruct(checkpoint, output, inputs, *flags):
  fixed = ["--checkpoint", checkpoint, "--output", output, "--input", *inputs]
  return cli.main([str(argument) for argument in (*fixed, *flags)])


def read_ply(path):
  data = path.read_bytes()
  header, body = data.split(b"end_header\n", 1)
  assert b"format binary_little_endian 1.0" in header
  kind = [("position", "<f4", 3), ("color", "u1", 3)]
  return np.frombuffer(body, kind)


def test_outputs_agree_with_the_model(checkpoint, photos, tmp_path, capsys):
  flags = ("--write", *OUTPUTS)
  assert reconstruct(checkpoint, tmp_path / "out", [photos], *flags) == 0
  out = tmp_path / "out"
  frames = list(open_frames(str(photos), size=SIZE))
  images = np.stack([frame.image for frame in frames])
  memory, expected = p3r.scan(
    micro.CONFIG,
    micro.params(),
    p3r.init_memory(micro.CONFIG, 1, images.shape[1:3], 400),
    images[:, None],
  )
  expected = jax.tree.map(lambda x: np.asarray(x[:, 0]), expected)

  trajectory = np.loadtxt(out / "trajectory.txt")
  np.testing.assert_array_equal(trajectory[:, 0], range(8))
  poses = trajectory[:, [1, 2, 3, 7, 4, 5, 6]]
  np.testing.assert_allclose(poses, expected.pose, atol=1e-5)

  cameras = json.loads((out / "cameras.json").read_text())
  assert cameras["complete"] is True and len(cameras["frames"]) == 8
  focal = geometry.estimate_focal(expected.points_camera)
  for t, camera in enumerate(cameras["frames"]):
    np.testing.assert_allclose(
      camera["camera_to_world"],
      geometry.pose_to_matrix(expected.pose[t]),
      atol=1e-5,
    )
    network, original = camera["network"], camera["original"]
    assert (network["height"], network["width"]) == (48, 64)
    assert (original["height"], original["width"]) == (96, 128)
    near = {"rtol": 1e-3, "atol": 1e-4}
    np.testing.assert_allclose(network["intrinsics"][0][0], focal[t], **near)
    np.testing.assert_allclose(
      original["intrinsics"][0][0], 2 * focal[t], **near
    )
    assert camera["source_file"] == f"{t}.png"

    depth = expected.points_camera[t, ..., 2]
    with np.load(out / f"depth/{t:06d}.npz") as file:
      np.testing.assert_allclose(file["depth"], depth, atol=1e-5)
    with np.load(out / f"confidence/{t:06d}.npz") as file:
      np.testing.assert_allclose(
        file["confidence"], expected.confidence_camera[t], rtol=1e-5
      )
    png = np.asarray(Image.open(out / f"depth/{t:06d}.png"))
    assert png.dtype == np.uint16
    steps = np.where(depth > 0, depth * 1000, 0)
    np.testing.assert_allclose(png, steps, atol=0.6)

  cloud = read_ply(out / "scene.ply")
  assert 0 < len(cloud) <= 0.81 * images[..., 0].size
  low = expected.points_world.min((0, 1, 2)) - 1e-4
  high = expected.points_world.max((0, 1, 2)) + 1e-4
  assert ((cloud["position"] >= low) & (cloud["position"] <= high)).all()

  summary = json.loads((out / "summary.json").read_text())
  assert summary["frames"] == 8 and summary["complete"] is True
  assert summary["pointers"] == expected.pointer_count.tolist()
  assert summary["overflow"] == 0
  assert summary["resolution"] == {"height": 48, "width": 64}
  assert len(summary["seconds_of_frames"]) == 8
  assert summary["depth_png"]["scale"] == 1000
  assert summary["versions"]["jax"] == jax.__version__
  assert memory.count[0] == summary["pointers"][-1]
  assert re.search(
    r"out: 8 frames in \d+\.\d s \(the first after \d+\.\d s, \d+\.\d ms each "
    rf"without compilation\), {memory.count[0]} pointers; see summary\.json",
    capsys.readouterr().out,
  )


@pytest.mark.parametrize(
  ("together", "mean"), [(1, (0.1 + 0.1 + 0.4) / 3), (2, (0.1 + 0.4) / 2)]
)
def test_times_are_of_frames_that_waited_for_no_compilation(together, mean):
  seconds = [9.0, 0.2, 0.2, 0.1, 5.0, 0.1, 0.4]
  compiled = [1, 1, 1, 1, 2, 2, 2]
  found = cli._statistics(seconds, compiled, together)
  assert found["mean"] == pytest.approx(mean)
  assert found["frames_left_out"] == (4 if together == 1 else 5)
  assert cli._statistics(seconds[:3], compiled[:3], together) is None
  assert cli._statistics([], [], together) is None


@pytest.mark.parametrize(
  "suffix",
  [
    "mp4",
    pytest.param("mkv", marks=pytest.mark.slow),
    pytest.param("mov", marks=pytest.mark.slow),
    "webm",
  ],
)
def test_videos(checkpoint, tmp_path, suffix):
  path = tmp_path / f"clip.{suffix}"
  if suffix == "webm":
    with av.open(str(path), "w") as container:
      stream = container.add_stream("libvpx", rate=25)
      stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
      for index in range(12):
        frame = av.VideoFrame.from_ndarray(pixels(index), format="rgb24")
        container.mux(stream.encode(frame))
      container.mux(stream.encode())
  else:
    write_video(path, 12)
  flags = ("--stride", 2, "--start", 1, "--max_frames", 4)
  assert reconstruct(checkpoint, tmp_path / "out", [path], *flags) == 0
  trajectory = np.loadtxt(tmp_path / "out" / "trajectory.txt")
  np.testing.assert_allclose(
    trajectory[:, 0], np.array([1, 3, 5, 7]) / 25, atol=2e-3
  )


def test_truncated_video_says_what_was_lost(checkpoint, tmp_path, capsys):
  whole = write_video(
    tmp_path / "whole.mp4", 40, options={"movflags": "faststart"}
  )
  data = whole.read_bytes()
  path = tmp_path / "cut.mp4"
  path.write_bytes(data[: len(data) * 2 // 3])
  assert reconstruct(checkpoint, tmp_path / "out", [path]) == 0
  summary = json.loads((tmp_path / "out" / "summary.json").read_text())
  assert 10 < summary["frames"] < 40
  assert summary["frames"] + summary["frames_lost"] == 40
  assert summary["complete"] is False
  assert "40 frames lost" in capsys.readouterr().err


def test_scales_at_which_all_is_lost_are_warned_of(
  checkpoint, photos, tmp_path, capsys
):
  flags = ("--max_frames", 2, "--depth_scale", 1e-9, "--voxel_size", 1e-12)
  assert reconstruct(checkpoint, tmp_path / "out", [photos], *flags) == 0
  error = capsys.readouterr().err
  assert "depths round to 0 and count as missing; raise --depth_scale" in error
  assert "voxels away and left out; raise --voxel_size" in error


@pytest.mark.slow
def test_only_what_is_asked_for_is_written(checkpoint, photos, tmp_path):
  flags = ("--write", "trajectory", "--max_frames", 2)
  assert reconstruct(checkpoint, tmp_path / "out", [photos], *flags) == 0
  names = sorted(path.name for path in (tmp_path / "out").iterdir())
  assert names == ["summary.json", "trajectory.txt"]


def test_what_to_know_of_a_checkpoint_is_said_once(
  checkpoint, photos, tmp_path, monkeypatch, capsys
):
  folder = tmp_path / "package" / "tiny"
  folder.mkdir(parents=True)
  write_config(folder, micro.CONFIG, {"notice": "It knows only rooms."})
  packed = pretrained.pack_params(micro.params())
  (folder / pretrained.PARAMS_FILE).write_bytes(packed)
  monkeypatch.setattr(pretrained, "FOLDER", tmp_path / "package")
  monkeypatch.setitem(p3r.PRESETS, "micro", micro.CONFIG)
  flags = ("--write", "trajectory", "--max_frames", 1)
  for name, line in (
    ("tiny", "It knows only rooms."),
    ("untrained:micro", "These weights are random"),
    (checkpoint, None),
  ):
    out = tmp_path / pathlib.Path(name).name
    assert reconstruct(name, out, [photos], *flags) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + (line is not None)
    assert line is None or printed[0].startswith(line)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["checkpoint"] == str(name)


@pytest.mark.slow
def test_overflow_is_reported(checkpoint, photos, tmp_path, capsys):
  flags = ("--no_fusion", "--capacity", 12, "--max_capacity", 12)
  assert reconstruct(checkpoint, tmp_path / "out", [photos], *flags) == 0
  summary = json.loads((tmp_path / "out" / "summary.json").read_text())
  assert summary["overflow"] == 7 * 12
  assert "84 pointers found no room" in capsys.readouterr().err


def test_shuffling_changes_the_order_only(checkpoint, photos, tmp_path):
  flags = ("--shuffle", "--seed", 3, "--write", "trajectory")
  assert reconstruct(checkpoint, tmp_path / "out", [photos], *flags) == 0
  order = np.loadtxt(tmp_path / "out" / "trajectory.txt")[:, 0]
  assert sorted(order) == list(range(8)) and list(order) != list(range(8))


def test_overwriting_removes_earlier_results_only(checkpoint, photos, tmp_path):
  out = tmp_path / "out"
  assert reconstruct(checkpoint, out, [photos]) == 0
  (out / "notes.txt").write_text("mine")
  assert reconstruct(checkpoint, out, [photos]) == 2
  flags = ("--overwrite", "--write", "trajectory", "--max_frames", 2)
  assert reconstruct(checkpoint, out, [photos], *flags) == 0
  names = sorted(path.name for path in out.iterdir())
  assert names == ["notes.txt", "summary.json", "trajectory.txt"]


def test_folders_of_others_are_never_overwritten(
  checkpoint, photos, tmp_path, capsys
):
  out = tmp_path / "out"
  (out / "depth").mkdir(parents=True)
  (out / "depth" / "000000.png").write_text("somebody's measurements")
  assert reconstruct(checkpoint, out, [photos], "--overwrite") == 2
  assert "no earlier reconstruction" in capsys.readouterr().err
  assert (out / "depth" / "000000.png").read_text() == "somebody's measurements"


def test_flags_are_checked_before_weights_are_read(
  checkpoint, photos, tmp_path, monkeypatch, capsys
):
  def read(*_, **__):
    raise AssertionError("reads gigabytes first")

  monkeypatch.setattr(cli, "load_checkpoint", read)
  notes = tmp_path / "out" / "notes.txt"
  notes.parent.mkdir()
  notes.write_text("mine")
  for output, source, flags, message in (
    ("out", photos, (), "is not empty; choose another folder"),
    ("out/notes.txt", photos, ("--overwrite",), "cannot write to"),
    ("new", tmp_path / "missing.mp4", (), "missing.mp4"),
    ("new", photos, ("--size", 100), "100"),
  ):
    assert reconstruct(checkpoint, tmp_path / output, [source], *flags) == 2
    assert message in capsys.readouterr().err
  assert notes.read_text() == "mine" and not (tmp_path / "new").exists()


class FullDisk(SceneWriter):
  def close(self, complete):
    def full(*_):
      raise OSError(28, "No space left on device")

    scene.write_ply = full  # Of this process alone.
    return super().close(complete)


def test_a_full_disk_is_one_line(
  checkpoint, photos, tmp_path, monkeypatch, capsys
):
  process = functools.partial(SceneProcess, writer=FullDisk)
  monkeypatch.setattr(cli, "SceneProcess", process)
  assert reconstruct(checkpoint, tmp_path / "out", [photos]) == 2
  assert (
    capsys.readouterr().err == "error: [Errno 28] No space left on device\n"
  )
  summary = json.loads((tmp_path / "out" / "summary.json").read_text())
  assert summary["frames"] == 8
  cameras = json.loads((tmp_path / "out" / "cameras.json").read_text())
  assert len(cameras["frames"]) == 8


@pytest.mark.parametrize(
  ("inputs", "flags", "message"),
  [
    (["missing.mp4"], (), "missing.mp4"),
    (["empty"], (), "no image"),
    (["text.png"], (), "text.png"),
    (["cut.png"], (), "cut.png"),
    (["noise.mp4"], (), "noise.mp4"),
    (["thin.png"], (), "thin.png"),
    (["0.png"], ("--checkpoint", "nowhere"), "no checkpoint 'nowhere'"),
    (["0.png"], ("--stride", 0), "stride"),
    (["0.png"], ("--capacity", 1), "capacity 1"),
    (["0.png"], ("--size", 100), "100"),
    (["0.png"], ("--confidence", 100), "percentile"),
    (["0.png"], ("--voxel_size", -1), "voxel"),
    (["0.png"], ("--depth_scale", "inf"), "depth_scale"),
    (["0.png"], ("--size", 0), "size"),
  ],
)
def test_bad_input_is_one_line_and_exit_code_2(
  checkpoint, tmp_path, monkeypatch, capsys, inputs, flags, message
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "empty").mkdir()
  (tmp_path / "text.png").write_text("not a picture")
  (tmp_path / "noise.mp4").write_bytes(b"not a video" * 100)
  Image.fromarray(pixels(0)).save("0.png")
  Image.fromarray(pixels(0, 4, 640)).save("thin.png")
  data = (tmp_path / "0.png").read_bytes()
  (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
  assert reconstruct(checkpoint, tmp_path / "out", inputs, *flags) == 2
  captured = capsys.readouterr()
  assert message in captured.err
  assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
  assert not (tmp_path / "out").exists()


def test_an_unreadable_image_in_the_middle_keeps_what_was_done(
  checkpoint, tmp_path, capsys
):
  for index in range(6):
    Image.fromarray(pixels(index)).save(tmp_path / f"{index}.png")
  (tmp_path / "4.png").write_text("not a picture")
  assert reconstruct(checkpoint, tmp_path / "out", [tmp_path / "*.png"]) == 2
  assert "4.png" in capsys.readouterr().err
  summary = json.loads((tmp_path / "out" / "summary.json").read_text())
  assert summary["frames"] == 4 and summary["complete"] is False
  cameras = json.loads((tmp_path / "out" / "cameras.json").read_text())
  assert len(cameras["frames"]) == 4 and cameras["complete"] is False
  assert len(read_ply(tmp_path / "out" / "scene.ply"))


def test_weights_that_give_no_camera_are_an_error(tmp_path, photos, capsys):
  params = jax.tree.map(lambda x: x, micro.params())
  params["pose_head"] = jax.tree.map(lambda x: x * np.nan, params["pose_head"])
  p3r.save_checkpoint(tmp_path / "bad", micro.CONFIG, params)
  assert reconstruct(tmp_path / "bad", tmp_path / "out", [photos]) == 2
  assert "not finite" in capsys.readouterr().err


def interrupt(checkpoint, folder, frames, interrupts):
  """Interrupts a run of its own after some frames; returns what it wrote."""
  video = write_video(folder / "long.mp4", 2000)
  out = folder / "out"
  command = [sys.executable, ROOT / "reconstruct.py"]
  command += ["--checkpoint", checkpoint, "--input", video, "--output", out]
  environment = dict(os.environ)
  del environment["JAX_COMPILATION_CACHE_DIR"]  # Compilation takes its time.
  process = subprocess.Popen(
    command,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
    env=environment,
  )
  depth, deadline = out / "depth", time.monotonic() + 120
  while not depth.exists() or len(list(depth.glob("*.png"))) < frames:
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.05)
  for _ in range(interrupts):
    os.killpg(process.pid, signal.SIGINT)  # As a terminal does.
    time.sleep(0.1)
  _, error = process.communicate(timeout=60)
  assert process.returncode == 130, error
  assert "Traceback" not in error
  return out, error


@pytest.mark.slow
@pytest.mark.parametrize("frames", [0, 20])
def test_ctrl_c_leaves_a_complete_set_of_files(checkpoint, tmp_path, frames):
  """Before the first frame (while compiling) and after some."""
  out, _ = interrupt(checkpoint, tmp_path, frames, 1)
  summary = json.loads((out / "summary.json").read_text())
  done = summary["frames"]
  assert frames <= done < 2000
  assert summary["interrupted"] is True and summary["complete"] is False
  assert len((out / "trajectory.txt").read_text().splitlines()) == done + 1
  assert len(list((out / "depth").iterdir())) == done
  cameras = json.loads((out / "cameras.json").read_text())
  assert len(cameras["frames"]) == done
  assert (len(read_ply(out / "scene.ply")) > 0) == (done > 0)


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_wait_for_compilation(checkpoint, tmp_path):
  out, error = interrupt(checkpoint, tmp_path, 0, 2)
  assert "ending at once" in error
  summary = json.loads((out / "summary.json").read_text())
  assert summary.keys() == {"format", "complete"} and not summary["complete"]
