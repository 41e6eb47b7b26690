"""What only a GPU can show; run with `-m gpu`."""

import functools
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
from point3r_jax.models import dpt, gelus, hopper_attention_gradient, norms
from point3r_jax.models import parts as parts_module
from point3r_jax.models.attention import attention
from point3r_jax.models.hopper_attention import quickest
from point3r_jax.models.layers import query_key_value
from point3r_jax.models.linear import Factors
from point3r_jax.models.parts import take_apart
from point3r_jax.models.rotary import rotary_2d, rotary_3d
from point3r_jax.params import prepare_params
from point3r_jax.training.hlo import Program, type_shape
from tests import goldens

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_a_gpu():
  if jax.default_backend() != "gpu":
    pytest.skip("no GPU")


@pytest.mark.parametrize("implementation", ["cudnn", "hopper"])
@pytest.mark.parametrize("head_dim", [48, 64, 128])
@pytest.mark.parametrize("lengths", [(1, 300), (512, 77), None])
def test_attention_equals_xla(implementation, head_dim, lengths):
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = [(2, 257, 4, head_dim)] + 2 * [(2, 512, 4, head_dim)]
  operands = [
    jax.random.normal(key, shape, jnp.bfloat16)
    for key, shape in zip(keys, shapes, strict=True)
  ]
  length = None if lengths is None else jnp.array(lengths, jnp.int32)

  def run(implementation):
    def total(*operands):
      result = attention(
        *operands, key_length=length, implementation=implementation
      )
      return jnp.sum(result.astype(jnp.float32) ** 2), result

    gradient = jax.grad(total, argnums=(0, 1, 2), has_aux=True)
    return jax.jit(gradient)(*operands)

  gradients, result = run(implementation)
  expected_gradients, expected = run("xla")
  chex.assert_tree_all_finite(gradients)
  np.testing.assert_allclose(
    result.astype(np.float32), expected.astype(np.float32), atol=0.03
  )
  for x, y in zip(gradients, expected_gradients, strict=True):
    x, y = x.astype(np.float32), y.astype(np.float32)
    assert np.abs(x - y).max() < 0.05 * np.abs(y).max()


@pytest.mark.parametrize("head_dim", [16, 48, 64])
@pytest.mark.parametrize(
  ("batch", "tokens", "warpgroups", "blocks"),
  [
    (2, (80, 136), 3, 1),
    (2, (8, 200), 3, 2),
    (2, (784, 264), 3, 2),
    (2, (80, 700), 3, 4),
    (16, (200, 200), 4, 1),
    (16, (784, 784), 3, 5),  # Forward ten tasks for each multiprocessor.
    (2, (80, 1000), 4, 4),
  ],
)
def test_hopper_attentions_backward_pass(
  batch, tokens, warpgroups, blocks, head_dim
):
  """Within one and several blocks of keys; the same results each time."""
  form = quickest(hopper_attention_gradient.FORMS, 16 * batch, tokens[1])
  assert (form.warpgroups, form.tasks(tokens[1])) == (warpgroups, blocks)
  keys = jax.random.split(jax.random.key(0), 4)
  query, key, value, gradient = (
    jax.random.normal(x, (batch, count, 16, head_dim), jnp.bfloat16)
    for x, count in zip(keys, (*tokens, tokens[1], tokens[0]), strict=True)
  )
  length = jnp.full(batch, tokens[1], jnp.int32).at[1].set(3)

  @functools.partial(jax.jit, static_argnums=0)
  def pull(implementation, *operands):
    def run(*operands):
      return attention(
        *operands, key_length=length, implementation=implementation
      )

    return jax.vjp(run, *operands)[1](gradient)

  result = pull("hopper", query, key, value)
  chex.assert_trees_all_equal(result, pull("hopper", query, key, value))
  wide = (x.astype(jnp.float32) for x in (query, key, value))
  gradient = gradient.astype(jnp.float32)
  with jax.default_matmul_precision("highest"):
    expected = pull("xla", *wide)
  for x, y in zip(result, expected, strict=True):
    error = jnp.linalg.norm(x.astype(jnp.float32) - y)
    assert error < 6e-3 * jnp.linalg.norm(y)
  assert not any(x[1, 3:].any() for x in result[1:])


