"""A run's checkpoints: exact, complete, readable, or a clear error."""

import os
import pathlib
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest

import point3r_jax as p3r
from point3r_jax.checkpoints import load_metadata
from point3r_jax.params import merge, param_shapes, stack_layers
from point3r_jax.training.checkpointing import Checkpoints, check_resume
from point3r_jax.training.initialization import initial_params
from point3r_jax.training.optimizer import (
  OptimizerOptions,
  make_optimizer,
)
from point3r_jax.training.sharding import make_mesh
from point3r_jax.training.state import StateMaker
from tests import micro

OPTIONS = {"freeze": ("frozen",), "ema_decay": 0.9, "accumulate": 2}
FINGERPRINT = {
  "datasets": [{"name": "rooms", "length": 9, "samples": 4}],
  "image_sizes": [[384, 512]],
  "views": [5, 5],
  "batch_size": 2,
  "epochs": 3,
  "seed": 0,
}
META = {"data": FINGERPRINT}


def tiny_params(width=256):
  """Parameters of which one is large enough to be split over devices."""
  return {
    "dense": {
      "kernel": np.zeros((512, width), np.float32),
      "bias": np.zeros((width,), np.float32),
    },
    "frozen": {"kernel": np.zeros((3, 4), np.float32)},
  }


def make_state(params, step, mesh=None, **options):
  """Returns what makes states, and a state of random numbers."""
  options = OptimizerOptions(**options)
  maker = StateMaker(
    make_optimizer(options, 10),
    options,
    mesh or make_mesh(1, 1, jax.devices()[:1]),
  )
  rng = np.random.default_rng(step)
  state = jax.tree.map(
    lambda x: jax.device_put(
      rng.integers(-99, 99, x.shape).astype(x.dtype), x.sharding
    ),
    maker.init(params),
  )
  step = jax.device_put(np.int32(step), state.step.sharding)
  return maker, state.replace(step=step)


def steps(workdir):
  return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def test_round_trip(tmp_path):
  maker, state = make_state(tiny_params(), 7, **OPTIONS)
  abstract = maker.abstract(tiny_params())
  expected = jax.tree.map(np.array, state)
  with Checkpoints(tmp_path, micro.CONFIG, metadata={"who": "me"}) as run:
    assert run.restore(abstract) is None and run.latest_step is None
    assert run.save(state, META)
    # The next step overwrites the state while it is being written.
    state = jax.jit(
      lambda x: jax.tree.map(lambda y: y + 1, x), donate_argnums=0
    )(state)
    assert not run.save(state.replace(step=state.step - 1), META)
    assert not run.reached_preemption(8)
  with Checkpoints(tmp_path, micro.CONFIG, metadata={"who": "you"}) as run:
    assert run.latest_step == 7
    restored, meta = run.restore(abstract)
  chex.assert_trees_all_equal(restored, expected)
  chex.assert_trees_all_equal_dtypes(restored, expected)
  assert meta["data"] == FINGERPRINT and meta["step"] == 7
  assert meta["processes"] == 1 and meta["mesh"] == {"data": 1, "fsdp": 1}
  assert load_metadata(tmp_path) == {"who": "me", "training": meta}


