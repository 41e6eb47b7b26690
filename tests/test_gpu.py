"""What only a GPU can show; run with `-m gpu`."""

import os
import re
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import point3r_jax as p3r
from point3r_jax import stream_programs, streaming
from point3r_jax.kernels_ahead import compile_kernels, find_kernels
from point3r_jax.models.attention import attention
from point3r_jax.params import prepare_params
from point3r_jax.training.hlo import Program, type_shape
from tests import goldens

pytestmark = pytest.mark.gpu


def test_kernels_compiled_ahead_are_those_of_the_program():
  def program(query, key, length):
    return attention(
      query, key, key, key_length=length, implementation="hopper"
    )

  query, key = (
    jax.random.normal(jax.random.key(tokens), (1, tokens, 4, 64), jnp.bfloat16)
    for tokens in (200, 328)
  )
  operands = query, key, jnp.array([300], jnp.int32)
  lowered = jax.jit(program).lower(*operands)
  (kernel,) = find_kernels(lowered)
  (future,) = compile_kernels(lowered)
  full = jnp.array([200], jnp.int32), operands[2], query, key, key
  assert [x.shape for x in full] == [x.shape for x in kernel.operands]
  (alone,) = future.result()(*full)
  chex.assert_trees_all_equal(alone, lowered.compile()(*operands))


@pytest.mark.parametrize(
  ("precision", "tolerance"), [("float32", 2e-4), ("tf32", 2e-2)]
)
def test_reference_numbers(precision, tolerance):
  golden = goldens.load_golden("small_landscape")
  config, params = goldens.seeded_params("small", golden.salt)
  frames, batch, height, width, _ = golden.images.shape
  memory = p3r.init_memory(config, batch, (height, width), 48 * frames)
  # Under TF32 later frames may fuse differently with these random weights.
  frames = frames if precision == "float32" else 1
  memory, prediction = p3r.scan(
    config, params, memory, golden.images[:frames], precision=precision
  )
  for frame in range(frames):
    for key, name in (
      ("pts3d_in_self_view", "points_camera"),
      ("pts3d_in_other_view", "points_world"),
    ):
      reference = golden.arrays[f"frame{frame}/{key}"]
      value = golden.maps(np.asarray(getattr(prediction, name)[frame]))
      error = np.abs(value - reference).max() / np.abs(reference).max()
      assert error < tolerance
    np.testing.assert_array_equal(
      prediction.pointer_count[frame],
      golden.arrays[f"frame{frame}/pointer_count"],
    )


@pytest.mark.parametrize("many_rows", [1024, 10**6])
def test_kernels_side_by_side_are_the_same_function(monkeypatch, many_rows):
  """A frame's CUDA graph knows what waits for what, with a choice of rows, too.

  Compared with one kernel after the other, and without a choice.
  """
  config, image_size = p3r.preset("point3r_512"), (384, 512)
  params = p3r.init_params(config)
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (8, *image_size, 3), np.uint8)
  results = []
  for mode, rows in (("CONCURRENT", many_rows), ("SERIALIZE", 10**6)):
    monkeypatch.setattr(streaming, "_MANY_ROWS", rows)
    monkeypatch.setitem(
      stream_programs._STEP_OPTIONS,
      "xla_gpu_command_buffer_scheduling_mode",
      mode,
    )
    stream = p3r.Stream(config, params, image_size, precision="bfloat16")
    results.append(jax.device_get(list(stream.extend(images))))
  for side_by_side, one_by_one in zip(*results, strict=True):
    for name in ("points_camera", "points_world", "pose"):
      found, expected = (getattr(x, name) for x in (side_by_side, one_by_one))
      error = np.linalg.norm(found - expected)
      assert error < 0.01 * np.linalg.norm(expected), name


def read(entry, x):
  """Names of what an instruction reads: of a tuple only its part."""
  if x.operation == "get-tuple-element":
    whole = entry.get(x.operands[0])
    if whole is not None and whole.operation == "tuple":
      return [whole.operands[int(re.search(r"index=(\d+)", x.rest)[1])]]
  return x.operands


def convolutions_waited_for(text, shape):
  """Names of convolutions that the program's last result of a shape needs."""
  program = Program(text)
  entry = {x.name: x for x in program.computations[program.entry]}
  results = [
    x.name
    for x in entry.values()
    if "[" in x.type and type_shape(x.type) == shape
  ]
  waiting, needed = [results[-1]], set()
  while waiting:
    name = waiting.pop()
    if name in entry and name not in needed:
      needed.add(name)
      waiting += read(entry, entry[name])
  names = (re.search(r'op_name="([^"]*)"', entry[x].rest) for x in needed)
  return [x[1] for x in names if x and "conv_general_dilated" in x[1]]