def test_hopper_attention_passes_over_queries_in_training():
  """Tasks without any, among others that follow one another."""
  shape = (16, 784, 16, 48)
  query, key, value, gradient = (
    jax.random.normal(x, shape, jnp.bfloat16)
    for x in jax.random.split(jax.random.key(0), 4)
  )
  length = jnp.where(jnp.arange(16) % 2, 784, 40)
  valid = (jnp.arange(784) < length[:, None])[..., None, None]

  @functools.partial(jax.jit, static_argnums=0)
  def pull(implementation, *operands):
    def run(*operands):
      result = attention(
        *operands,
        query_length=length,
        key_length=length[::-1],
        implementation=implementation,
      )
      return jnp.where(valid, result, 0)

    result, pullback = jax.vjp(run, *operands)
    return result, *pullback(gradient.astype(result.dtype))

  results = pull("hopper", query, key, value)
  chex.assert_tree_all_finite(results)
  with jax.default_matmul_precision("highest"):
    expected = pull(
      "xla", *(x.astype(jnp.float32) for x in (query, key, value))
    )
  for x, y in zip(results, expected, strict=True):
    error = jnp.linalg.norm(x.astype(jnp.float32) - y)
    assert error < 6e-3 * jnp.linalg.norm(y)


@pytest.mark.parametrize("tokens", [1, 70, 192, 1280, 3072])
@pytest.mark.parametrize("head_dim", [16, 48, 64])
def test_hopper_attention_takes_lengths_of_both(tokens, head_dim):
  """Few and many queries: blocks of two, three and five warpgroups."""
  shape = (2, tokens, 16, head_dim)
  query, key, value = (
    jax.random.normal(x, shape, jnp.bfloat16)
    for x in jax.random.split(jax.random.key(0), 3)
  )
  lengths = jnp.array([tokens, -(-tokens // 3)], jnp.int32)
  result = attention(
    query,
    key,
    jnp.concatenate([key[:, :, :1], value, key], axis=2),
    value_head=1,
    query_length=lengths,
    key_length=lengths[::-1],
    implementation="hopper",
  )
  expected = attention(
    query, key, value, key_length=lengths[::-1], implementation="xla"
  )
  chex.assert_tree_all_finite(result)
  for sample, length in enumerate(lengths.tolist()):
    np.testing.assert_allclose(
      result[sample, :length].astype(np.float32),
      expected[sample, :length].astype(np.float32),
      atol=0.03,
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(2, 100, 768), (80, 200, 1024)])
def test_norms_by_rows_equal_xla(monkeypatch, shape, dtype):
  keys = jax.random.split(jax.random.key(0), 3)
  x = (3 + 2 * jax.random.normal(keys[0], shape)).astype(dtype)
  gradients = (
    jax.random.normal(keys[1], shape, jnp.bfloat16),
    jax.random.normal(keys[2], shape, dtype),
  )

  def run():
    def both(x, gradients):
      normed, pullback = jax.vjp(
        lambda x: norms._normalize(x, (None, None), jnp.bfloat16), x
      )
      return normed, pullback(gradients)

    return jax.jit(both)(x, gradients)

  assert norms.suit_rows(shape, jnp.bfloat16)
  found = run()
  monkeypatch.setattr(norms, "suit_rows", lambda *_: False)
  for one, other in zip(*map(jax.tree.leaves, (found, run())), strict=True):
    assert one.dtype == other.dtype
    np.testing.assert_allclose(
      np.float32(one), np.float32(other), rtol=2**-7, atol=4e-3
    )


def assert_as_xla_does(run, monkeypatch, module, suits="suit_rows"):
  """Compares arrays that a module makes with kernels and without."""
  found = run()
  monkeypatch.setattr(module, suits, lambda *_: False)
  for one, other in zip(*map(jax.tree.leaves, (found, run())), strict=True):
    one, other = np.float32(one), np.float32(other)
    error = np.abs(one - other).max()
    assert error < 0.01 * np.abs(other).max()


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(
  "shape", [(2, 100, 768), (25, 200, 768), (80, 200, 1024), (4, 256, 1536)]
)
def test_norms_sums_by_rows_equal_xla(monkeypatch, shape, wanted):
  keys = jax.random.split(jax.random.key(0), 3)
  x, *gradients = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys)
  biases = tuple(jnp.zeros(shape[-1:]) if want else None for want in wanted)

  def run():
    def both(x, biases, gradients):
      normed, pullback = jax.vjp(
        lambda x, biases: norms._normalize(x, biases, x.dtype), x, biases
      )
      return normed, *pullback(tuple(gradients))

    return jax.jit(both)(x, biases, gradients)

  assert norms.suit_rows(shape, jnp.bfloat16)
  assert_as_xla_does(run, monkeypatch, norms)


@pytest.mark.parametrize("shape", [(1, 72, 3072), (80, 200, 4096)])
def test_gelus_by_rows_equal_xla(monkeypatch, shape):
  keys = jax.random.split(jax.random.key(0), 3)
  y, gradient = (
    scale * jax.random.normal(key, shape, jnp.bfloat16)
    for scale, key in ((3, keys[0]), (1, keys[1]))
  )
  bias = jax.random.normal(keys[2], shape[-1:], jnp.bfloat16)

  def run():
    def both(y, bias, gradient):
      result, pullback = jax.vjp(
        lambda y, bias: gelus.add_bias_gelu(y, bias, jnp.bfloat16), y, bias
      )
      return result, *pullback(gradient)

    return jax.jit(both)(y, bias, gradient)

  assert gelus.suit_rows(shape, jnp.bfloat16)
  assert_as_xla_does(run, monkeypatch, gelus)


@pytest.mark.parametrize(
  ("rows", "width", "hidden"),
  [
    ((80, 200), 1024, 4096),
    ((16, 784), 768, 3072),
    ((3, 776), 768, 3072),  # Whose last tile is beyond the rows.
    ((1, 8), 64, 128),  # One cluster, one step.
  ],
)
def test_products_with_gelus_equal_xla(monkeypatch, rows, width, hidden):
  """The same each time, and as by two kernels."""
  keys = jax.random.split(jax.random.key(0), 5)
  x, first, bias, second, gradient = (
    scale * jax.random.normal(key, shape, jnp.bfloat16)
    for key, scale, shape in zip(
      keys,
      (1, width**-0.5, 1, 0.1, 1),
      (
        (*rows, width),
        (width, hidden),
        (hidden,),
        (hidden, width),
        (*rows, width),
      ),
      strict=True,
    )
  )

  def run():
    def both(x, first, bias, second, gradient):
      def multiply(x, first, bias, second):
        product = Factors(x, first, x.dtype)
        return gelus.multiply_gelu(
          product,
          second,
          bias=bias,
          dtype=x.dtype,
          preferred_element_type=x.dtype,
        )

      result, pullback = jax.vjp(multiply, x, first, bias, second)
      return result, *pullback(gradient)

    return jax.jit(both)(x, first, bias, second, gradient)

  assert gelus._suit_products(x, first, second)
  chex.assert_trees_all_equal(run(), run())
  assert_as_xla_does(run, monkeypatch, gelus, "_suit_products")


@pytest.mark.parametrize("shape", [(1, 3, 8, 128), (16, 224, 224, 128)])
def test_maps_read_out_equal_xla(monkeypatch, shape):
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], shape, jnp.bfloat16)
  kernel = jax.random.normal(keys[1], (shape[-1], 4))
  gradient = jax.random.normal(keys[2], (*shape[:-1], 4))

  def run():
    def both(x, kernel, gradient):
      result, pullback = jax.vjp(dpt._read_out, x, kernel)
      return result, *pullback(gradient)

    return jax.jit(both)(x, kernel, gradient)

  assert dpt.suit_rows(shape, jnp.bfloat16, shape[-1])
  assert_as_xla_does(run, monkeypatch, dpt)


