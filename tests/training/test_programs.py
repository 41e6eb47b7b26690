"""Training steps that another process lowered."""

import chex
import jax
import numpy as np
import pytest

from point3r_jax.config import PRESETS
from point3r_jax.params import stack_layers
from point3r_jax.training import programs, sharding, step
from point3r_jax.training.experiment import open_experiment
from point3r_jax.training.programs import Programs
from point3r_jax.training.sharding import batch_sharding
from tests import micro
from tests.training import batches, micro_run

SHAPE = (2, *micro.IMAGE_SIZE)


@pytest.fixture(autouse=True)
def quick_steps(monkeypatch):
  """Steps of the micro model that compile at once."""
  monkeypatch.setitem(PRESETS, "micro", micro.CONFIG)
  monkeypatch.setattr(sharding, "_MIN_SIZE", 64)
  monkeypatch.setattr(step, "sequence_loss", batches.short_loss)


def run(devices=1, lr=1e-3):
  """Takes three steps in a program of its own; returns state and metrics."""
  config = micro_run.get_config()
  config.optimizer.lr = lr
  config.mesh.fsdp = devices
  experiment = open_experiment(config, jax.devices()[:devices])
  state = experiment.maker.init(
    jax.tree.map(np.asarray, stack_layers(micro.params()))
  )
  head = jax.tree.leaves(state.params["pose_head"])
  assert any(not x.is_fully_replicated for x in head) == (devices > 1)
  batch = jax.device_put(
    batches.batch(config.batch_size, config.views),
    batch_sharding(experiment.mesh),
  )
  with Programs(experiment, [SHAPE]) as steps:
    for _ in range(3):
      state, metrics = steps.step(state, batch)
  return jax.device_get((state, metrics))


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_a_step_is_lowered_once(folder, monkeypatch, devices):
  jax.config.update("jax_enable_compilation_cache", False)
  expected = run(devices)
  assert not list(folder.glob("*"))
  jax.config.update("jax_enable_compilation_cache", True)
  written = run(devices)

  def unexpected(*_):
    raise AssertionError("traced again")

  monkeypatch.setattr(programs, "train_step", unexpected)
  read = run(devices)
  assert len(list(folder.glob("point3r-*.lowered"))) == 1
  chex.assert_trees_all_equal(written, expected)
  chex.assert_trees_all_equal(read, expected)
  with pytest.raises(AssertionError, match="traced again"):
    run(devices, lr=2e-3)


def test_what_several_processes_run_is_not_kept(folder, monkeypatch):
  monkeypatch.setattr(programs.jax, "process_count", lambda: 2)
  experiment = open_experiment(micro_run.get_config(), jax.devices()[:2])
  programs.lower_step(experiment, SHAPE, keep=True)
  assert not list(folder.glob("point3r-*.lowered"))


def test_metrics_stay_where_they_are_and_copies_are_kept():
  """Otherwise each step would need a new CUDA graph."""
  experiment = open_experiment(micro_run.get_config(), jax.devices()[:1])
  state = experiment.maker.init(
    jax.tree.map(np.asarray, stack_layers(micro.params()))
  )
  batch = jax.device_put(
    batches.batch(experiment.config.batch_size, experiment.config.views),
    batch_sharding(experiment.mesh),
  )
  places, kept = [], []
  with Programs(experiment, [SHAPE]) as steps:
    for _ in range(3):
      state, metrics = steps.step(state, batch)
      kept.append(metrics)
      last = jax.tree.leaves(steps._metrics._last)
      places.append([x.unsafe_buffer_pointer() for x in last])
  assert places[0] == places[1] == places[2]
  losses = [float(metrics["loss"]) for metrics in kept]
  assert losses[0] != losses[2]
  chex.assert_trees_all_equal(metrics, steps._metrics._last)
