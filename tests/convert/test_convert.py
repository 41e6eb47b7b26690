"""Conversion from end to end: files of all kinds in, the same weights out."""

import argparse
import json
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import point3r_jax as p3r
from point3r_jax.checkpoints import load_config, load_metadata
from point3r_jax.cli.convert import main
from point3r_jax.convert.names import config_from_shapes, weight_table
from tests import goldens
from tests.convert.torch_zip import LazyArray, fake_class, write_torch_zip


@pytest.fixture(scope="module")
def state():
  """The small model's seeded state dict."""
  return dict(goldens.seeded_state_dict("small"))


def convert(source, output, *flags):
  return main(["--input", str(source), "--output", str(output), *flags])


def flat(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def assert_same(params, expected, dtype=np.float32):
  params, expected = flat(params), flat(expected)
  assert params.keys() == expected.keys()
  for name, value in params.items():
    assert value.dtype == dtype
    np.testing.assert_array_equal(value, expected[name].astype(dtype))


def test_table_lists_every_tensor_of_both_sizes():
  for size, preset in (("small", "small"), ("full", "point3r_512")):
    shapes = goldens.manifest(size)
    config = config_from_shapes(shapes)
    expected = p3r.preset(preset)
    assert config == expected.replace(image_size=config.image_size)
    table = weight_table(config)
    names = {w.name for w in table} | {w.alias for w in table if w.alias}
    assert names == set(shapes)
    assert len({w.path for w in table}) == len(table)


@pytest.mark.parametrize("wrapped", [False, True])
def test_authors_checkpoint(tmp_path, state, wrapped):
  """A torch zip file with an arbitrary `args` object, as released."""
  args = fake_class("omegaconf.dictconfig.DictConfig")()
  args.__dict__ = {"model": "Point3R(...)", "nested": {"lr": 1e-5}}
  prefix = "module." if wrapped else ""
  payload = {
    "args": args,
    "model": {prefix + name: tensor for name, tensor in state.items()},
    "epoch": 9,
    "best_so_far": 0.5,
  }
  write_torch_zip(tmp_path / "point3r.pth", payload)
  assert convert(tmp_path / "point3r.pth", tmp_path / "out") == 0
  config, params = p3r.load_checkpoint(tmp_path / "out")
  expected_config, expected = goldens.seeded_params("small")
  assert config == expected_config
  assert_same(params, expected)
  metadata = load_metadata(tmp_path / "out")
  assert metadata["source"] == "point3r.pth" and metadata["kind"] == "point3r"


def test_a_file_that_torch_wrote(tmp_path, state):
  torch = pytest.importorskip("torch")
  payload = {
    "args": argparse.Namespace(model="Point3R(...)"),
    "model": {name: torch.from_numpy(x) for name, x in state.items()},
    "epoch": 9,
  }
  torch.save(payload, tmp_path / "point3r.pth")
  assert convert(tmp_path / "point3r.pth", tmp_path / "out") == 0
  assert_same(
    p3r.load_checkpoint(tmp_path / "out")[1], goldens.seeded_params("small")[1]
  )


def test_training_checkpoint(tmp_path, state):
  """Optimiser and scaler lie beside the model and are left alone."""
  payload = {
    "model": state,
    "optimizer": {
      "state": {0: {"step": np.array([3.0], np.float32)}},
      "param_groups": [{"lr": 1e-4, "params": [0]}],
    },
    "scaler": {"scale": 65536.0},
    "args": argparse.Namespace(output_dir="here"),
    "epoch": 1,
  }
  write_torch_zip(tmp_path / "last.pth", payload)
  assert convert(tmp_path / "last.pth", tmp_path / "out") == 0
  assert_same(
    p3r.load_checkpoint(tmp_path / "out")[1], goldens.seeded_params("small")[1]
  )


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_there_and_back_is_bit_exact(tmp_path, state, dtype, kind):
  state = {name: tensor.astype(dtype) for name, tensor in state.items()}
  if kind == "torch":
    write_torch_zip(tmp_path / "in", {"model": state})
  else:
    save_file(state, tmp_path / "in")
  assert convert(tmp_path / "in", tmp_path / "out") == 0
  back = tmp_path / "back.safetensors"
  assert convert(tmp_path / "out", back, "--to_torch") == 0
  ordinary = tmp_path / "ordinary"
  ordinary.touch()
  assert back.stat().st_mode == ordinary.stat().st_mode
  result = load_file(back)
  assert result.keys() == state.keys()
  for name, tensor in state.items():
    assert result[name].dtype == tensor.dtype
    assert result[name].tobytes() == tensor.tobytes(), name


@pytest.mark.slow
def test_there_and_back_keeps_what_shapes_do_not_tell(tmp_path, capsys):
  """How many heads a layer has, and for which images a model is."""
  config, params = p3r.load_checkpoint("tiny")
  config = config.replace(rotary_bases=(10.0, 100.0))
  p3r.save_checkpoint(tmp_path / "in", config, params)
  exported = tmp_path / "exported.safetensors"
  assert convert(tmp_path / "in", exported, "--to_torch") == 0
  assert convert(exported, tmp_path / "out") == 0
  back, again = p3r.load_checkpoint(tmp_path / "out")
  assert back == config
  assert_same(again, params)

  flags = ["--image_size", "96"]
  assert convert(exported, tmp_path / "small", *flags) == 0
  assert load_config(tmp_path / "small") == config.replace(image_size=96)
  capsys.readouterr()
  assert convert(exported, tmp_path / "odd", "--image_size", "100") == 2
  assert "100 is not a multiple of 16" in capsys.readouterr().err


def test_without_metadata_images_are_as_published(tmp_path, state):
  save_file(state, tmp_path / "in.safetensors")
  for flags, size in ([], 512), (["--image_size", "224"], 224):
    out = tmp_path / str(size)
    assert convert(tmp_path / "in.safetensors", out, *flags) == 0
    assert load_config(out).image_size == size


@pytest.mark.parametrize(
  ("said", "message"),
  [
    ("{", "metadata"),
    ("3", "metadata"),
    ("[]", "of an unexpected shape: "),
    ('{"heads": 3}', "unknown model config fields: ['heads']"),
    ("{}", "of an unexpected shape: "),
  ],
)
def test_metadata_that_do_not_fit_are_refused(
  tmp_path, state, capsys, said, message
):
  metadata = {"point3r_jax.config": said}
  save_file(state, tmp_path / "in.safetensors", metadata)
  assert convert(tmp_path / "in.safetensors", tmp_path / "out") == 2
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1


def test_dtype(tmp_path, state):
  save_file(state, tmp_path / "in.safetensors")
  convert(tmp_path / "in.safetensors", tmp_path / "out", "--dtype", "bfloat16")
  _, params = p3r.load_checkpoint(tmp_path / "out")
  expected = goldens.seeded_params("small")[1]
  assert_same(params, expected, ml_dtypes.bfloat16)


def dust3r(state):
  """Renames the small model's shared parts as DUSt3R has them."""
  result = {"mask_token": np.zeros((1, 1, 192), np.float32)}
  for name, tensor in state.items():
    for old, new in (
      ("dec_blocks_memory.", "dec_blocks2."),
      ("downstream_head.dpt_self.", "downstream_head1.dpt."),
      ("downstream_head.dpt_cross.", "downstream_head2.dpt."),
    ):
      if name.startswith(old):
        result[new + name.removeprefix(old)] = tensor
    if name.startswith(
      ("patch_embed", "enc_", "dec_blocks.", "decoder_embed.", "dec_norm.")
    ):
      result[name] = tensor
  return result


def test_from_dust3r(tmp_path, state):
  write_torch_zip(tmp_path / "dust3r.pth", {"model": dust3r(state)})
  assert convert(tmp_path / "dust3r.pth", tmp_path / "out") == 0
  config, params = p3r.load_checkpoint(tmp_path / "out")
  assert config.pose_slots == 256 and config.value_depth == 6
  seeded = goldens.seeded_params("small")[1]
  params, seeded = flat(params), flat(seeded)
  fresh = flat(p3r.init_params(config))
  parts = {"taken": 0, "fresh": 0}
  for name, value in params.items():
    if "value_encoder']['patch_embed" in name:
      expected = seeded[name.replace("value_encoder", "encoder")]
    elif name.startswith(
      (
        "['pose_",
        "['pointer_projection",
        "['value_",
        "['key_head",
        "['world_head']['block",
        "['decoder']['pointer_norm",
      )
    ):
      expected = fresh[name]
      parts["fresh"] += 1
    else:
      expected = seeded[name]
      parts["taken"] += 1
    np.testing.assert_array_equal(value, expected, err_msg=name)
  assert min(parts.values()) > 50
  metadata = load_metadata(tmp_path / "out")
  assert metadata["kind"] == "dust3r" and metadata["ignored"] == ["mask_token"]
  assert "pose_token" in metadata["initialised"]


def test_pointer_blocks_start_as_copies_where_there_are_none(tmp_path, state):
  blocks = {
    name: tensor
    for name, tensor in dust3r(state).items()
    if not name.startswith("dec_blocks2.")
  }
  write_torch_zip(tmp_path / "croco.pth", {"model": blocks})
  assert convert(tmp_path / "croco.pth", tmp_path / "out") == 0
  _, params = p3r.load_checkpoint(tmp_path / "out")
  np.testing.assert_array_equal(
    params["decoder"]["layer_2"]["pointer_block"]["mlp"]["hidden"]["kernel"],
    params["decoder"]["layer_2"]["image_block"]["mlp"]["hidden"]["kernel"],
  )


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda s: s.pop("dec_norm.bias"), "1 missing: dec_norm.bias"),
    (lambda s: s.update(extra=s["pose_token"]), "1 unknown: extra"),
    (
      lambda s: s.update({"enc_norm.bias": s["dec_norm.bias"]}),
      "1 of an unexpected shape: enc_norm.bias (192,)",
    ),
    (
      lambda s: s.update({"pose_token": s["pose_token"][0]}),
      "pose_token (1, 192)",
    ),
    (
      lambda s: s.update({"enc_norm.bias": s["enc_norm.bias"].astype(np.int8)}),
      "1 not floating-point numbers: enc_norm.bias int8",
    ),
    (lambda s: s.pop("patch_embed.proj.weight"), "is not a Point3R or DUSt3R"),
    (
      lambda s: s.update(
        {
          "downstream_head.dpt_self.scratch.layer_rn.0.weight": 2
          * s["downstream_head.dpt_self.scratch.layer_rn.0.weight"]
        }
      ),
      "two names, but differ",
    ),
  ],
)
def test_incomplete_weights_are_refused(
  tmp_path, state, capsys, change, message
):
  state = dict(state)
  change(state)
  save_file(state, tmp_path / "in.safetensors")
  assert convert(tmp_path / "in.safetensors", tmp_path / "out") == 2
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1
  assert not (tmp_path / "out").exists()


