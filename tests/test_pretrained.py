"""Checkpoints in the package: made of runs, loaded by name, or an error."""

import csv
import fnmatch
import json
import pathlib
import shutil
import tomllib

import chex
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import point3r_jax as p3r
from point3r_jax import pretrained
from point3r_jax.checkpoints import load_metadata, load_params_to_host
from point3r_jax.cli import convert, embed
from point3r_jax.params import merge, stack_layers
from point3r_jax.training.checkpointing import Checkpoints
from point3r_jax.training.initialization import initial_params
from point3r_jax.training.logs import MetricLog
from tests import micro
from tests.training.test_checkpointing import make_state

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = {"image_sizes": [[96, 128]], "init_from": ""}
LAST = 500


def host(params, seed=None):
  """Returns NumPy arrays; with a seed, slightly other ones."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: np.float32(x) + (seed is not None) * np.float32(rng.random()),
    params,
  )


def rounded(params):
  return jax.tree.map(
    lambda x: np.float32(np.asarray(x).astype(ml_dtypes.bfloat16)), params
  )


def log(workdir, steps, **values):
  with MetricLog(workdir, start_step=0) as rows:
    for step in steps:
      rows.write(step, {"loss": 100 / step, "lr": 1e-3, **values})


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
  """Two runs: of one is left what it noted down, the other is complete."""
  folder = tmp_path_factory.mktemp("runs")
  pairs, long = folder / "pairs", folder / "long"
  Checkpoints(pairs, micro.SCANNED, metadata={"config": CONFIG}).close()
  shutil.rmtree(pairs / "checkpoints")
  log(pairs, [20, 40], overflow=np.nan)
  stacked = stack_layers(host(micro.params()))
  _, state = make_state({"x": np.zeros(1, np.float32)}, LAST)
  # The moving average is of what is trained alone.
  ema = {"key_head": host(stacked["key_head"], seed=3)}
  state = state.replace(params=stacked, ema=ema)
  with Checkpoints(long, micro.SCANNED, metadata={"config": CONFIG}) as run:
    run.save(state, {"config": CONFIG | {"init_from": "pairs"}})
  log(long, range(1, LAST + 10), frames_per_s=7.0)
  return [str(pairs), str(long)]


@pytest.fixture
def package(tmp_path, monkeypatch):
  """A package without checkpoints."""
  monkeypatch.setattr(pretrained, "FOLDER", tmp_path / "package")
  return tmp_path / "package"


def make(stages, output, *flags):
  return embed.main(["--stages", *stages, "--output", str(output), *flags])


@pytest.fixture
def tiny(stages, package):
  assert make(stages, package / "tiny") == 0
  return package / "tiny"


def test_round_trip(tiny, capsys):
  assert pretrained.names() == ["tiny"]
  config, params = load_params_to_host("tiny")
  assert config == micro.CONFIG
  chex.assert_trees_all_equal(params, rounded(micro.params()))
  assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}
  stored = load_file(tiny / "params.safetensors")
  assert {x.dtype for x in stored.values()} == {np.dtype(ml_dtypes.bfloat16)}
  assert "encoder/block_0/mlp/hidden/kernel" in stored

  config, params = p3r.load_checkpoint("tiny", precision="bfloat16")
  kernel = params["encoder"]["block_0"]["mlp"]["output"]["kernel"]
  np.testing.assert_array_equal(
    kernel, stored["encoder/block_0/mlp/output/kernel"]
  )
  with pytest.raises(p3r.CheckpointError, match="no moving average"):
    p3r.load_checkpoint("tiny", ema=True)


def test_what_is_kept_beside_the_parameters(tiny):
  metadata = load_metadata("tiny")
  assert "synthetic scenes at 128x96" in metadata["notice"]
  assert metadata["stages"] == ["pairs", "long"] and metadata["ema"] is False
  first, last = json.loads((tiny / "training.json").read_text())
  assert first == {"name": "pairs", "config": CONFIG}
  assert last["name"] == "long" and last["step"] == LAST
  assert last["config"]["init_from"] == "pairs" and "jax" in last["versions"]
  rows = list(csv.DictReader((tiny / "curve.csv").read_text().splitlines()))
  assert [row["stage"] for row in rows] == ["1"] * 2 + ["2"] * 100
  assert [rows[i]["step"] for i in (0, 1, 2, -1)] == ["20", "40", "1", "500"]
  assert rows[0]["loss"] == "5" and rows[0]["lr"] == "0.001"
  assert rows[0]["overflow"] == "nan" and rows[0]["loss_pose"] == ""
  assert not (tiny / "metrics.json").exists()


def test_the_same_runs_make_the_same_files(tiny, stages, tmp_path):
  metrics = tmp_path / "metrics.json"
  metrics.write_text('{"abs_rel": 0.1, "run": {"checkpoint_sha256": "ab"}}')
  before = {path.name: path.read_bytes() for path in tiny.iterdir()}
  assert make(stages, tiny, "--metrics", str(metrics)) == 0
  after = {path.name: path.read_bytes() for path in tiny.iterdir()}
  assert json.loads(after.pop("metrics.json"))["abs_rel"] == 0.1
  assert after == before
  # Metrics are of the weights they were made with, and of no others.
  assert make(stages, tiny, "--ema") == 0
  assert not (tiny / "metrics.json").exists()


def test_moving_average(stages, package):
  assert make(stages, package / "mean", "--ema") == 0
  _, params = load_params_to_host("mean")
  mean = {"key_head": host(micro.params()["key_head"], seed=3)}
  chex.assert_trees_all_equal(params, rounded(merge(micro.params(), mean)))
  assert load_metadata("mean")["ema"] is True


def test_a_name_is_of_the_package_and_a_path_is_not(tiny, monkeypatch):
  (tiny.parent / "here").mkdir()
  monkeypatch.chdir(tiny.parent / "here")
  p3r.save_checkpoint("tiny", micro.CONFIG, micro.params(seed=2))
  _, named = p3r.load_checkpoint("tiny")
  chex.assert_trees_all_equal(named, rounded(micro.params()))
  for path in ("./tiny", pathlib.Path("tiny")):
    _, params = p3r.load_checkpoint(path)
    chex.assert_trees_all_equal(params, micro.params(seed=2))
  # A folder like those of the package can be anywhere.
  shutil.copytree(tiny, "copy")
  _, params = p3r.load_checkpoint("copy")
  chex.assert_trees_all_equal(params, named)


def test_unknown_names_are_told_the_known_ones(tiny):
  with pytest.raises(p3r.CheckpointError, match=r"of the package \(tiny\)"):
    p3r.load_checkpoint("huge")
  with pytest.raises(p3r.CheckpointError, match=r"of the package \(tiny\)"):
    initial_params(micro.CONFIG, "huge", seed=0)


def test_a_package_without_any(package):
  with pytest.raises(p3r.CheckpointError, match="it has none"):
    p3r.load_checkpoint("tiny")


def test_training_starts_from_a_name(tiny):
  params, lines = initial_params(micro.SCANNED, "tiny", seed=0)
  chex.assert_trees_all_equal(params, stack_layers(rounded(micro.params())))
  assert lines == ["parameters: from the checkpoint tiny"]


def test_published_names_of_a_name(tiny, tmp_path):
  output = tmp_path / "torch.safetensors"
  flags = ["--to_torch", "--input", "tiny", "--output", str(output)]
  assert convert.main(flags) == 0
  assert {x.dtype for x in load_file(output).values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("damage", ["cut", "gone", "empty", "other"])
def test_damage_is_named(tiny, damage):
  path = tiny / "params.safetensors"
  data = path.read_bytes()
  if damage == "gone":
    path.unlink()
  elif damage == "other":
    params = dict(micro.params())
    params.pop("key_head")
    path.write_bytes(pretrained.pack_params(params))
  else:
    path.write_bytes(data[: len(data) // 2 if damage == "cut" else 0])
  message = "missing: key_head" if damage == "other" else "cannot be read"
  with pytest.raises(p3r.CheckpointError, match=message):
    p3r.load_checkpoint("tiny")


def refused(capsys, stages, output, *flags):
  assert make(stages, output, *flags) == 2
  return capsys.readouterr().err


def test_what_is_too_large_is_refused(stages, package, monkeypatch, capsys):
  monkeypatch.setattr(embed, "_MOST_BYTES", 100_000)
  error = refused(capsys, stages, package / "tiny")
  assert "may take 0 MB" in error and not package.exists()


def test_what_is_not_finite_is_refused():
  params = micro.params() | {"pose_token": np.full((1, 1), 3.4e38, np.float32)}
  with pytest.raises(p3r.CheckpointError, match="finite in bfloat16: pose_tok"):
    pretrained.pack_params(params)


def test_what_is_missing_is_named(stages, package, tmp_path, capsys):
  output = package / "tiny"
  p3r.save_checkpoint(tmp_path / "model", micro.CONFIG, micro.params())
  copy = shutil.copytree(stages[0], tmp_path / "copy")
  (copy / "metrics.jsonl").write_text('{"loss": 1}\n')
  no_metrics = ["--metrics", str(tmp_path / "metrics.json")]
  for runs, flags, message in (
    ([str(tmp_path / "model")], [], "not of a training run"),
    ([str(tmp_path / "nothing")], [], "no checkpoint"),
    ([str(copy), stages[1]], [], "metrics.jsonl cannot be read"),
    (stages[:1], [], "params cannot be read"),
    (stages, no_metrics, "not a metrics.json"),
  ):
    assert message in refused(capsys, runs, output, *flags)
  (copy / "metrics.jsonl").unlink()
  assert "metrics.jsonl" in refused(capsys, [str(copy)], output)
  assert not package.exists()
  # Nothing of anybody else is removed.
  assert "other files (checkpoints, " in refused(capsys, stages, stages[1])


def test_installations_hold_the_files():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())
  data = project["tool"]["setuptools"]["package-data"]
  patterns = data["point3r_jax.pretrained"]
  for name in embed._FILES:
    assert any(fnmatch.fnmatch(f"tiny/{name}", p) for p in patterns)
