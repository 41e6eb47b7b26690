"""evaluate.py from flags to reports: resumed, scored again, refused."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import point3r_jax as p3r
from point3r_jax.cli.evaluate import main
from point3r_jax.evaluation import runner
from point3r_jax.evaluation.report import plots
from tests import micro
from tests.evaluation import trees

ROOT = pathlib.Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("shared_programs", "checkpoints_read_once")

HEIGHT, WIDTH = micro.IMAGE_SIZE
SCENES = ["sequences=3", "frames=4", f"height={HEIGHT}", f"width={WIDTH}"]


@pytest.fixture(autouse=True, scope="module")
def one_device():
  """What several devices share is tested elsewhere, and compiles longer."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, "local_devices", lambda **_: jax.devices()[:1])
    yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  path = tmp_path_factory.mktemp("model") / "micro"
  p3r.save_checkpoint(path, micro.CONFIG, micro.params())
  return path


def synthetic(output, *flags, options=SCENES):
  words = ["--dataset", "synthetic", "--output", output, *flags]
  return main([*map(str, words), "--options", *options])


@pytest.fixture(scope="module")
def evaluated(checkpoint, tmp_path_factory):
  output = tmp_path_factory.mktemp("evaluated") / "out"
  flags = ["--checkpoint", checkpoint, "--batch_size", "2"]
  assert synthetic(output, *flags) == 0
  return output


def read(output):
  return json.loads((output / "metrics.json").read_text())


def test_made_up_scenes_need_no_data(evaluated, capsys):
  found = read(evaluated)
  names = ["abs_rel", "delta_1_25", "abs_rel_metric", "ate_over_path"]
  names += ["rpe_trans", "rpe_rot_deg"]
  names += ["accuracy_over_scene", "completeness_over_scene"]
  names += ["constant_depth/abs_rel", "last_depth/abs_rel"]
  names += ["constant_pose/ate_over_path", "constant_depth/accuracy_over_scene"]
  assert all(np.isfinite(found[name]) for name in names)
  # The model is random, the truth is not.
  assert found["last_depth/abs_rel"] < found["constant_depth/abs_rel"]
  assert found["last_depth/abs_rel"] < found["abs_rel"]
  run = found["run"]
  assert run["config"] == micro.CONFIG.to_dict()
  assert len(run["checkpoint_sha256"]) == 64
  assert run["protocol"]["frames"] == 4 and run["sequences"] == 3
  assert "frames=4" in run["deviations"]
  assert (evaluated / "report.html").stat().st_size > 10_000
  assert "trivial: last depth" in (evaluated / "table.md").read_text()


@pytest.fixture
def no_plots(monkeypatch):
  """Plots take longer than all else; `evaluated` has drawn them once."""
  monkeypatch.setattr(plots, "to_svg", lambda *_: "<svg></svg>")


@pytest.fixture
def copied(evaluated, tmp_path, no_plots):
  output = tmp_path / "out"
  subprocess.run(["cp", "-r", evaluated, output], check=True)
  return output


def forbid_predicting(monkeypatch):
  def predict(*_, **__):
    raise AssertionError("predicts what is predicted already")

  monkeypatch.setattr(runner, "predict", predict)


def test_complete_predictions_are_kept(copied, checkpoint, monkeypatch):
  forbid_predicting(monkeypatch)
  before = read(copied)
  (copied / "metrics.json").unlink()
  assert synthetic(copied, "--checkpoint", checkpoint) == 0
  assert read(copied) == before


@pytest.mark.slow
def test_what_is_damaged_is_predicted_again(
  copied, checkpoint, monkeypatch, capsys
):
  before, again = read(copied), []
  path = copied / "predictions/scene_001/depth.npy"
  path.write_bytes(path.read_bytes()[:-1] + b"\xff")
  predict = runner.predict

  def note(make_stream, sequences, *args, **kwargs):
    again.extend(sequence.name for sequence in sequences)
    predict(make_stream, sequences, *args, **kwargs)

  monkeypatch.setattr(runner, "predict", note)
  flags = ["--checkpoint", checkpoint, "--batch_size", "2"]
  assert synthetic(copied, *flags) == 0
  assert again == ["scene_001"]
  assert "depth.npy has changed" in capsys.readouterr().err
  assert read(copied)["abs_rel"] == pytest.approx(before["abs_rel"], rel=1e-5)


def test_scored_again_without_the_model(copied, monkeypatch):
  forbid_predicting(monkeypatch)
  before = read(copied)
  options = [*SCENES, "alignment=median", "icp_distance=1.0"]
  assert synthetic(copied, options=options) == 0
  found = read(copied)
  assert found["abs_rel"] != before["abs_rel"]
  assert found["abs_rel_metric"] == before["abs_rel_metric"]
  assert found["run"]["checkpoint_sha256"] == before["run"]["checkpoint_sha256"]
  assert "alignment=median" in found["run"]["deviations"]


@pytest.mark.slow
def test_another_model_is_refused_unless_told_to(
  copied, checkpoint, tmp_path, capsys
):
  other = tmp_path / "other"
  p3r.save_checkpoint(other, micro.CONFIG, micro.params(seed=2))
  flags = ["--checkpoint", checkpoint, "--no_fusion"]
  assert synthetic(copied, *flags) == 2
  assert "stream.fusion was True and is False" in capsys.readouterr().err
  before = read(copied)
  flags = ["--checkpoint", other, "--batch_size", "2"]
  assert synthetic(copied, *flags) == 2
  error = capsys.readouterr().err
  assert "made otherwise: checkpoint_sha256 was" in error
  assert synthetic(copied, *flags, "--overwrite") == 0
  after = read(copied)
  assert after["abs_rel"] != before["abs_rel"]
  assert after["last_depth/abs_rel"] == before["last_depth/abs_rel"]