def test_one_name_of_a_twin_is_enough(tmp_path, state):
  state = {k: v for k, v in state.items() if "scratch.layer_rn" not in k}
  save_file(state, tmp_path / "in.safetensors")
  assert convert(tmp_path / "in.safetensors", tmp_path / "out") == 0


def test_existing_output_is_kept_unless_asked(tmp_path, state, capsys):
  save_file(state, tmp_path / "in.safetensors")
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "precious").write_text("")
  assert convert(tmp_path / "in.safetensors", tmp_path / "out") == 2
  assert "exists" in capsys.readouterr().err
  flags = ["--overwrite"]
  assert convert(tmp_path / "in.safetensors", tmp_path / "out", *flags) == 2
  assert "not a checkpoint" in capsys.readouterr().err
  assert (tmp_path / "out" / "precious").exists()
  assert convert(tmp_path / "in.safetensors", tmp_path / "new") == 0
  assert convert(tmp_path / "in.safetensors", tmp_path / "new", *flags) == 0


def test_two_tensors_of_one_name_are_refused(tmp_path, state, capsys):
  """A DUSt3R file that holds parts under their new names, too."""
  both = dust3r(state)
  name = "dec_blocks_memory.0.norm1.bias"
  save_file(both | {name: state[name]}, tmp_path / "in.safetensors")
  assert convert(tmp_path / "in.safetensors", tmp_path / "out") == 2
  assert f"would both be {name}" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("source", "output", "flags", "message"),
  [
    ("tiny", "out.pth", [], "must be named as a .safetensors file"),
    ("tiny", "out.safetensors", ["--image_size", "224"], "--image_size and"),
    ("tiny", "out.safetensors", ["--seed", "0"], "--image_size and --seed"),
    ("untrained:tiny", "out.safetensors", [], "stands for random weights"),
    (__file__, "out.safetensors", [], "make a checkpoint of weights with"),
  ],
)
def test_what_cannot_be_converted_back(
  tmp_path, capsys, source, output, flags, message
):
  assert convert(source, tmp_path / output, "--to_torch", *flags) == 2
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [[], ["--to_torch"]])
def test_missing_input(tmp_path, capsys, flags):
  output = tmp_path / "out.safetensors"
  assert convert(tmp_path / "none", output, *flags) == 2
  assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.slow
