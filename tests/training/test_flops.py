"""The count of arithmetic, against numbers worked out by hand."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from point3r_jax.training.flops import count_flops
from point3r_jax.training.sharding import AXES, make_mesh


def shape(*sizes):
  return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_products():
  x, w = shape(2, 3, 5), shape(5, 7)
  assert count_flops(jnp.matmul, x, w) == 2 * (2 * 3) * 5 * 7
  batched = functools.partial(jnp.einsum, "bij,bjk->bik")
  assert count_flops(batched, x, shape(2, 5, 7)) == 2 * 2 * 3 * 5 * 7


def test_what_nothing_reads_does_not_count():
  def first(x, w):
    return jnp.matmul(x, w), jnp.matmul(x, w[:, :2])

  x, w = shape(3, 5), shape(5, 7)
  assert count_flops(first, x, w) == 2 * 3 * 5 * (7 + 2)
  assert count_flops(lambda *xs: first(*xs)[0], x, w) == 2 * 3 * 5 * 7


def test_scans_count_as_often_as_they_run():
  def power(x):
    def inner(y, _):
      return y @ x, None

    def outer(y, _):
      return jax.lax.scan(jax.checkpoint(inner), y, length=3)

    return jax.lax.scan(outer, x, length=5)[0]

  assert count_flops(jax.jit(power), shape(4, 4)) == 5 * 3 * 2 * 4**3


def test_what_each_device_does_counts_for_all():
  split = PartitionSpec(AXES)
  with jax.set_mesh(make_mesh(2, 4)):
    product = jax.shard_map(
      jnp.matmul, in_specs=(split, PartitionSpec()), out_specs=split
    )
    count = count_flops(product, shape(16, 3), shape(3, 5))
  assert count == 2 * 16 * 3 * 5


# What a row of 5 pixels and a row of 3 weights have in common, by hand.
CONVOLUTIONS = {
  "same": ({"padding": "SAME"}, 2 + 3 + 3 + 3 + 2),
  "valid": ({"padding": "VALID"}, 3 * 3),
  "strided": ({"padding": "SAME", "window_strides": (2, 2)}, 2 + 3 + 2),
  "dilated": ({"padding": "VALID", "rhs_dilation": (2, 2)}, 3),
  # Each input pixel meets each weight: 2 weights beyond the edge on each side.
  "transposed": ({"padding": [(2, 2)] * 2, "lhs_dilation": (2, 2)}, 5 * 3),
  "groups": ({"padding": "VALID", "feature_group_count": 4}, 3 * 3),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions(case):
  options, row = CONVOLUTIONS[case]
  options = {"window_strides": (1, 1), **options}
  groups = options.get("feature_group_count", 1)

  def convolve(x, kernel):
    return jax.lax.conv_general_dilated(
      x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
    )

  def total(x, kernel):
    return convolve(x, kernel).sum()

  x, kernel = shape(6, 5, 5, 8), shape(3, 3, 8 // groups, 12)
  forward = 2 * 6 * (8 // groups) * 12 * row**2
  assert count_flops(convolve, x, kernel) == forward
  # The gradient of each operand pairs the same inputs and weights.
  gradient = jax.value_and_grad(total, argnums=(0, 1))
  assert count_flops(gradient, x, kernel) == 3 * forward


def test_training_takes_three_forward_passes_less_the_first_gradient():
  def loss(layers, x):
    for layer in layers:
      x = jax.nn.relu(x @ layer)
    return jnp.sum(x**2)

  layers, x = (shape(8, 16), shape(16, 4)), shape(10, 8)
  first, second = 2 * 10 * 8 * 16, 2 * 10 * 16 * 4
  assert count_flops(loss, layers, x) == first + second
  gradient = jax.value_and_grad(loss)
  # No one asks for the gradient of x.
  assert count_flops(gradient, layers, x) == 3 * (first + second) - first
