"""The rollout: the same function as a scan, differentiated as published."""

import dataclasses
import itertools
import json

import chex
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import point3r_jax as p3r
from point3r_jax.convert.names import weight_table
from point3r_jax.losses import LossOptions, point3r_loss
from point3r_jax.params import (
  fold_norms,
  join_products,
  merge,
  param_shapes,
  stack_layers,
  unstack_layers,
)
from point3r_jax.streaming import StepOptions
from point3r_jax.training import rollout as rollout_module
from point3r_jax.training.flops import count_flops
from point3r_jax.training.optimizer import split_frozen
from point3r_jax.training.rollout import RolloutOptions, rollout, segments
from tests import goldens, micro

CONFIG = micro.SCANNED
STEP = StepOptions(precision="float32")


def assert_close(one, other, tolerance=1e-5):
  """Compares trees, to a share of the largest number in them."""
  largest = max(np.abs(x).max() for x in jax.tree.leaves(other))
  chex.assert_trees_all_close(
    one, other, rtol=tolerance, atol=tolerance * largest
  )


@pytest.mark.parametrize(
  ("frames", "capacity", "sizes", "expected"),
  [
    (6, 20, 8, [(0, 2, 6), (2, 3, 12), (3, 4, 18), (4, 6, 20)]),
    (6, 20, 2, [(0, 3, 12), (3, 6, 20)]),
    (6, 20, 1, [(0, 6, 20)]),
    (64, 24, 8, [(0, 2, 6), (2, 3, 12), (3, 4, 18), (4, 64, 24)]),
    (1, 6, 3, [(0, 1, 6)]),
  ],
)
def test_segments_hold_what_may_be_there(frames, capacity, sizes, expected):
  assert list(segments(frames, 6, capacity, sizes)) == expected


@pytest.mark.parametrize(
  ("fusion", "other"),
  [
    (True, {}),
    pytest.param(False, {}, marks=pytest.mark.slow),
    pytest.param(True, {"unroll": 3}, marks=pytest.mark.slow),
    pytest.param(True, {"remat_frames": True}, marks=pytest.mark.slow),
  ],
)
def test_rollout_is_the_scan(fusion, other):
  images = micro.images(4, 2)
  memory = p3r.init_memory(micro.CONFIG, 2, micro.IMAGE_SIZE, 24)
  expected = p3r.scan(
    micro.CONFIG, micro.params(), memory, images, fusion=fusion
  )
  step = dataclasses.replace(STEP, fusion=fusion)
  options = RolloutOptions(step, sizes=2, **other)
  run = jax.jit(lambda params: rollout(CONFIG, options, params, batch))
  batch = images.swapaxes(0, 1)
  result = run(stack_layers(micro.params()))
  chex.assert_trees_all_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", ["both", "camera", "world"])
def test_rollout_gives_the_maps_asked_for(heads):
  options = RolloutOptions(dataclasses.replace(STEP, heads=heads), sizes=1)
  images = jnp.zeros((2, 3, *micro.IMAGE_SIZE, 3), jnp.uint8)
  _, prediction = jax.eval_shape(
    lambda params: rollout(CONFIG, options, params, images),
    stack_layers(micro.params()),
  )
  shape = (3, 2, *micro.IMAGE_SIZE)
  for frame in ("camera", "world"):
    wanted = heads in ("both", frame)
    points = getattr(prediction, f"points_{frame}")
    confidence = getattr(prediction, f"confidence_{frame}")
    assert (points is not None) == (confidence is not None) == wanted
    if wanted:
      chex.assert_shape((points, confidence), ((*shape, 3), shape))


def mean_square(predictions) -> jax.Array:
  """A loss that is a sum over frames of what each of them predicts."""
  points = predictions.points_world, predictions.points_camera
  return sum(jnp.sum(jnp.square(x)) / x[0].size for x in points)


def test_gradients_of_frames_are_added_to_the_left_of_their_sum():
  """As XLA wants it where they are products; frozen parameters have none."""
  frames = 4

  def total(trained, frozen):
    handed_out = rollout_module._hand_out({"a": trained, "b": frozen}, frames)
    return sum(jnp.sum(jnp.sin(own["a"]) * own["b"]) for own in handed_out)

  numbers = jnp.arange(3.0)
  jaxpr = jax.make_jaxpr(jax.grad(total))(numbers, numbers).jaxpr
  sums = [x for x in jaxpr.eqns if x.primitive.name in ("add", "add_any")]
  sums = [x for x in sums if x.outvars[0].aval.shape == (3,)]
  assert len(sums) == frames - 1
  for before, after in itertools.pairwise(sums):
    assert after.invars[1] is before.outvars[0]
  gradient = jax.grad(total)(numbers, numbers)
  np.testing.assert_allclose(gradient, frames * jnp.cos(numbers) * numbers)