@pytest.mark.slow
def test_without_rotary_is_another_model_and_says_so(
  evaluated, checkpoint, tmp_path
):
  output = tmp_path / "out"
  flags = ["--checkpoint", checkpoint, "--batch_size", "2", "--no_rotary"]
  assert synthetic(output, *flags) == 0
  found, usual = read(output), read(evaluated)
  assert found["run"]["stream"] == usual["run"]["stream"] | {"rotary": False}
  assert "rotary=False" in found["run"]["deviations"]
  assert not any("rotary" in x for x in usual["run"]["deviations"])
  assert found["abs_rel"] != usual["abs_rel"]


def test_published_protocol_on_a_miniature(
  checkpoint, tmp_path, capsys, no_plots
):
  """Video depth, batched, with a sequence that is broken."""
  names = ["alley_1", "cave_2", "temple_2"]
  data = tmp_path / "data"
  trees.write_sintel(data, names, frames=3, size=(32, 48))
  (data / "training/depth/cave_2/frame_0002.dpt").write_bytes(b"nothing")
  words = ["--task", "video_depth", "--dataset", "sintel", "--data", data]
  words += ["--checkpoint", checkpoint, "--output", tmp_path / "out"]
  words += ["--options", "size=48", f"sequences={','.join(names)}"]
  words = list(map(str, words))
  assert main(words) == 2
  error = capsys.readouterr().err
  assert "cave_2: " in error and "frame_0002.dpt" in error
  assert "--allow_missing" in error
  assert main([*words, "--allow_missing"]) == 0
  found = read(tmp_path / "out")
  assert found["run"]["partial"] and found["metric/abs_rel"] > 0
  assert found["run"]["left_out"][0]["name"] == "cave_2"
  assert "partial: 2 of 3 sequences" in (tmp_path / "out/table.md").read_text()


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--dataset", "kiti", "--task", "relpose"], "no dataset 'kiti'"),
    (["--dataset", "kiti"], "no dataset 'kiti'"),
    (
      ["--dataset", "bonn"],
      "--task is missing: bonn is in monodepth, video_depth",
    ),
    (["--dataset", "synthetic", "--options", "frame=3"], "no option frame"),
    (["--dataset", "synthetic", "--options", "frames"], "NAME=VALUE"),
    (["--dataset", "synthetic", "--options", "frames=x"], "option frames"),
    (["--dataset", "synthetic"], "holds no predictions to score"),
    (["--dataset", "synthetic", "--batch_size", "0"], "batch_size is 0"),
    (["--dataset", "synthetic", "--options", "alignment=lad"], "'lad' is none"),
    (["--dataset", "synthetic", "--overwrite"], "need a checkpoint"),
    (["--dataset", "synthetic", "--no_fusion"], "need a checkpoint"),
    (["--dataset", "synthetic", "--no_rotary"], "need a checkpoint"),
    (
      [
        *("--dataset", "synthetic", "--fusion_divisor", "0"),
        *("--checkpoint", "untrained:small"),
      ],
      "fusion_divisor must be positive",
    ),
    (
      ["--dataset", "synthetic", "--checkpoint", "nowhere"],
      "there is no checkpoint",
    ),
    (["--dataset", "bonn", "--task", "video_depth"], "--data"),
    (
      ["--dataset", "bonn", "--task", "video_depth", "--data", "/nowhere"],
      "/nowhere",
    ),
  ],
)
def test_wrong_flags_are_one_line(tmp_path, capsys, words, message):
  assert main([*words, "--output", str(tmp_path / "out")]) == 2
  error = capsys.readouterr().err
  assert message in error and error.startswith("error: ")
  assert error.count("\n") == 1
  assert not (tmp_path / "out" / "metrics.json").exists()


def test_options_are_listed_without_a_place_for_output(capsys):
  words = ["--task", "monodepth", "--dataset", "sintel"]
  assert main(words) == 2
  assert "--output is missing" in capsys.readouterr().err
  assert main([*words, "--list_options"]) == 0
  options = json.loads(capsys.readouterr().out)
  assert options["max_depth"] == options["post_clip"] == 70
  assert options["alignments"] == ["median"]


@pytest.mark.slow
def test_ctrl_c_keeps_complete_sequences(checkpoint, tmp_path):
  output = tmp_path / "out"
  command = [sys.executable, ROOT / "evaluate.py", "--dataset", "synthetic"]
  command += ["--checkpoint", checkpoint, "--output", output]
  command += ["--batch_size", "2", "--options", *SCENES, "sequences=400"]
  command.remove(SCENES[0])
  process = subprocess.Popen(
    list(map(str, command)), stderr=subprocess.PIPE, text=True, env=os.environ
  )
  deadline = time.monotonic() + 120
  while not list(output.glob("predictions/*/prediction.json")):
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.05)
  process.send_signal(signal.SIGINT)
  _, error = process.communicate(timeout=60)
  assert process.returncode == 130, error
  assert "the same command goes on" in error and "Traceback" not in error
  assert not (output / "metrics.json").exists()