def test_full_size_there_and_back_in_8_gigabytes(tmp_path):
  """Each way in a process of its own, whose peak memory is read."""
  state = {
    name: LazyArray(
      shape,
      np.float32,
      lambda name=name, shape=shape: goldens.seeded_tensor(name, shape),
    )
    for name, shape in goldens.manifest("full").items()
  }
  write_torch_zip(tmp_path / "full.pth", {"model": state})
  program = (
    "import json, resource, sys\n"
    "from point3r_jax.cli.convert import main\n"
    "code = main(sys.argv[1:])\n"
    "usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
    "print(json.dumps([code, usage / 2**20]))\n"
  )

  def run(*flags):
    command = [sys.executable, "-c", program, *map(str, flags)]
    output = subprocess.run(
      command, check=True, capture_output=True, text=True
    ).stdout
    code, gigabytes = json.loads(output.splitlines()[-1])
    print(f"{flags[-1]}: peak {gigabytes:.2f} GiB")
    assert code == 0 and gigabytes < 8 / 1.024**3
    return output

  checkpoint, back = tmp_path / "out", tmp_path / "back.safetensors"
  run("--input", tmp_path / "full.pth", "--output", checkpoint)
  run("--input", checkpoint, "--output", back, "--to_torch")
  config, _ = p3r.load_checkpoint(checkpoint)
  assert config == p3r.preset("point3r_512")
  result = load_file(back)
  assert result.keys() == state.keys()
  for name, tensor in state.items():
    assert result[name].tobytes() == tensor.make().tobytes(), name