def restore_on_other_meshes(workdir):
  """Saves from and restores to eight devices, split in several ways."""
  assert jax.device_count() == 8
  params = tiny_params()
  states = [
    make_state(params, 1, make_mesh(1, 8), ema_decay=0.9),
    make_state(params, 2, make_mesh(1, 1, jax.devices()[:1]), ema_decay=0.9),
  ]
  with Checkpoints(workdir, micro.CONFIG) as run:
    for _, state in states:
      run.save(state, META)
      for maker, shards in ((states[0][0], 8), (states[1][0], 1)):
        restored, _ = run.restore(maker.abstract(params))
        chex.assert_trees_all_equal(restored, state)
        kernel = restored.opt_state[1][0].mu["dense"]["kernel"]
        assert len(kernel.sharding.device_set) == shards
        assert kernel.addressable_shards[0].data.shape == (512 // shards, 256)
    maker, _ = make_state(params, 3, make_mesh(2, 4), ema_decay=0.9)
    restored, _ = run.restore(maker.abstract(params))
    chex.assert_trees_all_equal(restored, states[-1][1])


def test_other_meshes(tmp_path):
  code = (
    "import sys; from tests.training import test_checkpointing as test; "
    "test.restore_on_other_meshes(sys.argv[1])"
  )
  flags = "--xla_force_host_platform_device_count=8"
  subprocess.run(
    [sys.executable, "-c", code, str(tmp_path)],
    cwd=pathlib.Path(__file__).parents[2],
    env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    check=True,
  )


def test_evaluation_reads_parameters_alone(tmp_path):
  """Of a run with scanned layers, most of them frozen."""
  model = micro.SCANNED
  params = stack_layers(jax.tree.map(np.asarray, micro.params()))
  freeze = ("encoder", "value", "decoder", "image", "camera", "world", "pose_")
  _, state = make_state(params, 3, freeze=freeze, ema_decay=0.9)
  with Checkpoints(tmp_path, model) as run:
    run.save(state, META)
  step = tmp_path / "checkpoints" / "3"

  started, lines = initial_params(model, str(tmp_path), seed=0)
  chex.assert_trees_all_equal(started, state.params)
  assert str(tmp_path) in lines[0]
  config, loaded = p3r.load_checkpoint(step, ema=True)
  assert config == micro.CONFIG
  chex.assert_trees_all_equal_shapes(loaded, param_shapes(config))
  chex.assert_trees_all_equal(
    stack_layers(loaded), merge(state.params, state.ema)
  )
  assert load_metadata(step)["training"]["step"] == 3

  with pytest.raises(p3r.CheckpointError, match="just a model"):
    p3r.save_checkpoint(tmp_path, model, params, overwrite=True)


@pytest.fixture
def workdir(tmp_path):
  """A run that stopped while it wrote its second checkpoint."""
  _, state = make_state(tiny_params(), 1, **OPTIONS)
  with Checkpoints(tmp_path, micro.CONFIG) as run:
    run.save(state, META)
  run = Checkpoints(tmp_path, micro.CONFIG)
  run.save(state.replace(step=state.step + 1), {"data": object()})
  with pytest.raises(TypeError, match="JSON"):
    run.wait()
  return tmp_path


def test_what_is_half_written_is_ignored_and_removed(workdir):
  assert len(steps(workdir)) == 2
  assert load_metadata(workdir)["training"]["step"] == 1
  maker, _ = make_state(tiny_params(), 1, **OPTIONS)
  with Checkpoints(workdir, micro.CONFIG) as run:
    restored, meta = run.restore(maker.abstract(tiny_params()))
    assert meta["step"] == restored.step == 1
    assert run.save(restored.replace(step=restored.step + 1), META)
  assert steps(workdir) == ["1", "2"]


@pytest.mark.parametrize(
  ("options", "width", "message"),
  [
    ({"ema_decay": 0.0}, 256, "with a moving average.*this run is without"),
    ({"freeze": ()}, 256, "1/state.*missing, such as opt_state.*frozen/kernel"),
    ({"accumulate": 1}, 256, "unexpected, such as .*what it accumulates"),
    (
      {},
      128,
      r"1/params.*dense/kernel \(float32\[512, 256\], not .* The model",
    ),
  ],
)
def test_other_states_are_refused(workdir, options, width, message):
  params = tiny_params(width)
  maker, _ = make_state(params, 1, **OPTIONS | options)
  with (
    Checkpoints(workdir, micro.CONFIG) as run,
    pytest.raises(p3r.CheckpointError, match=f"{message}.*init_from"),
  ):
    run.restore(maker.abstract(params))


# Orbax by itself leaves some behind.
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_damage_is_named(workdir):
  maker, _ = make_state(tiny_params(), 1, **OPTIONS)
  for path in (workdir / "checkpoints" / "1" / "state").rglob("d/*"):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  with (
    Checkpoints(workdir, micro.CONFIG) as run,
    pytest.raises(p3r.CheckpointError, match=r"1/state cannot be read"),
  ):
    run.restore(maker.abstract(tiny_params()))


def test_directories_of_others_are_refused(workdir):
  other = micro.CONFIG.replace(decoder_depth=8, scan_layers=True)
  with pytest.raises(
    p3r.CheckpointError,
    match="decoder_depth is 4 there and 8 here, scan_layers is False",
  ):
    Checkpoints(workdir, other)
  (workdir / "model" / "params").mkdir(parents=True)
  with pytest.raises(p3r.CheckpointError, match="not of a training run"):
    Checkpoints(workdir / "model", micro.CONFIG)
  Checkpoints(workdir / "new", micro.CONFIG).close()
  with pytest.raises(p3r.CheckpointError, match="has not written"):
    p3r.load_checkpoint(workdir / "new")


def test_moving_average_must_be_there(tmp_path):
  _, state = make_state(tiny_params(), 1)
  with Checkpoints(tmp_path, micro.CONFIG) as run:
    run.save(state, META)
  for checkpoint in (tmp_path, "untrained:small"):
    with pytest.raises(p3r.CheckpointError, match="has no moving average"):
      p3r.load_checkpoint(checkpoint, ema=True)


def test_what_is_kept(tmp_path):
  _, state = make_state(tiny_params(), 0)
  with Checkpoints(tmp_path, micro.CONFIG, keep_last=2, keep_every=3) as run:
    for step in range(1, 7):
      run.save(state.replace(step=state.step + step), META)
    run.wait()
    assert run.steps == [3, 5, 6]
  assert steps(tmp_path) == ["3", "5", "6"]


def test_resuming_needs_the_same_data():
  more = FINGERPRINT | {"epochs": 9, "views": (5, 5)}
  check_resume(FINGERPRINT, more)
  dataset = FINGERPRINT["datasets"][0] | {"samples": 8}
  other = more | {"datasets": [dataset], "batch_size": 4, "views": [5]}
  with pytest.raises(p3r.CheckpointError) as error:
    check_resume(FINGERPRINT, other)
  for difference in (
    "batch_size was 2 and is 4",
    "datasets[0].samples was 4 and is 8",
    "views was [5, 5] and is [5]",
    "init_from",
  ):
    assert difference in str(error.value)
  assert "epochs" not in str(error.value) and "length" not in str(error.value)
