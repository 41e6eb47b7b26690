"""Step and scan: independence, options, gradients, compilation, lowering."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import point3r_jax as p3r
from point3r_jax import params as params_module
from point3r_jax import streaming
from point3r_jax.params import (
  cast_params,
  param_shapes,
  prepare_params,
  stack_layers,
)
from tests import micro

FRAMES, CAPACITY = 4, 4 * micro.TOKENS


def new_memory(batch=1, capacity=CAPACITY):
  return p3r.init_memory(micro.SCANNED, batch, micro.IMAGE_SIZE, capacity)


def run(images, params=None, memory=None, config=micro.SCANNED, **options):
  """Steps through images (T, B, …): one small program for each option set."""
  memory = new_memory(images.shape[1]) if memory is None else memory
  params = micro.scanned_params() if params is None else params
  predictions = []
  for image in images:
    memory, prediction = p3r.step(config, params, memory, image, **options)
    predictions.append(prediction)
  return memory, jax.tree.map(lambda *x: np.stack(x), *predictions)


def scan(images, resets):
  memory = new_memory(images.shape[1])
  return p3r.scan(
    micro.SCANNED, micro.scanned_params(), memory, images, resets=resets
  )


def assert_close(x, y, atol=1e-5):
  chex.assert_trees_all_close(x, y, atol=atol, rtol=1e-5)


def sample(tree, b):
  """Returns one sample of a prediction with axes (T, B, …)."""
  return jax.tree.map(lambda x: x[:, b : b + 1], tree)


def test_scan_equals_steps_and_gives_the_contract_shapes():
  images = micro.images(FRAMES, 2)
  memory, predictions = scan(images, np.zeros((FRAMES, 2), bool))
  height, width = micro.IMAGE_SIZE
  chex.assert_shape(predictions.points_camera, (FRAMES, 2, height, width, 3))
  chex.assert_shape(predictions.confidence_camera, (FRAMES, 2, height, width))
  chex.assert_shape(predictions.points_world, (FRAMES, 2, height, width, 3))
  chex.assert_shape(predictions.confidence_world, (FRAMES, 2, height, width))
  chex.assert_shape(predictions.pose, (FRAMES, 2, 7))
  chex.assert_tree_all_finite(predictions)
  stepped, expected = run(images)
  assert_close(predictions, expected)
  assert_close(memory, stepped)
  np.testing.assert_array_equal(memory.frame, FRAMES)


def test_fusion_does_something_here():
  """Guards the tests of this file: memories grow, and by less than all."""
  memory, _ = run(micro.images(FRAMES, 2))
  assert (memory.count > micro.TOKENS).all()
  assert (memory.count < FRAMES * micro.TOKENS).all()


def test_samples_are_independent():
  images = micro.images(FRAMES, 2)
  _, together = run(images)
  for b in range(2):
    _, alone = run(images[:, b : b + 1])
    assert_close(sample(together, b), alone)


def test_streams_may_start_and_reset_at_different_frames():
  images = micro.images(FRAMES, 2)
  resets = np.zeros((FRAMES, 2), bool)
  resets[2, 1] = True
  _, together = scan(images, resets)
  _, steady = run(images[:, :1])
  _, before = run(images[:, 1:])
  _, after = run(np.roll(images[:, 1:], -2, axis=0))
  assert_close(sample(together, 0), steady)
  parts = jax.tree.map(
    lambda x, y: jnp.concatenate([x[:2], y[:2]]), before, after
  )
  assert_close(sample(together, 1), parts)


def test_garbage_in_padded_rows_changes_nothing():
  images = micro.images(FRAMES, 1)
  memory = new_memory()
  dirty = memory.replace(
    position=memory.position + 1e3, feature=memory.feature - 1e3
  )
  _, expected = run(images, memory=memory)
  _, predictions = run(images, memory=dirty)
  assert_close(predictions, expected)


def test_overflow_is_counted_and_bounded():
  memory, predictions = run(
    micro.images(FRAMES, 1),
    memory=new_memory(capacity=2 * micro.TOKENS),
    fusion=False,
  )
  assert memory.count[0] == 2 * micro.TOKENS
  assert memory.overflow[0] == (FRAMES - 2) * micro.TOKENS
  np.testing.assert_array_equal(predictions.overflow[:2], 0)
  chex.assert_tree_all_finite(predictions)


@pytest.mark.slow
def test_a_smaller_divisor_keeps_fewer_pointers():
  images = micro.images(FRAMES, 1)
  coarse, usual = run(images, fusion_divisor=3.0)[0], run(images)[0]
  assert coarse.count[0] < usual.count[0]


@pytest.mark.slow
def test_rotary_changes_all_but_the_first_frame():
  images = micro.images(FRAMES, 1)
  _, on = run(images)
  _, off = run(images, rotary=False)
  assert_close(on.pose[0], off.pose[0])
  assert np.abs(on.pose[1] - off.pose[1]).max() > 1e-4


@pytest.mark.slow
def test_heads_choose_what_is_computed():
  images = micro.images(FRAMES, 1)
  _, both = run(images)
  _, world = run(images, heads="world")
  _, camera = run(images, heads="camera")
  assert world.points_camera is None and world.confidence_camera is None
  assert camera.points_world is None and camera.confidence_world is None
  assert_close(world.points_world, both.points_world)
  assert_close(camera.points_camera, both.points_camera)

  def flops(heads):
    lowered = streaming._step.lower(
      micro.SCANNED,
      p3r.StepOptions(heads=heads),
      micro.scanned_params(),
      new_memory(),
      images[0],
    )
    return lowered.cost_analysis()["flops"]

  assert flops("world") < flops("both")


def encode(config, params, images):
  model = streaming.build_model(config, p3r.StepOptions())
  apply = jax.jit(functools.partial(model.apply, method="encode"))
  return apply({"params": params}, images)


def test_uint8_images_are_normalised_on_the_device():
  images = micro.images(1, 2)[0]
  expected = encode(micro.SCANNED, micro.scanned_params(), images / 127.5 - 1)
  tokens = encode(micro.SCANNED, micro.scanned_params(), images)
  assert_close(tokens, expected)


def test_scanned_layers_equal_unrolled_ones():
  config = micro.CONFIG.replace(encoder_depth=3)
  params = p3r.init_params(config)
  images = micro.images(1, 2)[0]
  expected = encode(config, params, images)
  scanned = config.replace(scan_layers=True)
  assert_close(encode(scanned, stack_layers(params), images), expected)


def test_bfloat16_is_close_and_the_same_with_cast_params():
  images = micro.images(FRAMES, 1)
  _, exact = run(images)
  _, rounded = run(images, precision="bfloat16")
  _, cast = run(
    images,
    params=cast_params(micro.scanned_params(), "bfloat16"),
    precision="bfloat16",
  )
  chex.assert_trees_all_equal(rounded, cast)
  assert rounded.points_world.dtype == jnp.float32
  error = np.abs(rounded.points_world - exact.points_world).mean()
  size = np.linalg.norm(exact.points_world, axis=-1).mean()
  assert 1e-6 < error / size < 0.1


def test_rounded_parameters_do_not_run_in_float32():
  params = cast_params(micro.scanned_params(), "bfloat16")
  with pytest.raises(ValueError, match="are rounded to bfloat16"):
    run(micro.images(FRAMES, 1), params=params, precision="float32")


@pytest.mark.slow
def test_prepared_parameters_are_the_same_function(monkeypatch):
  images = micro.images(FRAMES, 1)
  expected = run(images)
  # As if float32 had 16 bits.
  monkeypatch.setattr(params_module, "cast_params", lambda params, _: params)
  prepared = prepare_params(micro.scanned_params(), "bfloat16")
  assert_close(run(images, prepared), expected, atol=1e-4)


@pytest.mark.slow
def test_prepared_parameters_round_as_little_as_cast_ones():
  images = micro.images(FRAMES, 1)
  exact = run(images)[1].points_world

  def error(prepare):
    rounded = prepare(micro.scanned_params(), "bfloat16")
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), rounded)
    return np.abs(run(images, wide)[1].points_world - exact).mean()

  assert 0 < error(prepare_params) < 1.5 * error(cast_params)


def test_scan_traces_once(monkeypatch):
  counted = chex.assert_max_traces(streaming.scan_fn, n=1)
  monkeypatch.setattr(
    streaming, "_scan", jax.jit(counted, static_argnums=(0, 1))
  )
  memory = new_memory()
  for seed in range(3):
    images = micro.images(2, 1, seed)
    memory, _ = p3r.scan(
      micro.SCANNED, micro.scanned_params(), memory, images, heads="world"
    )
  assert memory.frame[0] == 6


@pytest.mark.parametrize(
  ("platform", "attention", "precision"),
  [
    ("cuda", "xla", "float32"),
    ("cuda", "xla", "bfloat16"),
    ("cuda", "hopper", "bfloat16"),
    ("tpu", "xla", "float32"),
    ("tpu", "tpu", "bfloat16"),
  ],
)
def test_lowers_for_accelerators(platform, attention, precision):
  """Not with cuDNN, which JAX looks for while tracing: see test_gpu.py."""
  config = p3r.preset("point3r_512").replace(
    encoder_depth=2, decoder_depth=4, value_depth=1
  )
  options = p3r.StepOptions(precision=precision, attention=attention)
  arguments = jax.eval_shape(
    lambda: (
      p3r.init_memory(config, 1, (384, 512)),
      jnp.zeros((1, 384, 512, 3), jnp.uint8),
    )
  )
  traced = streaming._step.trace(
    config, options, param_shapes(config), *arguments
  )
  lowered = traced.lower(lowering_platforms=(platform,))
  text = lowered.as_text()
  assert ("tpu_custom_call" in text) == (attention == "tpu")
  assert ("mosaic_gpu" in text) == (attention == "hopper")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"images": np.zeros((1, 32, 48, 3), np.float64)}, "must be uint8"),
    ({"images": np.zeros((32, 48, 3), np.uint8)}, "axes"),
    ({"images": np.zeros((1, 32, 48, 1), np.uint8)}, "3 channels"),
    ({"images": np.zeros((1, 30, 48, 3), np.uint8)}, "multiple of the patch"),
    ({"images": np.zeros((2, 32, 48, 3), np.uint8)}, "init_memory"),
    ({"images": np.full((1, 32, 48, 3), np.nan, np.float32)}, "finite"),
    ({"images": np.full((1, 32, 48, 3), -np.inf, np.float32)}, "finite"),
    ({"images": np.full((1, 32, 48, 3), 255, np.float32)}, "from 255 to 255"),
    ({"precision": "float8"}, "unknown precision"),
    ({"attention": "magic"}, "unknown attention"),
    ({"heads": "tail"}, "unknown heads"),
    ({"head": "both"}, "unknown option 'head'"),
    ({"fusion_divisor": 0.0}, "positive"),
  ],
)
def test_bad_input_is_refused(change, message):
  images = change.pop("images", np.zeros((1, 32, 48, 3), np.uint8))
  with pytest.raises(ValueError, match=message):
    p3r.step(
      micro.SCANNED, micro.scanned_params(), new_memory(), images, **change
    )


def test_what_belongs_to_another_model_is_refused():
  images, other = micro.images(1, 1)[0], micro.CONFIG.replace(pose_slots=5)
  with pytest.raises(ValueError, match="make that True"):
    p3r.step(micro.CONFIG, micro.scanned_params(), new_memory(), images)
  memory = p3r.init_memory(other, 1, micro.IMAGE_SIZE)
  with pytest.raises(ValueError, match="model of other sizes"):
    p3r.step(micro.SCANNED, micro.scanned_params(), memory, images)


@pytest.mark.slow
def test_types_stay_with_64_bits_enabled():
  images, resets = micro.images(2, 1), np.zeros((2, 1), bool)
  expected = scan(images, resets)
  with jax.enable_x64(True):
    got = scan(images, resets.tolist())
  chex.assert_trees_all_equal_dtypes(got, expected)
  chex.assert_trees_all_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
  "resets", [np.zeros((2, 2), bool), np.zeros((2, 1), np.int32)]
)
def test_resets_of_another_shape_or_type_are_refused(resets):
  with pytest.raises(ValueError, match=r"resets must be \(2, 1\) bool"):
    scan(micro.images(2, 1), resets)
