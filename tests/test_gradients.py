"""Gradients through the recurrent model."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import point3r_jax as p3r
from point3r_jax import streaming
from tests import micro


@pytest.mark.slow  # The published gradients are compared in tests/training.
def test_gradients_through_time_are_finite_and_equal_to_an_unrolled_loop():
  images = micro.images(4, 1)
  options = p3r.StepOptions(precision="float32", heads="world")

  def loss(prediction):
    leaves = [x for x in jax.tree.leaves(prediction) if x.dtype == jnp.float32]
    return sum(jnp.mean(jnp.square(x)) for x in leaves)

  @jax.jit
  @jax.grad
  def scanned(params):
    _, predictions = streaming.scan_fn(
      micro.CONFIG,
      options,
      params,
      p3r.init_memory(micro.CONFIG, 1, micro.IMAGE_SIZE),
      images,
      None,
    )
    return loss(predictions)

  # The loop goes back through time by hand, so that the step's gradient is
  # compiled once instead of four times.
  carried = ("position", "feature", "pose_slots", "image_position")

  def pick(memory):
    return {name: getattr(memory, name) for name in carried}

  @jax.jit
  def backward(params, memory, image, cotangent):
    def advance(params, floats):
      after, prediction = streaming.step_fn(
        micro.CONFIG, options, params, memory.replace(**floats), image
      )
      return pick(after), loss(prediction) / len(images)

    _, pullback = jax.vjp(advance, params, pick(memory))
    return pullback((cotangent, 1.0))

  memories = [p3r.init_memory(micro.CONFIG, 1, micro.IMAGE_SIZE)]
  for image in images[:-1]:
    memory, _ = p3r.step(
      micro.CONFIG, micro.params(), memories[-1], image, heads="world"
    )
    memories.append(memory)
  cotangent = jax.tree.map(jnp.zeros_like, pick(memories[0]))
  looped = jax.tree.map(jnp.zeros_like, micro.params())
  for memory, image in zip(reversed(memories), images[::-1], strict=True):
    gradient, cotangent = backward(micro.params(), memory, image, cotangent)
    looped = jax.tree.map(jnp.add, looped, gradient)

  first = scanned(micro.params())
  chex.assert_tree_all_finite(first)
  largest = max(np.abs(x).max() for x in jax.tree.leaves(first))
  chex.assert_trees_all_close(first, looped, atol=1e-5 * largest, rtol=1e-5)
  # Features carry gradient between frames; parts without effect get none.
  assert np.abs(first["key_head"]["output"]["kernel"]).max() > 0
  last = first["decoder"]["layer_3"]["pointer_block"]
  assert not last["mlp"]["output"]["kernel"].any()
