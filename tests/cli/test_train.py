"""train.py's flags: what is wrong with them is one line."""

import multiprocessing
import os
import pathlib
import runpy
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SYNTHETIC = "--config=configs/synthetic_tiny.py"


def run_script(arguments: list[str], output: pathlib.Path) -> None:
  """Runs train.py in this process, which ends; its output goes to files."""
  for stream in ("stdout", "stderr"):  # Libraries', too, not only Python's.
    with open(output / stream, "wb") as file:
      os.dup2(file.fileno(), getattr(sys, stream).fileno())
  sys.argv = ["train.py", *arguments]
  os.chdir(ROOT)
  runpy.run_path("train.py", run_name="__main__")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--workdir=runs"], "--config is missing: a file of configs/"),
    ([SYNTHETIC], "--workdir is missing"),
    (
      [f"{SYNTHETIC}:short"],
      "short: unknown stage 'short'; there are ['pairs'",
    ),
    (
      ["--config=configs/stage1_224.py:short"],
      "stage1_224.py:short: get_config() takes 0 positional arguments",
    ),
    (
      [SYNTHETIC, "--config.loss.images=3"],
      "--config.loss.images: there is no field 'images'; see configs/base.py",
    ),
    (
      [SYNTHETIC, "--config.images.size", "3"],
      "--config.images.size: there is no field 'images'; see configs/base.py",
    ),
    (
      [SYNTHETIC, "--config.optimizer.lrr=3"],
      "there is no field 'lrr'; Did you mean \"lr\"",
    ),
    ([SYNTHETIC, "--config.epochs=x"], "--config.epochs=x: invalid literal"),
    ([SYNTHETIC, "--config.image_sizes[9]=3"], "--config: tuple index"),
    (["--config=nowhere.py", "--config.epochs=3"], "'nowhere.py'"),
    (
      ["--config=tests/cli/misspelt_config.py"],
      'is locked. Did you mean "batch_size" instead of "bach_size"?',
    ),
    ([SYNTHETIC, "--nosuch"], "Unknown command line flag 'nosuch'"),
    ([SYNTHETIC, "more"], "unknown arguments: more"),
  ],
)
def test_wrong_flags_are_one_line(tmp_path, arguments, message):
  # Forked from one that has imported JAX.
  context = multiprocessing.get_context("forkserver")
  process = context.Process(target=run_script, args=(arguments, tmp_path))
  process.start()
  process.join()
  printed, error = (
    (tmp_path / name).read_text() for name in ("stdout", "stderr")
  )
  assert process.exitcode == 2 and printed == ""
  assert message in error and error.startswith("error: ")
  assert error.count("\n") == 1


@pytest.mark.parametrize(
  ("variable", "message"),
  [
    ("SLURM_STEP_NUM_TASKS", "several processes need --coordinator"),
    pytest.param(  # It is not what stops it.
      *("SLURM_NTASKS", "no reader in this version"), marks=pytest.mark.slow
    ),
  ],
)
def test_tasks_that_slurm_started_need_to_find_each_other(
  tmp_path, variable, message
):
  """Not those that an allocation may have, where a program runs by itself."""
  process = subprocess.run(
    [
      *(sys.executable, "train.py", "--config=configs/stage1_224.py"),
      f"--workdir={tmp_path}",
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    env={**os.environ, variable: "8"},
  )
  assert process.returncode == 2 and message in process.stderr
