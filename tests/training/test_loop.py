"""Whole runs: killed, resumed, on several processes, and stopped by NaN."""

import concurrent.futures
import json
import logging
import os
import pathlib
import signal
import socket
import subprocess
import sys

import chex
import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import point3r_jax as p3r
from point3r_jax.checkpoints import CheckpointError
from point3r_jax.config import PRESETS
from point3r_jax.data.synthetic.source import SyntheticSource
from point3r_jax.errors import InputError
from point3r_jax.folder_lock import lock_folder
from point3r_jax.params import stack_layers
from point3r_jax.training import loop, programs
from point3r_jax.training.experiment import make_mixture, open_experiment
from point3r_jax.training.logs import MetricLog
from point3r_jax.training.loop import RunOptions, train
from point3r_jax.training.programs import Programs
from point3r_jax.training.sharding import batch_sharding
from point3r_jax.training.watch import TrainingError
from tests import micro
from tests.training import batches, micro_run
from tests.training.micro_run import STEPS

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True, scope="module")
def environment():
  """Knows the micro model; compiles a step once for all runs of this file."""
  compile_step, compiled = programs._compile_and_log, {}

  def compile_once(experiment, shape, reason):
    optimizer = experiment.config.optimizer.to_json_best_effort()
    key = experiment.step, optimizer, experiment.config.batch_size, shape
    if key not in compiled:
      compiled[key] = compile_step(experiment, shape, reason)
    return compiled[key]

  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(PRESETS, "micro", micro.CONFIG)
    patch.setattr(programs, "_compile_and_log", compile_once)
    yield


def experiment(**changes):
  config = micro_run.get_config()
  config.update_from_flattened_dict(changes)
  return open_experiment(config, jax.devices()[:1])