@pytest.mark.parametrize(
  ("batch", "grid", "heads"), [(80, (10, 20), (16,)), (3, (7, 8), (12, 16))]
)
def test_products_taken_apart_equal_xla(monkeypatch, batch, grid, heads):
  tokens, keys = grid[0] * grid[1], jax.random.split(jax.random.key(0), 8)
  width = 1024 if len(heads) == 1 else 768
  position = jax.random.normal(keys[0], (batch, tokens, 3))
  parts = []
  for number in heads:
    channels = width // number
    table = rotary_3d(position, channels, (100.0, 10.0))
    if len(heads) == 1:
      table = rotary_2d(grid, channels)
    parts += query_key_value(number, table)
  y = jax.random.normal(keys[1], (batch, tokens, len(parts) * width))
  y, bias = y.astype(jnp.bfloat16), jnp.ones(y.shape[-1:], jnp.bfloat16)
  gradients = [
    jax.random.normal(
      key, (batch, tokens, part.heads, width // part.heads), y.dtype
    )
    for key, part in zip(keys[2:], parts, strict=False)
  ]

  def run():
    def both(y, bias, gradients):
      taken, pullback = jax.vjp(
        lambda y, bias: take_apart(y, bias, y.dtype, parts=parts), y, bias
      )
      return taken, pullback(gradients)

    return jax.jit(both)(y, bias, gradients)

  assert parts_module.suit_rows(y.shape, y.dtype)
  assert_as_xla_does(run, monkeypatch, parts_module)


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
