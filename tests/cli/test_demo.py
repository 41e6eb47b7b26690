"""The demo: its walk, its scores and its picture, with a tiny model."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageFont

import point3r_jax as p3r
from point3r_jax.cli import demo, demo_sheet
from point3r_jax.data.frames import open_frames
from point3r_jax.evaluation.results import SequenceResult
from point3r_jax.evaluation.written import written_prediction
from point3r_jax.export.read_scene import read_scene
from point3r_jax.export.scene import (
  FrameResult,
  SceneOptions,
  SceneWriter,
  write_summary,
)
from point3r_jax.geometry import estimate_focal, intrinsics_matrix
from tests import micro

FRAMES = 4


@pytest.fixture(scope="module")
def walk():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(demo, "_SIZE", micro.IMAGE_SIZE)
    return demo.open_walk(demo._SEED, FRAMES)


@pytest.fixture
def folders(tmp_path, walk):
  """A reconstruction that is right but for its unit: half of everything."""
  frames, scene = tmp_path / "frames", tmp_path / "scene"
  scene.mkdir()
  demo.write_frames(frames, walk)
  writer = SceneWriter(scene, SceneOptions(demo._WRITE, percentile=0))
  first = walk.load_points(0).camera_to_world.astype(np.float64)
  for index, frame in enumerate(open_frames(frames, size=48)):
    view = walk.load_points(index)
    pose = np.linalg.inv(first) @ view.camera_to_world
    to_camera = np.linalg.inv(view.camera_to_world)
    to_first = np.linalg.inv(first)
    local, world = (
      (view.points @ matrix[:3, :3].T + matrix[:3, 3]).astype(np.float32) / 2
      for matrix in (to_camera, to_first)
    )
    pose[:3, 3] /= 2
    focal = estimate_focal(jnp.asarray(local))
    result = FrameResult(
      pose=np.append(pose[:3, 3], [1, 0, 0, 0]),
      camera_to_world=pose,
      points_world=world,
      confidence_world=np.ones(walk.image_size, np.float32),
      depth=local[..., 2],
      confidence_camera=None,
      intrinsics=np.asarray(intrinsics_matrix(focal, walk.image_size)),
    )
    writer.commit(writer.prepare(index, frame, result))
  writer.close(True)
  facts = {"pointers": [6] * FRAMES, "seconds_of_frames": [0.1] * FRAMES}
  write_summary(scene, {**facts, "overflow": 0})
  return frames, scene


def test_the_walk_is_held_out_and_written_without_loss(walk, folders):
  frames = list(open_frames(folders[0], size=48))
  assert len(frames) == len(walk) == FRAMES
  for index, frame in enumerate(frames):
    np.testing.assert_array_equal(frame.image, walk.load_image(index))
  assert (walk.load_depth(0) > 0).all()  # A room: no sky.


def test_frames_of_an_earlier_walk_are_replaced(tmp_path, walk):
  for name in ("000099.png", "mine.png"):
    (tmp_path / name).touch()
  demo.write_frames(tmp_path, walk)
  names = {file.name for file in tmp_path.iterdir()}
  assert names == {f"{i:06d}.png" for i in range(FRAMES)} | {"mine.png"}


def test_scores_of_the_truth_in_another_unit(walk, folders):
  result = demo.score_scene(folders[1], read_scene(folders[1]), walk)
  assert result.excluded is None
  metrics = result.metrics
  assert metrics["abs_rel"] < 1e-4 and metrics["delta_1_25"] == 1
  assert metrics["abs_rel_metric"] == pytest.approx(0.5, abs=1e-3)
  assert metrics["ate_over_path"] < 1e-4 and metrics["rpe_trans"] < 1e-4
  assert metrics["rpe_rot_deg"] < 0.05
  assert metrics["accuracy_over_scene"] < 1e-3
  assert metrics["completeness_over_scene"] < 1e-3
  lines = demo.table(metrics).splitlines()
  assert len(lines) == 1 + len(demo._SCORES)
  assert lines[1].split()[:4] == ["depth", "error", "0.0", "%"]
  assert lines[3].split() == ["depth", "error,", "unscaled", "50.0", "%", "-"]


def test_every_score_is_one_of_the_task_s(walk, folders):
  metrics = demo.score_scene(folders[1], read_scene(folders[1]), walk).metrics
  for score in demo._SCORES:
    assert score.metric in metrics
    assert score.guess is None or f"{score.guess}/{score.metric}" in metrics


def test_names_of_scores_have_room():
  font = ImageFont.load_default(13)
  for score in demo._SCORES:
    assert len(score.name) < 26
    assert font.getlength(score.name) < demo_sheet.OVERVIEW_SIZE[1] / 4 - 8


def test_a_frame_without_a_focal_length_takes_the_others(walk, folders):
  scene = read_scene(folders[1])
  want = written_prediction(folders[1], scene, walk).arrays["points"]
  scene.intrinsics[1, [0, 1], [0, 1]] = 0
  got = written_prediction(folders[1], scene, walk).arrays["points"]
  np.testing.assert_allclose(got, want, rtol=0.02, atol=0.01)


def test_what_cannot_be_scored_is_excluded_with_the_reason(walk, folders):
  scene = read_scene(folders[1])
  scene.intrinsics[:, [0, 1], [0, 1]] = 0
  result = demo.score_scene(folders[1], scene, walk)
  assert "focal length" in result.excluded and not result.metrics
  shorter = scene._replace(depth=scene.depth[1:])
  assert "sequence" in demo.score_scene(folders[1], shorter, walk).excluded
  assert set(demo.table(result.metrics).split()) > {"-"}


@pytest.mark.parametrize(
  "excluded", [None, pytest.param("no alignment", marks=pytest.mark.slow)]
)
def test_the_picture_of_a_scene(walk, folders, excluded):
  scene = read_scene(folders[1])
  result = SequenceResult(walk.name, FRAMES, {}, excluded=excluded)
  picture = demo.draw(scene, walk, result, "what it shows")
  assert picture.size == demo_sheet._SIZE[::-1] and picture.mode == "P"
  pixels = np.asarray(picture.convert("RGB")).astype(int)
  top, left = demo_sheet._TOP, demo_sheet._MARGIN
  height, width = demo_sheet.OVERVIEW_SIZE
  shown = pixels[top : top + height, left : left + width]
  near_orange = np.abs(shown - demo_sheet.ESTIMATE).max(axis=-1) < 30
  empty = np.abs(shown - demo_sheet.BACKGROUND).max(axis=-1) < 3
  assert near_orange.sum() > 100 and 0.05 < empty.mean() < 0.9


def test_the_whole_demo(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(p3r.PRESETS, "small", micro.CONFIG)
  monkeypatch.setattr(demo, "_SIZE", micro.IMAGE_SIZE)
  output = tmp_path / "demo"
  arguments = ["--output", str(output), "--frames", str(FRAMES)]
  arguments += ["--checkpoint", "untrained:small"]
  for _ in range(2):  # It may be run again.
    assert demo.main(arguments) == 0
  said = capsys.readouterr().out
  assert demo._NOTICE in said and "$ python reconstruct.py" in said
  summary = json.loads((output / "scene/summary.json").read_text())
  assert summary["frames"] == FRAMES
  assert (output / "scene/scene.ply").stat().st_size > 1000
  metrics = json.loads((output / "metrics.json").read_text())
  assert metrics["checkpoint"] == "untrained:small"
  assert metrics["frames"] == FRAMES and metrics["seed"] == demo._SEED
  assert bool(metrics["metrics"]) != bool(metrics["excluded"])
  with Image.open(output / "demo.png") as picture:
    picture.load()
    assert picture.size == (1400, 828)
  assert (output / "demo.png").stat().st_size < 400_000


def test_the_subtitle_says_what_was_done(tmp_path):
  facts = {"pointers": [6, 9], "device": "cpu: cpu"}
  flags = demo._parser().parse_args(["--frames", "5"])
  assert flags.checkpoint == "tiny"
  write_summary(tmp_path, facts | {"seconds_per_frame": {"median": 0.05}})
  said = demo._subtitle(flags, tmp_path)
  for words in ("5 frames", '"tiny"', "9 pointers", "50 ms a frame on a CPU"):
    assert words in said
  write_summary(tmp_path, facts | {"seconds_per_frame": None})
  assert "ms" not in demo._subtitle(flags, tmp_path)


def test_a_failed_reconstruction_is_reported(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(demo, "_SIZE", micro.IMAGE_SIZE)
  arguments = ["--output", str(tmp_path), "--frames", str(FRAMES)]
  assert demo.main([*arguments, "--checkpoint", "untrained:nothing"]) == 2
  assert "unknown preset" in capsys.readouterr().err
  assert not (tmp_path / "demo.png").exists()


def test_too_few_frames_are_refused(tmp_path):
  with pytest.raises(SystemExit):
    demo.main(["--output", str(tmp_path), "--frames", "2"])
