"""The step as GPUs run it in 16 bits."""

import dataclasses

import jax
import numpy as np
import pytest

from point3r_jax.streaming import StepOptions
from point3r_jax.training.step import sequence_loss
from tests import micro
from tests.training import batches


@pytest.mark.parametrize("remat", [None, "none"])
def test_the_loss_in_bfloat16_needs_no_backward_pass(remat):
  config = batches.step_config()
  step = StepOptions(precision="bfloat16", remat=remat)
  config = dataclasses.replace(
    config, rollout=dataclasses.replace(config.rollout, step=step)
  )
  loss, _ = jax.eval_shape(
    lambda params: sequence_loss(config, params, batches.batch(1, 2)),
    micro.scanned_params(),
  )
  assert loss.shape == ()


@pytest.mark.parametrize(("remat", "joined"), [("none", 1), ("blocks", 0)])
def test_what_both_blocks_read_is_one_product_unless_it_would_be_kept(
  remat, joined
):
  config = batches.step_config({"precision": "bfloat16", "remat": remat})
  jaxpr = jax.make_jaxpr(
    lambda params: sequence_loss(config, params, batches.batch(1, 2))[0]
  )(micro.scanned_params())
  assert (f"{5 * micro.CONFIG.decoder_width}]" in str(jaxpr)) == joined


@pytest.mark.slow
def test_gradients_in_bfloat16_are_rounded_and_nothing_else():
  """With norms in linear maps, joined products, layers in a row, and remat."""
  exact = batches.step_config()
  step = StepOptions(precision="bfloat16", remat="elementwise")
  rounded = dataclasses.replace(
    exact,
    rollout=dataclasses.replace(exact.rollout, step=step),
    unroll_layers=True,
  )
  batch = batches.batch(2, 3)

  def gradient(config):
    @jax.jit
    @jax.grad
    def run(params):
      return sequence_loss(config, params, batch)[0]

    leaves = jax.tree.leaves(run(micro.scanned_params()))
    return np.concatenate([np.ravel(leaf) for leaf in leaves])

  expected = gradient(exact)
  error = np.linalg.norm(gradient(rounded) - expected)
  assert 0 < error < 0.05 * np.linalg.norm(expected)
