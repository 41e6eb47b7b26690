"""Checkpoint directories: complete, as written, or a clear error."""

import json
import shutil

import chex
import jax
import numpy as np
import pytest

import point3r_jax as p3r
from point3r_jax.checkpoints import load_config, load_metadata
from point3r_jax.params import prepare_params
from tests import micro


@pytest.fixture
def checkpoint(tmp_path):
  path = tmp_path / "model"
  p3r.save_checkpoint(
    path, micro.CONFIG, micro.params(), metadata={"source": "a test"}
  )
  return path


def test_round_trip(checkpoint):
  config, params = p3r.load_checkpoint(checkpoint)
  assert config == micro.CONFIG
  chex.assert_trees_all_equal(params, micro.params())
  assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(params))
  assert load_metadata(checkpoint) == {"source": "a test"}
  assert sorted(p.name for p in checkpoint.parent.iterdir()) == ["model"]


def test_load_prepares_and_stacks(checkpoint):
  config, params = p3r.load_checkpoint(
    checkpoint, precision="bfloat16", scan_layers=True
  )
  assert config.scan_layers
  expected = prepare_params(micro.scanned_params(), "bfloat16")
  chex.assert_trees_all_equal_shapes_and_dtypes(params, expected)
  assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(params))
  with pytest.raises(p3r.CheckpointError, match="prepared to run"):
    p3r.save_checkpoint(checkpoint.parent / "prepared", config, params)


def test_untrained_presets():
  config, params = p3r.load_checkpoint("untrained:small")
  assert config == p3r.preset("small")
  chex.assert_trees_all_equal(params, p3r.init_params(config))


@pytest.mark.parametrize("name", ["nowhere", "untrained:huge", "."])
@pytest.mark.parametrize("load", [p3r.load_checkpoint, load_config])
def test_unknown_checkpoints(load, name):
  with pytest.raises(p3r.CheckpointError, match=r"preset|not a checkpoint"):
    load(name)


def test_a_config_is_read_without_its_parameters(tmp_path):
  path = tmp_path / "stacked"
  p3r.save_checkpoint(path, micro.SCANNED, micro.scanned_params())
  shutil.rmtree(path / "params")
  assert load_config(path) == micro.CONFIG
  assert load_config("untrained:small") == p3r.preset("small")


def test_existing_directories_are_kept(checkpoint):
  with pytest.raises(p3r.CheckpointError, match="exists"):
    p3r.save_checkpoint(checkpoint, micro.CONFIG, micro.params())
  p3r.save_checkpoint(
    checkpoint, micro.CONFIG, micro.params(seed=1), overwrite=True
  )
  _, params = p3r.load_checkpoint(checkpoint)
  chex.assert_trees_all_equal(params, micro.params(seed=1))


def test_incomplete_parameters_are_refused(tmp_path):
  params = dict(micro.params())
  params["extra"] = params.pop("pose_token")
  params["key_head"] = jax.tree.map(lambda x: x[:1], params["key_head"])
  with pytest.raises(p3r.CheckpointError) as error:
    p3r.save_checkpoint(tmp_path / "model", micro.CONFIG, params)
  for part in ("1 missing: pose_token", "1 unexpected: extra", "key_head"):
    assert part in str(error.value)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("config", "params", "message"),
  [
    (micro.CONFIG, micro.scanned_params, "are stacked.*make that True"),
    (micro.SCANNED, micro.params, "are not stacked.*make that False"),
    (
      micro.SCANNED,
      lambda: prepare_params(micro.params(), "bfloat16"),
      "are not stacked.*make that False",
    ),
  ],
)
def test_the_other_layout_of_layers_is_named(tmp_path, config, params, message):
  with pytest.raises(p3r.CheckpointError, match=message):
    p3r.save_checkpoint(tmp_path / "model", config, params())


def test_parameters_of_another_config_are_refused(checkpoint):
  path = checkpoint / "config.json"
  contents = json.loads(path.read_text())
  contents["model"]["value_depth"] = 2
  path.write_text(json.dumps(contents))
  with pytest.raises(p3r.CheckpointError, match="missing: value_encoder"):
    p3r.load_checkpoint(checkpoint)


@pytest.mark.parametrize("damage", ["config", "fields", "params", "data"])
def test_damage_is_named(checkpoint, damage):
  config = checkpoint / "config.json"
  if damage == "config":
    config.write_text("{")
  elif damage == "fields":
    contents = json.loads(config.read_text())
    contents["model"]["depth"] = 3
    config.write_text(json.dumps(contents))
  elif damage == "params":
    for path in (checkpoint / "params").rglob("*"):
      if path.is_file():
        path.unlink()
  else:
    for path in (checkpoint / "params").rglob("d/*"):
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  with pytest.raises(p3r.CheckpointError, match=r"damaged|cannot be read"):
    p3r.load_checkpoint(checkpoint)


def test_config_survives_json():
  config = micro.CONFIG.replace(rotary_bases=(100.0,))
  text = json.dumps(config.to_dict())
  assert p3r.ModelConfig.from_dict(json.loads(text)) == config


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"encoder_heads": 3}, "does not divide"),
    ({"decoder_depth": 6}, "multiple of 4"),
    ({"decoder_depth": 0}, "multiple of 4"),
    ({"patch_size": 8}, "patch_size must be 16"),
  ],
)
def test_impossible_configs_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    micro.CONFIG.replace(**change)


def test_stored_types_are_kept(tmp_path):
  params = jax.tree.map(lambda x: np.asarray(x, np.float16), micro.params())
  p3r.save_checkpoint(tmp_path / "model", micro.CONFIG, params)
  _, loaded = p3r.load_checkpoint(tmp_path / "model")
  chex.assert_trees_all_equal(loaded, params)
  chex.assert_trees_all_equal_dtypes(loaded, params)
