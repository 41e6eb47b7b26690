"""What a run starts from: the right parameters, in the right layout."""

import chex
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import point3r_jax as p3r
from point3r_jax.params import param_shapes, stack_layers
from point3r_jax.training.initialization import initial_params
from tests import goldens, micro
from tests.convert.test_convert import dust3r


def test_nothing():
  params, lines = initial_params(micro.SCANNED, "", seed=3)
  chex.assert_trees_all_equal(params, p3r.init_params(micro.SCANNED, seed=3))
  assert "seed 3" in lines[0]


def test_checkpoint_of_another_type_layout_and_image_size(tmp_path):
  stored = jax.tree.map(
    lambda x: np.asarray(x, ml_dtypes.bfloat16), micro.params()
  )
  p3r.save_checkpoint(tmp_path / "model", micro.CONFIG, stored)
  model = micro.SCANNED.replace(image_size=224, rotary_bases=(100.0,))
  params, lines = initial_params(model, str(tmp_path / "model"), seed=0)
  expected = jax.tree.map(lambda x: x.astype(np.float32), stored)
  chex.assert_trees_all_equal(params, stack_layers(expected))
  chex.assert_trees_all_equal_dtypes(params, param_shapes(model))
  assert "model" in lines[0]

  other = model.replace(value_depth=2, pose_slots=8)
  with pytest.raises(p3r.CheckpointError) as error:
    initial_params(other, str(tmp_path / "model"), seed=0)
  assert "pose_slots is 4 there and 8 here" in str(error.value)
  assert "value_depth" in str(error.value)
  assert "image_size" not in str(error.value)


@pytest.mark.parametrize("kind", ["point3r", "dust3r"])
def test_weights_of_pytorch(tmp_path, kind):
  state = dict(goldens.seeded_state_dict("small"))
  model, expected = goldens.seeded_params("small")
  if kind == "dust3r":
    state = dust3r(state)
    # What no tensor of such a file tells is as published.
    model = model.replace(pose_slots=256, value_depth=6)
  path = tmp_path / "weights.safetensors"
  save_file({k: x.astype(np.float16) for k, x in state.items()}, path)
  params, lines = initial_params(model, str(path), seed=5)
  chex.assert_trees_all_equal_dtypes(params, param_shapes(model))
  np.testing.assert_array_equal(
    params["image_projection"]["kernel"],
    expected["image_projection"]["kernel"].astype(np.float16),
  )
  assert lines[0] == f"parameters: from the {kind} file {path}"
  if kind == "point3r":
    assert len(lines) == 1
  else:
    fresh = p3r.init_params(model, seed=5)
    np.testing.assert_array_equal(params["pose_token"], fresh["pose_token"])
    assert "pose_token" in lines[1] and "seed 5" in lines[1]
    assert "mask_token" in lines[2]


def test_nowhere():
  with pytest.raises(p3r.CheckpointError, match="there is no nowhere"):
    initial_params(micro.CONFIG, "nowhere", seed=0)
