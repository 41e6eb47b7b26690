"""What CUDA graphs may hold: on several GPUs, and of what is found compiled."""

import logging
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from point3r_jax import gpu_options, stream_programs
from point3r_jax.gpu_options import GRAPHS, load_kernels_at_the_start
from point3r_jax.models.hopper_attention import hopper_attention
from point3r_jax.training.programs import compiler_options

VARIABLE = "CUDA_MODULE_LOADING"


@pytest.fixture(autouse=True)
def unset(monkeypatch):
  """Leaves the choice to CUDA, and the environment as it was afterwards."""
  monkeypatch.setenv(VARIABLE, "")
  monkeypatch.delenv(VARIABLE)


def test_one_gpu_has_graphs(caplog):
  options = stream_programs._STEP_OPTIONS
  assert options[GRAPHS]
  assert gpu_options.suit_devices(options, 1) == options
  assert not caplog.records


def test_several_gpus_without_loaded_kernels_have_no_graphs(caplog):
  options = stream_programs._STEP_OPTIONS
  with caplog.at_level(logging.WARNING):
    assert gpu_options.suit_devices(options, 2) == {**options, GRAPHS: ""}
  assert f"{VARIABLE}=EAGER" in caplog.text


def test_several_gpus_with_loaded_kernels_have_graphs(caplog):
  load_kernels_at_the_start()
  assert os.environ[VARIABLE] == "EAGER"
  options = stream_programs._STEP_OPTIONS
  assert gpu_options.suit_devices(options, 8) == options
  assert not caplog.records


def test_the_users_choice_stays(monkeypatch):
  monkeypatch.setenv(VARIABLE, "LAZY")
  load_kernels_at_the_start()
  assert os.environ[VARIABLE] == "LAZY"
  assert not gpu_options.suit_devices(stream_programs._STEP_OPTIONS, 2)[GRAPHS]


def test_training_counts_its_devices(caplog):
  assert compiler_options("bodies", 1, "gpu")[GRAPHS]
  assert not compiler_options("bodies", 2, "gpu")[GRAPHS]
  caplog.clear()
  assert not compiler_options("none", 2, "gpu")[GRAPHS]
  assert not caplog.records
  load_kernels_at_the_start()
  assert compiler_options("bodies", 2, "gpu")[GRAPHS]
  assert compiler_options("bodies", 2, "cpu") is None


def test_training_records_convolutions_that_are_loaded(monkeypatch):
  def commands():
    return compiler_options("bodies", 1, "gpu")[GRAPHS].split(",")

  unloaded = commands()
  load_kernels_at_the_start()
  assert set(commands()) - set(unloaded) == {"CONVOLUTION"}
  assert "CUBLASLT" in unloaded


def test_streams_record_convolutions_beside_kernels_of_ours():
  options = stream_programs._STEP_OPTIONS

  def program(query, length):
    return hopper_attention(query, query, query, length, length)

  def commands(program):
    query = jax.ShapeDtypeStruct((1, 64, 2, 16), jnp.bfloat16)
    length = jax.ShapeDtypeStruct((1,), jnp.int32)
    traced = jax.jit(program).trace(query, length)
    lowered = traced.lower(lowering_platforms=("cuda",))
    return stream_programs._graphs_for(lowered, options)[GRAPHS].split(",")

  assert "CONVOLUTION" in commands(program)
  plain = commands(lambda query, length: query * length[0])
  assert "CONVOLUTION" not in plain
  assert "CONDITIONAL" in plain
  graphless = stream_programs.GPU_OPTIONS
  assert stream_programs._graphs_for(None, graphless) == graphless


@pytest.mark.parametrize(
  ("module", "function", "flags"),
  [
    ("train", "_program", []),
    ("evaluate", "_run", ["--dataset", "synthetic"]),
  ],
)
def test_programs_for_several_gpus_load_kernels(module, function, flags):
  code = f"""
import os, sys
from point3r_jax.cli import {module}
sys.argv[1:] = {flags}
{module}.{function} = lambda _: print(os.environ["{VARIABLE}"]) or 0
sys.exit({module}.main())
"""
  process = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert process.stdout == "EAGER\n"
