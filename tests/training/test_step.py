"""A training step learns, and skips what is not finite."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from point3r_jax.params import stack_layers
from point3r_jax.training.optimizer import make_optimizer
from point3r_jax.training.sharding import make_mesh
from point3r_jax.training.state import StateMaker
from point3r_jax.training.step import train_step
from tests import micro
from tests.training import batches

CONFIG = batches.step_config()


@pytest.fixture(scope="module")
def steps():
  """Returns the first state, and the jitted step."""
  optimizer = make_optimizer(CONFIG.optimizer, CONFIG.steps_per_epoch)
  mesh = make_mesh(1, 1, devices=jax.devices()[:1])
  maker = StateMaker(optimizer, CONFIG.optimizer, mesh)
  params = jax.tree.map(np.asarray, stack_layers(micro.params()))
  step = jax.jit(functools.partial(train_step, CONFIG, optimizer))
  return maker.init(params), step


def test_steps_lower_the_loss(steps):
  state, step = steps
  batch, losses = batches.batch(2, 2), []
  for _ in range(6):
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss"]))
  assert losses[-1] < losses[0] - 0.1
  assert int(state.step) == 6 and not int(state.skipped)
  assert metrics["pointers"] > micro.TOKENS
  np.testing.assert_allclose(metrics["lr"], 8.5e-4, rtol=0.02)


def test_batches_that_are_not_finite_change_nothing_but_the_counts(steps):
  start, step = steps
  good, bad = batches.batch(2, 2), batches.batch(2, 2)
  bad["camera_to_world"][0, 1, 0, 3] = np.nan
  state, metrics = step(start, bad)
  assert not np.isfinite(metrics["loss"])
  chex.assert_trees_all_equal(
    (state.params, state.opt_state), (start.params, start.opt_state)
  )
  state, _ = step(state, bad)
  assert (int(state.step), int(state.skipped), int(state.streak)) == (2, 2, 2)
  state, metrics = step(state, good)
  assert (int(state.skipped), int(state.streak)) == (2, 0)
  after, _ = step(start, good)
  chex.assert_trees_all_equal(
    state.opt_state[1][0].mu, after.opt_state[1][0].mu
  )


def test_the_order_of_a_batch_does_not_matter(steps):
  state, step = steps
  batch = batches.batch(2, 2)
  swapped = jax.tree.map(lambda x: x[::-1], batch)
  one, other = step(state, batch)[1], step(state, swapped)[1]
  assert jnp.isclose(one["loss"], other["loss"], rtol=1e-5)