def test_last_frame_makes_no_pointers():
  """Nothing reads them: neither they nor their gradients are computed."""
  options = RolloutOptions(dataclasses.replace(STEP, attention="xla"), unroll=2)
  images = jnp.zeros((2, 2, *micro.IMAGE_SIZE, 3), jnp.uint8)

  def count(value_depth):
    config = CONFIG.replace(value_depth=value_depth)

    def loss(params):
      return mean_square(rollout(config, options, params, images)[1])

    return count_flops(jax.grad(loss), param_shapes(config))

  tokens, width = 2 * micro.TOKENS, CONFIG.encoder_width
  # A block's linear maps, and products of queries, keys and values.
  block = 2 * tokens * (12 * width**2 + 2 * micro.TOKENS * width)
  assert count(2) - count(1) == 3 * block  # Forward and backward, of one frame.


@pytest.mark.slow
@pytest.mark.parametrize(
  ("remat", "other"),
  [
    ("blocks", {"sizes": 2, "unroll": 2}),
    ("elementwise", {"sizes": 2, "remat_frames": True}),
    ("none", {"sizes": 2, "unroll": 2}),
  ],
)
def test_gradients_are_those_of_the_scan(remat, other):
  """Whatever is kept, looped or computed again."""
  images = micro.images(4, 2)
  memory = p3r.init_memory(CONFIG, 2, micro.IMAGE_SIZE, 24)
  step = dataclasses.replace(STEP, remat=remat)
  options = RolloutOptions(step, capacity=24, **other)

  @jax.jit
  @jax.grad
  def expected(params):
    return mean_square(p3r.scan(CONFIG, params, memory, images)[1])

  @jax.jit
  @jax.grad
  def found(params):
    return mean_square(
      rollout(CONFIG, options, params, images.swapaxes(0, 1))[1]
    )

  params = stack_layers(micro.params())
  assert_close(found(params), expected(params), 1e-4)


@pytest.mark.slow
def test_truncation_is_two_halves_of_a_long_sequence():
  """T = 64 of the small model; a cut at 32 stops the gradient, nothing else."""
  options = RolloutOptions(STEP, capacity=24, remat_frames=True, sizes=1)
  cut = dataclasses.replace(options, truncate=32)
  images = micro.images(1, 64)
  config, params = goldens.seeded_params("small")
  config, params = config.replace(scan_layers=True), stack_layers(params)

  @jax.jit
  @jax.grad
  def whole(params):
    _, predictions = rollout(config, cut, params, images)
    return mean_square(predictions)

  @jax.jit
  def half(params, memory, images):
    def loss(params):
      after, predictions = rollout(config, options, params, images, memory)
      return mean_square(predictions), after

    return jax.grad(loss, has_aux=True)(params)

  memory = p3r.init_memory(config, 1, micro.IMAGE_SIZE, 24)
  first, memory = half(params, memory, images[:, :32])
  second, _ = half(params, memory, images[:, 32:])
  assert_close(whole(params), jax.tree.map(jnp.add, first, second), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "as_on_gpus"),
  [
    ("grad_small", False),
    ("grad_small", True),
    ("grad_small_frozen_encoder", False),
  ],
)
def test_weight_gradients_are_the_published_ones(name, as_on_gpus):
  """Norms and entries of every weight's gradient, with fusion, through time.

  On GPUs, too, where norms are part of linear maps, what reads the same is one
  product, and layers are written out.
  """
  with np.load(goldens.FOLDER / f"{name}.npz") as file:
    golden = dict(file)
  meta = json.loads(str(golden["meta"]))
  config, params = goldens.seeded_params("small", meta["salt"])
  config = config.replace(scan_layers=True)
  images = golden["images"].transpose(1, 0, 3, 4, 2)
  targets = goldens.loss_targets(golden, images.shape[1])
  freeze = () if meta["freeze"] == "none" else ("encoder/",)
  trained, frozen = split_frozen(stack_layers(params), freeze)
  step = dataclasses.replace(STEP, remat="elementwise" if as_on_gpus else None)
  options = RolloutOptions(step, sizes=1)

  @jax.jit
  @jax.value_and_grad
  def run(trained):
    model, params = config, merge(trained, frozen)
    if as_on_gpus:
      model = config.replace(scan_layers=False)
      params = join_products(unstack_layers(fold_norms(params)))
    _, prediction = rollout(model, options, params, images)
    return point3r_loss(prediction, targets, LossOptions())[0]

  loss, gradient = run(trained)
  np.testing.assert_allclose(loss, golden["loss"], rtol=1e-5)
  if freeze:
    gradient["encoder"] = jax.tree.map(np.zeros_like, frozen["encoder"])
  gradient = flax.traverse_util.flatten_dict(unstack_layers(gradient))
  norms = json.loads(str(golden["grad_norms"]))
  for weight in weight_table(config):
    found = np.asarray(weight.export(np.asarray(gradient[weight.path])))
    if norms[weight.name] is None:
      assert not found.any(), weight.name
      continue
    np.testing.assert_allclose(
      np.linalg.norm(found),
      norms[weight.name],
      rtol=1e-3,
      atol=1e-7,
      err_msg=weight.name,
    )
    entries = golden[f"grad/{weight.name}"]
    sampled = found.reshape(-1)[:: max(1, found.size // 16)][:16]
    np.testing.assert_allclose(
      sampled,
      entries,
      rtol=0,
      atol=1e-3 * np.abs(entries).max() + 1e-7,
      err_msg=weight.name,
    )