def start(workdir, *flags, devices: int = 1, **environment) -> subprocess.Popen:
  """Starts train.py's program on the micro model."""
  settings = os.environ | environment
  settings["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={devices}"
  settings["PYTHONPATH"] = str(ROOT)
  command = [sys.executable, "-m", "tests.training.micro_run"]
  command += ["--config", str(ROOT / "tests/training/micro_run.py")]
  return subprocess.Popen(
    [*command, "--workdir", str(workdir), *flags],
    cwd=ROOT,
    env=settings,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def start_two(workdir, *flags: list[str]) -> list[subprocess.Popen]:
  """Starts two processes that train together, each with flags of its own."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    coordinator = f"localhost:{free.getsockname()[1]}"
  return [
    start(
      workdir,
      "--config.mesh.fsdp=2",
      f"--coordinator={coordinator}",
      "--processes=2",
      f"--process={process}",
      *own,
    )
    for process, own in enumerate(flags)
  ]


def finish(processes, timeout: float = 60) -> list[str]:
  """Returns what processes print; ends those that are not done in time."""
  try:
    return [p.communicate(timeout=timeout)[0] for p in processes]
  finally:
    for process in processes:
      process.kill()


def checkpoint_steps(workdir) -> set[int]:
  return {int(path.name) for path in (workdir / "checkpoints").iterdir()}


def losses(workdir) -> list[float]:
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
  return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
  """A run that nothing disturbs: its state and directory."""
  workdir = tmp_path_factory.mktemp("straight")
  state = train(experiment(), RunOptions(workdir))
  return jax.device_get(state), workdir


def test_a_run_writes_what_others_read(straight):
  state, workdir = straight
  assert int(state.step) == STEPS
  assert len(losses(workdir)) == STEPS
  assert checkpoint_steps(workdir) == {4, 6}
  config, params = p3r.load_checkpoint(workdir)
  assert config == micro.CONFIG
  _, average = p3r.load_checkpoint(workdir, ema=True)
  kernel = params["pose_head"]["hidden"]["kernel"]
  chex.assert_trees_all_equal(
    kernel, state.params["pose_head"]["hidden"]["kernel"]
  )
  assert (kernel != average["pose_head"]["hidden"]["kernel"]).any()


@pytest.mark.parametrize(
  "number",
  [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)],
)
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(
  straight, tmp_path, monkeypatch, caplog, number
):
  def write_and_signal(self, step, values):
    write(self, step, values)
    if step == 3:
      os.kill(os.getpid(), number)

  write = MetricLog.write
  with monkeypatch.context() as patch:
    patch.setattr(MetricLog, "write", write_and_signal)
    assert int(train(experiment(), RunOptions(tmp_path)).step) == 3
  with caplog.at_level(logging.INFO):
    state = train(experiment(max_streak=7), RunOptions(tmp_path))
  assert "changed since that step: max_streak was 10 and is 7" in caplog.text
  chex.assert_trees_all_equal(jax.device_get(state), straight[0])
  assert losses(tmp_path) == losses(straight[1])


@pytest.mark.slow
def test_a_signal_during_compilation_saves_what_is_done(
  straight, tmp_path, monkeypatch
):
  take_step, submit, taken = Programs.step, Programs._submit, []

  def count(self, *operands):
    result = take_step(self, *operands)
    taken.append(True)
    return result

  def compile_for_ever(self, shape, reason):
    if len(taken) < 3:
      return submit(self, shape, reason)
    os.kill(os.getpid(), signal.SIGTERM)
    return concurrent.futures.Future()

  def is_ready(self, shape):
    return len(taken) < 3

  with monkeypatch.context() as patch:
    patch.setattr(Programs, "step", count)
    patch.setattr(Programs, "_submit", compile_for_ever)
    patch.setattr(Programs, "is_ready", is_ready)
    assert int(train(experiment(), RunOptions(tmp_path)).step) == 3
  state = train(experiment(), RunOptions(tmp_path))
  chex.assert_trees_all_equal(jax.device_get(state), straight[0])
  assert losses(tmp_path) == losses(straight[1])


@pytest.mark.slow
def test_a_signal_ends_the_process_while_it_compiles(tmp_path):
  with start(tmp_path) as process:
    output = ""
    while "compiling the step" not in output:
      line = process.stdout.readline()
      assert line, output
      output += line
    process.terminate()
    output += process.communicate(timeout=60)[0]
  assert process.returncode == 130, output
  assert "stopped at step 0 of 6" in output and "compiled" not in output


def test_max_steps_ends_a_run_and_a_second_run_waits(straight, tmp_path):
  with lock_folder(tmp_path), pytest.raises(InputError, match="is in use by"):
    train(experiment(), RunOptions(tmp_path))
  assert int(train(experiment(), RunOptions(tmp_path, max_steps=1)).step) == 1


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path):
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  # At once: both wait for the compiler. With as many devices, for the order of
  # sums depends on them.
  processes = start(whole), start(killed, KILL_AT_STEP="5")
  outputs = finish(processes, timeout=300)
  assert [p.returncode for p in processes] == [0, -signal.SIGKILL], outputs
  assert len(losses(killed)) == 5
  finish([start(killed)], timeout=300)
  assert losses(killed) == losses(whole)
  states = [train(experiment(), RunOptions(x)) for x in (whole, killed)]
  assert states[0].step == STEPS
  chex.assert_trees_all_equal(*jax.device_get(states))


@pytest.mark.slow
def test_two_processes_train_as_one(straight, tmp_path):
  processes = start_two(tmp_path, [], [])
  outputs = finish(processes, timeout=300)
  assert [p.returncode for p in processes] == [0, 0], "\n".join(outputs)
  np.testing.assert_allclose(losses(tmp_path), losses(straight[1]), rtol=1e-5)


@pytest.mark.slow
def test_processes_that_would_train_something_else_end_with_a_line(tmp_path):
  processes = start_two(tmp_path, [], ["--config.seed=1"])
  outputs = finish(processes)
  assert [p.returncode for p in processes] == [2, 2], "\n".join(outputs)
  for output in outputs:
    assert "process 0 to process 1, config.seed was 0 and is 1" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_an_error_in_one_process_ends_the_others(tmp_path):
  with lock_folder(tmp_path):  # Only process 0 locks it.
    processes = start_two(tmp_path, [], [])
    outputs = finish(processes)
  assert processes[0].returncode == 2, outputs[0]
  assert "is in use by" in outputs[0] and "Traceback" not in outputs[0]
  assert processes[1].returncode != 0


@pytest.fixture(scope="module")
def steps(straight):
  """Returns a first state, and the step that the runs here take."""
  run = experiment()
  programs = Programs(run)
  params = jax.tree.map(np.asarray, stack_layers(micro.params()))
  state = run.maker.init(params)

  def step(state, batch):
    # Programs donate their state.
    batch = jax.device_put(batch, batch_sharding(run.mesh))
    return programs.step(jax.tree.map(jnp.copy, state), batch)

  return state, step


def test_steps_lower_the_loss(steps):
  state, step = steps
  batch, found = batches.batch(2, 2), []
  for _ in range(8):
    state, metrics = step(state, batch)
    found.append(float(metrics["loss"]))
  assert found[-1] < found[0] - 0.1
  assert int(state.step) == 8 and not int(state.skipped)
  assert metrics["pointers"] > micro.TOKENS


def test_batches_that_are_not_finite_change_nothing_but_the_counts(steps):
  start, step = steps
  good, bad = batches.batch(2, 2), batches.batch(2, 2)
  bad["camera_to_world"][0, 1, 0, 3] = np.nan
  state, metrics = step(start, bad)
  assert not np.isfinite(metrics["loss"])
  chex.assert_trees_all_equal(
    (state.params, state.opt_state, state.ema),
    (start.params, start.opt_state, start.ema),
  )
  state, _ = step(state, bad)
  assert (int(state.step), int(state.skipped), int(state.streak)) == (2, 2, 2)
  state, _ = step(state, good)
  assert (int(state.skipped), int(state.streak)) == (2, 0)
  after, _ = step(start, good)
  chex.assert_trees_all_equal(state.opt_state, after.opt_state)


def test_the_order_of_a_batch_does_not_matter(steps):
  state, step = steps
  batch = batches.batch(2, 2)
  swapped = jax.tree.map(lambda x: x[::-1], batch)
  one, other = step(state, batch)[1], step(state, swapped)[1]
  np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-5)


def test_other_data_or_another_model_are_refused(straight):
  _, workdir = straight
  with pytest.raises(CheckpointError, match=r"batch_size was 2 and is 4"):
    train(
      experiment(**{"batch_size": 4, "checkpoint.every_epochs": 1.0}),
      RunOptions(workdir),
    )
  with pytest.raises(CheckpointError, match=r"options\.synthetic\.seed"):
    other = micro_run.get_config()
    other.datasets.synthetic.seed = 1
    train(open_experiment(other, jax.devices()[:1]), RunOptions(workdir))
  with pytest.raises(CheckpointError, match="another model"):
    train(experiment(**{"model.preset": "small"}), RunOptions(workdir))


def test_a_run_stops_when_nothing_is_finite_any_more(
  straight, tmp_path, monkeypatch, caplog
):
  """A stand-in for the step that reports what a diverged one would."""

  class Diverged(Programs):
    streak = 0

    def __init__(self, experiment, ahead):
      super().__init__(experiment)

    def wait(self, shape):
      pass

    def step(self, state, batch):
      self.streak += 1
      names = ("loss", "grad_norm", "overflow", "streak")
      values = (np.nan, np.nan, 0, self.streak)
      return state, dict(zip(names, jax.device_put(values), strict=True))

  monkeypatch.setattr(loop, "Programs", Diverged)
  with pytest.raises(
    TrainingError, match=r"3 times in a row.*synthetic \d+.*no checkpoint yet"
  ):
    train(experiment(max_streak=3), RunOptions(tmp_path))
  assert "step 1 skipped: its loss is nan" in caplog.text


class Poisoned(Programs):
  """Steps whose losses are not finite from one to another."""

  first, last = 4, STEPS

  def step(self, state, batch):
    self.taken = getattr(self, "taken", 0) + 1
    if self.first <= self.taken <= self.last:
      with jax.transfer_guard("allow"):
        batch = batch | {"camera_to_world": batch["camera_to_world"] * np.nan}
    return super().step(state, batch)


# A checkpoint after each step, of which two are kept.
EACH_STEP = {"checkpoint.every_epochs": 1 / STEPS, "checkpoint.keep_last": 2}


@pytest.mark.slow
@pytest.mark.parametrize("max_steps", [None, 5])
def test_skipped_steps_do_not_push_good_checkpoints_out(
  straight, tmp_path, monkeypatch, caplog, max_steps
):
  options = RunOptions(tmp_path, max_steps)
  with monkeypatch.context() as patch:
    patch.setattr(loop, "Programs", Poisoned)
    if max_steps:  # Stopped before it gave up.
      train(experiment(**EACH_STEP), options)
      assert "no checkpoint of step 5: it is the last of 2" in caplog.text
    else:
      message = "last checkpoint, of step 3, .* go on from step 2"
      with pytest.raises(TrainingError, match=message):
        train(experiment(max_streak=3, **EACH_STEP), options)
  assert checkpoint_steps(tmp_path) == {2, 3}
  state = train(experiment(**EACH_STEP), RunOptions(tmp_path))
  chex.assert_trees_all_equal(jax.device_get(state), straight[0])


@pytest.mark.slow
def test_a_checkpoint_due_at_a_skipped_step_comes_after_the_next(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(loop, "Programs", Poisoned)
  monkeypatch.setattr(Poisoned, "last", 4)
  train(experiment(**{"checkpoint.keep_last": 3}), RunOptions(tmp_path))
  assert checkpoint_steps(tmp_path) == {2, 5, 6}


@pytest.mark.slow
def test_a_complete_run_is_saved_and_a_streak_ends_with_it(
  straight, tmp_path, monkeypatch
):
  with monkeypatch.context() as patch:
    patch.setattr(loop, "Programs", Poisoned)
    patch.setattr(Poisoned, "first", STEPS)
    state = train(experiment(), RunOptions(tmp_path))
  assert (int(state.skipped), int(state.streak)) == (1, 1)
  assert max(checkpoint_steps(tmp_path)) == STEPS
  state = train(experiment(), RunOptions(tmp_path))
  assert (int(state.skipped), int(state.streak)) == (1, 0)


@pytest.mark.slow
def test_what_was_done_before_an_unreadable_record_is_saved(
  straight, tmp_path, monkeypatch
):
  run = experiment(**{"checkpoint.every_epochs": 0.0})
  third = make_mixture(run.config).draw(3 * run.config.batch_size).index
  sequence = SyntheticSource.sequence

  def read(self, index, *rest):
    if index == third:
      raise InputError("torn")
    return sequence(self, index, *rest)

  with monkeypatch.context() as patch:
    patch.setattr(SyntheticSource, "sequence", read)
    with pytest.raises(InputError, match=f"record {third}: torn"):
      train(run, RunOptions(tmp_path))
  assert checkpoint_steps(tmp_path) == {3}
  state = train(run, RunOptions(tmp_path))
  chex.assert_trees_all_equal(jax.device_get(state), straight[0])


@pytest.mark.slow
def test_sizes_compile_once_and_pictures_and_a_trace_are_written(
  tmp_path, caplog
):
  sizes = (micro.IMAGE_SIZE, micro.IMAGE_SIZE[::-1])
  changes = {"log.panel_every": 3, "optimizer.lr": 2e-3}
  run = experiment(image_sizes=sizes, **changes)
  with caplog.at_level(logging.INFO):
    train(run, RunOptions(tmp_path, profile=(2, 3)))
  compiled = [x for x in caplog.messages if x.startswith("compiling the step")]
  assert len(compiled) == len(sizes) == len(set(compiled))
  pictures = sorted(x.name for x in (tmp_path / "images").rglob("*.png"))
  assert len(pictures) == STEPS // 3
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def own_dataset():
  """A run on a dataset that the config does not know, and the dataset."""
  dataset = grain.MapDataset.source(make_mixture(micro_run.get_config()))
  config = micro_run.get_config()
  with config.unlocked():
    config.datasets = ConfigDict({"mine": {"samples": 2 * STEPS}})
  return open_experiment(config, jax.devices()[:1]), dataset


@pytest.mark.slow
def test_a_dataset_of_ones_own_trains_the_same(straight, tmp_path):
  run, dataset = own_dataset()
  options = RunOptions(tmp_path, max_steps=3)
  train(run, options, dataset, fingerprint={"version": 1})
  with pytest.raises(CheckpointError, match=r"version was 1 and is 2"):
    train(run, options, dataset, fingerprint={"version": 2})
  state = train(run, RunOptions(tmp_path), dataset, fingerprint={"version": 1})
  chex.assert_trees_all_equal(jax.device_get(state), straight[0])


def test_a_dataset_that_does_not_suit_is_refused(tmp_path):
  run, dataset = own_dataset()
  with pytest.raises(InputError, match="needs a fingerprint"):
    train(run, RunOptions(tmp_path), dataset)
  with pytest.raises(InputError, match=r"has 11 samples, but .* take 12"):
    train(run, RunOptions(tmp_path), dataset[:11], fingerprint="short")
  run.config.render_on_devices = True
  with pytest.raises(InputError, match="set it to False"):
    train(run, RunOptions(tmp_path), dataset, fingerprint="all")
