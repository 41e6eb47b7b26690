"""train.py's flags: what is wrong with them is one line."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SYNTHETIC = "--config=configs/synthetic_tiny.py"


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
    ([SYNTHETIC, "--nosuch"], "Unknown command line flag 'nosuch'"),
    ([SYNTHETIC, "more"], "unknown arguments: more"),
  ],
)
def test_wrong_flags_are_one_line(arguments, message):
  process = subprocess.run(
    [sys.executable, "train.py", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert process.returncode == 2 and process.stdout == ""
  assert message in process.stderr and process.stderr.startswith("error: ")
  assert process.stderr.count("\n") == 1


@pytest.mark.parametrize(
  ("variable", "message"),
  [
    ("SLURM_STEP_NUM_TASKS", "several processes need --coordinator"),
    ("SLURM_NTASKS", "no reader in this version"),  # It is not what stops it.
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