def test_new_pointers_wait_for_the_world_points_alone():
  """XLA joins kernels of like shapes, and their results then wait for all."""
  config, image_size = p3r.preset("point3r_512"), (384, 512)
  options = p3r.StepOptions("bfloat16")
  programs = stream_programs.StreamPrograms(config, options, image_size, 1, 1)
  params = programs.put(prepare_params(p3r.init_params(config), "bfloat16"))
  step = programs.step(params.others, 4608, 768).result()
  shape = (1, 4608, config.decoder_width)
  names = convolutions_waited_for(step.as_text(), shape)
  assert any("world_head" in name for name in names)
  assert not any("camera" in name for name in names)


_OPEN_A_STREAM = """
import sys, numpy as np, point3r_jax as p3r
config = p3r.preset("tiny")
params = p3r.init_params(config)
stream = p3r.Stream(config, params, (96, 128), attention=sys.argv[1])
images = np.random.default_rng(0).integers(0, 256, (3, 96, 128, 3), np.uint8)
for prediction in map(stream, images):
  print(np.asarray(prediction.points_world).tobytes().hex())
"""

_TAKE_STEPS = """
import jax
from benchmarks.training import random_batch
from configs import synthetic_tiny
from point3r_jax.gpu_options import load_kernels_at_the_start
from point3r_jax.params import init_params
from point3r_jax.training.experiment import open_experiment
from point3r_jax.training.programs import Programs
from point3r_jax.training.sharding import batch_sharding
load_kernels_at_the_start()
config = synthetic_tiny.get_config()
config.batch_size = 2
config.cuda_graphs = "bodies"
config.unroll_layers = "never"
config.rollout.update(precision="bfloat16", sizes=1, unroll=1)
experiment = open_experiment(config)
state = experiment.maker.init(init_params(experiment.step.model))
batch = random_batch(2, 2, (32, 48))
batch = jax.device_put(batch, batch_sharding(experiment.mesh))
with Programs(experiment) as programs:
  for _ in range(3):
    state, metrics = programs.step(state, batch)
    print(float(metrics["loss"]))
"""


def run_with_cache(folder, *arguments):
  """Returns what a Python process writes that keeps all that it compiles."""
  environment = {
    **os.environ,
    "JAX_COMPILATION_CACHE_DIR": str(folder),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
  }
  command = [sys.executable, "-c", *arguments]
  return subprocess.check_output(command, env=environment, text=True)


@pytest.mark.parametrize("attention", ["auto", "cudnn"])
def test_a_process_runs_what_another_one_compiled(tmp_path, attention):
  """Kernels of ours, too, whose module it never imports; and convolutions.

  Nothing has loaded these when CUDA graphs are recorded.
  """
  written = run_with_cache(tmp_path, _OPEN_A_STREAM, attention)
  files = sorted(tmp_path.glob("*.lowered"))
  lowered = b"".join(path.read_bytes() for path in files)
  assert (b"mosaic_gpu" in lowered) == (attention == "auto")
  assert run_with_cache(tmp_path, _OPEN_A_STREAM, attention) == written
  assert sorted(tmp_path.glob("*.lowered")) == files


def test_a_process_trains_with_what_another_one_compiled(tmp_path):
  pytest.importorskip("ml_collections")
  first, second = (
    np.array(run_with_cache(tmp_path, _TAKE_STEPS).split(), np.float32)
    for _ in range(2)
  )
  assert len(list(tmp_path.glob("*.lowered"))) == 1
  assert np.isfinite(first).all()
  # cuDNN's gradients of attention are not summed in the same order each time.
  np.testing.assert_allclose(second, first, rtol=1e-3)


def test_full_size_stream_in_bfloat16_is_close_to_float32():
  config = p3r.preset("point3r_512")
  params = p3r.init_params(config)
  image_size = (384, 512)
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (*image_size, 3), np.uint8)
  results = {}
  for precision in ("float32", "bfloat16"):
    stream = p3r.Stream(config, params, image_size, precision=precision)
    results[precision] = jax.device_get(stream(image))
    for _ in range(2):
      chex.assert_tree_all_finite(stream(image))
    assert len(stream.compile_seconds.keys() - {"encoder"}) == 1
  for name in ("points_camera", "points_world"):
    exact, rounded = (getattr(results[p], name) for p in results)
    error = np.linalg.norm(rounded - exact, axis=-1).mean()
    assert error < 0.05 * np.linalg.norm(exact, axis=-1).mean()
