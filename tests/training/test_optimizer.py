"""The optimiser against its formulas, on trees small enough to follow."""

import collections
import math

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import strategies as st

from point3r_jax.config import ModelConfig, preset
from point3r_jax.convert.names import weight_table
from point3r_jax.params import merge, stack_layers
from point3r_jax.training.optimizer import (
  OPTIMIZERS,
  OptimizerOptions,
  decay_mask,
  learning_rate,
  make_optimizer,
  split_frozen,
)
from point3r_jax.training.sharding import make_mesh
from point3r_jax.training.state import StateMaker
from tests import goldens


def toy_params(seed: int = 0, scale: float = 1.0) -> dict:
  rng = np.random.default_rng(seed)
  shapes = {
    "encoder": {"patch_embed": {"kernel": (4, 3), "bias": (3,)}},
    "value_encoder": {"norm": {"scale": (3,), "bias": (3,)}},
    "pose_token": (3,),
  }
  return jax.tree.map(
    lambda shape: rng.normal(0, scale, shape).astype(np.float32),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def test_learning_rate_is_that_of_stage_1_where_it_can_be_worked_out():
  rate = learning_rate(OptimizerOptions(), steps_per_epoch=100)
  by_epoch = {
    0: 0.0,
    1: 1e-5,  # A fifth of the warm-up.
    4.99: 4.99e-5,
    5: 5e-5,
    28.75: 1e-6 + 4.9e-5 * (1 + 0.5**0.5) / 2,  # A quarter of the cosine.
    52.5: 2.55e-5,  # Half of it.
    100: 1e-6,
    120: 1e-6,
  }
  steps = jnp.array([round(100 * epoch) for epoch in by_epoch])
  np.testing.assert_allclose(rate(steps), list(by_epoch.values()), rtol=1e-5)


def test_learning_rate_without_warm_up_starts_at_its_highest():
  options = OptimizerOptions(epochs=2.0, warmup_epochs=0.0)
  rate = learning_rate(options, 10)
  np.testing.assert_allclose(
    rate(jnp.array([0, 10, 20])), [5e-5, 2.55e-5, 1e-6]
  )


@hypothesis.given(
  epochs=st.floats(1, 20),
  warmup=st.floats(0, 1),
  steps_per_epoch=st.integers(1, 10),
  accumulate=st.integers(1, 4),
)
@hypothesis.settings(deadline=None, max_examples=30)
def test_learning_rate_rises_then_falls_by_epochs_whatever_an_update_takes(
  epochs, warmup, steps_per_epoch, accumulate
):
  options = {"lr": 1e-2, "min_lr": 1e-4, "epochs": epochs}
  options["warmup_epochs"] = warmup * epochs
  updates = np.arange(64)
  rate = learning_rate(OptimizerOptions(**options), steps_per_epoch)
  rates = np.asarray(rate(updates))
  rising = updates < warmup * epochs * steps_per_epoch
  assert np.all(np.diff(rates[rising]) > 0)
  assert np.all(np.diff(rates[~rising]) <= 0)
  assert np.all(rates[~rising] >= 0.999e-4) and np.all(rates <= 1.001e-2)

  # An update of several batches has the rate of the first of them.
  options["accumulate"] = accumulate
  by_update = learning_rate(OptimizerOptions(**options), steps_per_epoch)
  first = updates[: 64 // accumulate] * accumulate
  got = np.asarray(by_update(updates))[: len(first)]
  np.testing.assert_allclose(got, rates[first], rtol=1e-3, atol=1e-7)


def test_updates_are_those_of_adamw_behind_a_clip():
  options = OptimizerOptions(
    lr=0.1,
    min_lr=0.01,
    epochs=2.0,
    warmup_epochs=0.5,
    eps=1e-3,
    weight_decay=0.5,
    clip_norm=2.0,
  )
  decays = {"kernel": 0.5, "pose_token": 0.5, "bias": 0.0, "scale": 0.0}
  optimizer = make_optimizer(options, 4)
  rates = learning_rate(options, 4)(jnp.arange(8))
  params, update = toy_params(), jax.jit(optimizer.update)
  state = optimizer.init(params)
  want = {k: np.float64(x) for k, x in flatten_dict(params).items()}
  mean = {path: 0.0 for path in want}
  square = dict(mean)
  clipped = []
  for step in range(8):
    # Every other gradient is longer than the clip.
    gradient = toy_params(step, scale=(1 + step % 2) / 3)
    updates, state = update(gradient, state, params)
    params = optax.apply_updates(params, updates)

    flat = {k: np.float64(x) for k, x in flatten_dict(gradient).items()}
    norm = np.sqrt(sum(np.sum(x**2) for x in flat.values()))
    clipped.append(norm > options.clip_norm)
    for path, x in flat.items():
      x = x * min(1.0, options.clip_norm / norm)
      mean[path] = 0.9 * mean[path] + 0.1 * x
      square[path] = 0.95 * square[path] + 0.05 * x**2
      direction = (mean[path] / (1 - 0.9 ** (step + 1))) / (
        np.sqrt(square[path] / (1 - 0.95 ** (step + 1))) + 1e-3
      )
      decay = decays[path[-1]] * want[path]
      want[path] = want[path] - float(rates[step]) * (direction + decay)
  assert any(clipped) and not all(clipped)
  chex.assert_trees_all_close(flatten_dict(params), want, rtol=1e-5, atol=1e-6)


def muon_options(**changes) -> OptimizerOptions:
  return OptimizerOptions(
    name="muon", lr=0.1, warmup_epochs=0.0, clip_norm=1e6, **changes
  )


def test_muons_updates_are_orthogonal_and_as_large_as_adams():
  """All singular values of an update are alike, and all sizes as in 2.2."""
  rng = np.random.default_rng(0)
  params = {
    "tall": {"kernel": rng.normal(size=(96, 24)), "bias": rng.normal(size=24)},
    "layers": {"kernel": rng.normal(size=(3, 16, 64))},
    "convolution": {"kernel": rng.normal(size=(3, 3, 4, 4))},
    "slots": rng.normal(size=(16, 8)),
  }
  params = jax.tree.map(np.float32, params)
  gradient = jax.tree.map(
    lambda x: np.float32(rng.normal(size=x.shape)), params
  )
  optimizer = make_optimizer(muon_options(weight_decay=0.0), 10)
  state = jax.jit(optimizer.init)(params)
  updates, _ = jax.jit(optimizer.update)(gradient, state, params)
  for name, wide in (("tall", 96), ("layers", 64)):
    values = np.linalg.svd(updates[name]["kernel"], compute_uv=False)
    values = values / (0.1 * 0.2 * wide**0.5)
    # Muon's iteration leaves them between 0.7 and 1.2.
    assert values.min() > 0.65 and values.max() < 1.25, name
    turned = np.sum(updates[name]["kernel"] * gradient[name]["kernel"])
    assert turned < 0, name

  options = OptimizerOptions(
    lr=0.1, warmup_epochs=0.0, clip_norm=1e6, weight_decay=0.0
  )
  adamw = make_optimizer(options, 10)
  state = jax.jit(adamw.init)(params)
  want, _ = jax.jit(adamw.update)(gradient, state, params)
  for tree in (want, updates):
    del tree["tall"]["kernel"], tree["layers"]
  chex.assert_trees_all_close(updates, want, rtol=1e-6)


def test_muon_is_the_same_for_layers_stacked_and_one_by_one():
  rng = np.random.default_rng(0)
  params = {
    f"layer_{i}": {"kernel": rng.normal(size=(8, 12)), "bias": np.ones(12)}
    for i in range(3)
  }
  params = jax.tree.map(np.float32, params)
  gradient = jax.tree.map(
    lambda x: np.float32(rng.normal(size=x.shape)), params
  )

  def stack(tree):
    return {"layers": jax.tree.map(lambda *x: np.stack(x), *tree.values())}

  @jax.jit
  def update(gradient, params):
    optimizer = make_optimizer(muon_options(), 10)
    return optimizer.update(gradient, optimizer.init(params), params)[0]

  single = update(gradient, params)
  params, gradient = stack(params), stack(gradient)
  stacked = update(gradient, params)
  chex.assert_trees_all_close(stacked, stack(single), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_moments_live_where_their_parameters_do(name, accumulate):
  mesh = make_mesh(1, 8)
  options = OptimizerOptions(name=name, accumulate=accumulate)
  maker = StateMaker(make_optimizer(options, 10), options, mesh)
  params = {
    "dense": {"kernel": np.ones((512, 256), np.float32)},
    "convolution": {"kernel": np.ones((3, 3, 128, 128), np.float32)},
    "norm": {"scale": np.ones(256, np.float32)},
  }
  state = maker.init(params)
  split = jax.tree.map(lambda x: x.sharding.spec, state.params)
  sizes = collections.Counter(
    (x.shape, x.sharding.spec) for x in jax.tree.leaves(state.opt_state)
  )
  first_moments_only = name == "muon"
  accumulated = accumulate > 1
  for path, leaf in flatten_dict(params).items():
    matrix = path == ("dense", "kernel")
    copies = 2 - (first_moments_only and matrix) + accumulated
    spec = flatten_dict(split)[path]
    assert sizes[leaf.shape, spec] == copies, path
    assert ("fsdp" in spec) == (leaf.size >= 2**16), path


def test_an_unknown_optimizer_is_refused():
  with pytest.raises(ValueError, match=r"unknown optimizer 'adam'.*'muon'"):
    OptimizerOptions(name="adam")


def test_what_decays_is_what_decays_in_the_published_training():
  """There, all but one-dimensional tensors and biases, by their names."""
  shapes = goldens.manifest("full")
  published = {
    weight.path: len(shapes[weight.name]) > 1
    and not weight.name.endswith(".bias")
    for weight in weight_table(ModelConfig())
  }
  want = unflatten_dict({k: np.asarray(x) for k, x in published.items()})
  assert flatten_dict(decay_mask(want)) == published
  assert want["pose_token"] and want["pose_memory"]["slots"]

  # Stacked biases have two dimensions, and still do not decay.
  stacked = stack_layers(want)
  mask = flatten_dict(decay_mask(stacked))
  assert len(mask) < len(published)
  for path, decays in flatten_dict(stacked).items():
    assert (decays == mask[path]).all(), path


def test_two_batches_accumulated_are_one_batch_of_both():
  rng = np.random.default_rng(0)
  inputs, targets = rng.normal(0, 1, (3, 8, 4)), rng.normal(0, 1, (3, 8, 2))
  start = {"kernel": rng.normal(0, 1, (4, 2)).astype(np.float32)}
  common = {"lr": 0.1, "min_lr": 0.01, "epochs": 3.0, "warmup_epochs": 1.0}

  def loss(params, x, y):
    return jnp.mean((x @ params["kernel"] - y) ** 2)

  def train(optimizer, batches):
    @jax.jit
    def update(params, state, x, y):
      gradient = jax.grad(loss)(params, x, y)
      updates, state = optimizer.update(gradient, state, params)
      return optax.apply_updates(params, updates), state

    params, state = start, optimizer.init(start)
    for x, y in batches:
      params, state = update(params, state, x, y)
      yield params

  whole = make_optimizer(OptimizerOptions(**common), 1)
  halves = make_optimizer(OptimizerOptions(**common, accumulate=2), 2)
  want = list(train(whole, zip(inputs, targets, strict=True)))
  got = list(
    train(
      halves,
      zip(inputs.reshape(6, 4, 4), targets.reshape(6, 4, 2), strict=True),
    )
  )
  assert not np.allclose(want[-1]["kernel"], start["kernel"], atol=1e-2)
  chex.assert_trees_all_close(got[1::2], want, rtol=1e-5)
  # In between, nothing moves: not even by weight decay.
  chex.assert_trees_all_equal(got[::2], [start, *got[1:-1:2]])


@pytest.mark.parametrize(
  ("freeze", "count"),
  [((), 0), (("encoder/",), 2), (("encoder/.*bias", "pose"), 2), ((".*",), 5)],
)
def test_merge_undoes_the_split(freeze, count):
  params = toy_params()
  trained, frozen = split_frozen(params, freeze)
  assert len(jax.tree.leaves(frozen)) == count
  assert not flatten_dict(trained).keys() & flatten_dict(frozen).keys()
  chex.assert_trees_all_equal(merge(trained, frozen), params)


def test_what_matches_nothing_cannot_be_frozen():
  with pytest.raises(ValueError, match="path starts with 'norm/'"):
    split_frozen(toy_params(), ("encoder/", "norm/"))


def test_stage_3_freezes_the_image_encoder_and_nothing_else():
  table = weight_table(preset("small"))
  params = unflatten_dict({w.path: np.zeros(1) for w in table})
  _, frozen = split_frozen(params, ("encoder/",))
  image_encoder = ("patch_embed.", "enc_blocks.", "enc_norm.")
  assert flatten_dict(frozen).keys() == {
    w.path for w in table if w.name.startswith(image_encoder)
  }
  stacked = stack_layers(params)
  _, frozen = split_frozen(stacked, ("encoder/",))
  chex.assert_trees_all_equal(frozen, {"encoder": stacked["encoder"]})


def test_what_is_frozen_has_no_optimiser_state_and_no_average():
  options = OptimizerOptions(freeze=("encoder/",), ema_decay=0.9)
  mesh = make_mesh(1, 1, devices=jax.devices()[:1])
  maker = StateMaker(make_optimizer(options, 10), options, mesh)
  state = maker.init(toy_params())
  assert "encoder" in state.params and "encoder" not in state.ema
  moments = state.opt_state[1][0]
  trained = {"value_encoder", "pose_token"}
  assert moments.mu.keys() == moments.nu.keys() == trained


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"lr": -1.0}, "lr is -1.0; it must be above 0"),
    ({"lr": math.nan}, "lr is nan"),
    ({"min_lr": 1.0}, r"min_lr is 1.0; it must be in \[0, lr = 5e-05\]"),
    ({"epochs": 4.0}, r"warmup_epochs is 5.0; .* \[0, epochs = 4.0\]"),
    ({"warmup_epochs": -1.0}, "warmup_epochs is -1.0"),
    ({"weight_decay": -0.1}, "weight_decay is -0.1; it must be at least 0"),
    ({"b1": 1.5}, r"b1 is 1.5; it must be in \[0, 1\)"),
    ({"b2": 1.0}, "b2 is 1.0"),
    ({"eps": 0.0}, "eps is 0.0"),
    ({"clip_norm": 0.0}, "clip_norm is 0.0; it must be above 0"),
    ({"accumulate": 0}, "accumulate is 0; it must be at least 1"),
    ({"ema_decay": 1.0}, r"ema_decay is 1.0; it must be in \[0, 1\)"),
  ],
)
def test_numbers_without_meaning_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    OptimizerOptions(**changes)
