"""Trains a model: flags in, a run, exit code out."""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
from collections.abc import Sequence

import absl.logging
import jax
from absl import app, flags
from ml_collections import config_flags

from point3r_jax.cli.common import INTERRUPTED, end, leave, run
from point3r_jax.errors import InputError
from point3r_jax.gpu_options import load_kernels_at_the_start

# Exit code of a run that cannot go on; restarting it will not help.
_DIVERGED = 3

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "a file of configs/, or of your own; see configs/base.py"
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "for checkpoints and logs; a run found there is resumed"
)
_MAX_STEPS = flags.DEFINE_integer(
  "max_steps", None, "stop after this step, with a checkpoint", lower_bound=1
)
_PROFILE_STEPS = flags.DEFINE_list(
  "profile_steps", None, "FIRST,LAST: trace these steps into WORKDIR/profile"
)
_DRY_RUN = flags.DEFINE_bool(
  "dry_run", False, "print what a step costs, without data, and end"
)
_DEVICES = flags.DEFINE_integer(
  "devices", None, "for --dry_run: number of devices, which need not exist"
)
_TOPOLOGY = flags.DEFINE_string(
  "topology",
  None,
  "for --dry_run: GPUs, such as h200:2x8 (two hosts of eight), or a slice of "
  "TPUs, such as v5p-128 or v5p:4x4x4; see docs/training.md",
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator",
  None,
  "HOST:PORT of process 0, or 'auto' on Slurm and TPU pods: train with several "
  "processes",
)
_PROCESSES = flags.DEFINE_integer(
  "processes", None, "number of processes, with a HOST:PORT"
)
_PROCESS = flags.DEFINE_integer(
  "process", None, "index of this process, with a HOST:PORT"
)


def _initialize_distributed() -> None:
  """Lets the processes of a run find each other."""
  if not _COORDINATOR.value:
    # Of what srun started: an allocation alone may have more.
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks > 1 or _PROCESSES.value or _PROCESS.value is not None:
      raise InputError(
        "several processes need --coordinator, or each trains for itself in "
        "the same workdir: HOST:PORT, or auto on Slurm and TPU pods"
      )
    return
  if _COORDINATOR.value == "auto":
    try:
      jax.distributed.initialize()
    except ValueError as error:
      raise InputError(
        f"--coordinator auto finds no cluster here ({error}); give HOST:PORT, "
        "--processes and --process"
      ) from error
  else:
    if _PROCESSES.value is None or _PROCESS.value is None:
      raise InputError(
        "--coordinator HOST:PORT needs --processes and --process"
      )
    jax.distributed.initialize(
      _COORDINATOR.value, _PROCESSES.value, _PROCESS.value
    )


def _profile_steps() -> tuple[int, int] | None:
  from point3r_jax.training.experiment import ConfigError

  if _PROFILE_STEPS.value is None:
    return None
  try:
    first, last = map(int, _PROFILE_STEPS.value)
  except ValueError:
    first, last = 0, 0
  if not 1 <= first <= last:
    raise ConfigError(
      "--profile_steps takes two numbers from 1 on, such as 10,12"
    )
  return first, last


def _plan() -> None:
  from point3r_jax.training import plan
  from point3r_jax.training.devices import fake_devices, topology_devices
  from point3r_jax.training.experiment import open_experiment

  devices = None
  if _TOPOLOGY.value:
    devices = topology_devices(_TOPOLOGY.value)
  elif _DEVICES.value:
    fake_devices(_DEVICES.value)
  experiment = open_experiment(_CONFIG.value, devices)
  for image_size in dict.fromkeys(map(tuple, _CONFIG.value.image_sizes)):
    print(plan.format_plan(plan.plan(experiment, image_size)), flush=True)


def _train() -> int:
  from point3r_jax.training.experiment import ConfigError, open_experiment
  from point3r_jax.training.loop import RunOptions, train
  from point3r_jax.training.watch import TrainingError

  if not _WORKDIR.value:
    raise ConfigError("--workdir is missing: where checkpoints and logs go")
  if _DEVICES.value or _TOPOLOGY.value:
    raise ConfigError("--devices and --topology are for --dry_run")
  profile = _profile_steps()
  _initialize_distributed()
  if jax.process_index():
    logging.getLogger("point3r_jax").setLevel(logging.WARNING)
  options = RunOptions(_WORKDIR.value, _MAX_STEPS.value, profile)
  experiment = open_experiment(_CONFIG.value)
  try:
    state = train(experiment, options)
  except TrainingError as error:
    print(f"error: {error}", file=sys.stderr)
    return _DIVERGED
  last = min(experiment.total_steps, options.max_steps or sys.maxsize)
  return 0 if int(state.step) >= last else INTERRUPTED


def _program(arguments: Sequence[str]) -> int:
  if arguments:
    raise InputError(f"unknown arguments: {' '.join(arguments)}; see --help")
  if _CONFIG.value is None:
    raise InputError(
      "--config is missing: a file of configs/, such as "
      "configs/synthetic_tiny.py"
    )
  if _DRY_RUN.value:
    _plan()
    return 0
  return _train()


def _main(arguments: Sequence[str]) -> None:
  absl.logging.set_verbosity(absl.logging.WARNING)
  logging.basicConfig(format="%(asctime)s %(message)s", force=True)
  logging.getLogger("point3r_jax").setLevel(logging.INFO)
  load_kernels_at_the_start()
  agreed = False

  def program() -> int:
    nonlocal agreed
    code = _program(arguments[1:])
    agreed = True
    return code

  try:
    code = run(program)
  except Exception:
    if not jax.distributed.is_initialized():
      raise
    traceback.print_exc()
    code = 1
  if jax.distributed.is_initialized():
    if not agreed:
      # The others wait for this process in the next step, and JAX would let it
      # wait for them. Once it is gone, they end for the lost connection.
      leave(code)
    jax.distributed.shutdown()
  end(code)


def _first(error: BaseException) -> BaseException:
  """Returns the error that others were raised for, with more words."""
  while cause := error.__cause__ or error.__context__:
    error = cause
  return error


def _no_such_field(error: Exception, arguments: Sequence[str]) -> str:
  """Says which flag, or that the file, names a field that there is not."""
  field = _first(error).args[0]
  while isinstance(error.args[0], Exception):
    error = error.args[0]
  hint = str(error.args[0]).partition("\n")[2] or "see configs/base.py"
  for argument in arguments:
    flag = argument.partition("=")[0]
    if flag.lstrip("-").startswith("config.") and field in flag.split("."):
      return f"{flag}: there is no field {field!r}; {hint}"
  # A file of one's own. Without the list of all fields and values.
  listed = re.compile(' Other fields present: ".*"(?=\n|$)', re.DOTALL)
  return f"--config: {listed.sub('', str(error.args[0]))}"


def _parse(arguments: Sequence[str]) -> list[str]:
  """Parses flags; what is wrong with them is one line of error."""
  try:
    return flags.FLAGS(arguments)
  except flags.Error as error:
    reason = str(error)
    if "Traceback" in reason:  # What a config file raised.
      reason = f"{reason.partition(': ')[0]}: {_first(error)}"
  except (AttributeError, KeyError) as error:
    reason = _no_such_field(error, arguments)
  except (IndexError, TypeError, ValueError, OSError) as error:
    reason = f"--config: {error}"
  print(f"error: {' '.join(reason.split())}", file=sys.stderr)
  sys.exit(2)


def main() -> None:
  """Runs the program; ends the process with its exit code."""
  app.run(_main, flags_parser=_parse)
