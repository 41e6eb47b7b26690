"""Kernels of ours and of cuDNN on a GPU, against XLA's; run with `-m gpu`."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from point3r_jax.models import dpt, gelus, hopper_attention_gradient, norms
from point3r_jax.models import parts as parts_module
from point3r_jax.models.attention import attention
from point3r_jax.models.hopper_attention import quickest
from point3r_jax.models.layers import query_key_value
from point3r_jax.models.linear import Factors
from point3r_jax.models.map_kernels import MAP_CHANNELS
from point3r_jax.models.parts import take_apart
from point3r_jax.models.rotary import rotary_2d, rotary_3d

pytestmark = pytest.mark.gpu


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
  ("batch", "tokens", "computing", "blocks"),
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
  batch, tokens, computing, blocks, head_dim
):
  """Within one and several blocks of keys; the same results each time."""
  form = quickest(hopper_attention_gradient.FORMS, 16 * batch, tokens[1])
  assert (form.computing, form.tasks(tokens[1])) == (computing, blocks)
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
  """Few and many queries: blocks of two, three and five, and such that stay."""
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
  keys = jax.random.split(jax.random.key(0), 4)
  x = jax.random.normal(keys[0], shape, jnp.bfloat16)
  bias = jax.random.normal(keys[1], shape[-1:], jnp.bfloat16)
  kernel = jax.random.normal(keys[2], (shape[-1], 4))
  gradient = jax.random.normal(keys[3], (*shape[:-1], 4))

  def run():
    def both(x, bias, kernel, gradient):
      result, pullback = jax.vjp(dpt._read_out, x, bias, kernel)
      return result, *pullback(gradient)

    return jax.jit(both)(x, bias, kernel, gradient)

  assert dpt.suit_rows(shape, jnp.bfloat16, MAP_CHANNELS)
  assert_as_xla_does(run, monkeypatch, dpt)


@pytest.mark.parametrize(
  "shape", [(1, 8, 1, 128), (2, 12, 18, 256), (3, 192, 256, 128)]
)
def test_maps_doubled_equal_xla(monkeypatch, shape):
  keys = jax.random.split(jax.random.key(0), 2)
  x = jax.random.normal(keys[0], shape, jnp.bfloat16)
  batch, height, width, channels = shape
  doubled = batch, 2 * height, 2 * width, channels
  gradient = jax.random.normal(keys[1], doubled, jnp.bfloat16)

  def run():
    def both(x, gradient):
      result, pullback = jax.vjp(dpt.upsample, x)
      return result, *pullback(gradient)

    return jax.jit(both)(x, gradient)

  assert dpt.suit_rows(shape, jnp.bfloat16, MAP_CHANNELS)
  assert_as_xla_does(run, monkeypatch, dpt)


def draw_parts(batch, grid, heads):
  """Returns parts of a product, and gradients of each."""
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
  gradients = [
    jax.random.normal(
      key, (batch, tokens, part.heads, width // part.heads), jnp.bfloat16
    )
    for key, part in zip(keys[2:], parts, strict=False)
  ]
  return parts, gradients


@pytest.mark.parametrize(
  ("batch", "grid", "heads"), [(80, (10, 20), (16,)), (3, (7, 8), (12, 16))]
)
@pytest.mark.parametrize("made", [False, True])
def test_products_taken_apart_equal_xla(monkeypatch, batch, grid, heads, made):
  """After they were made, and as they are: the same each time."""
  parts, gradients = draw_parts(batch, grid, heads)
  width = gradients[0].shape[2] * gradients[0].shape[3]
  columns, keys = len(parts) * width, jax.random.split(jax.random.key(1), 2)
  bias = jnp.ones(columns, jnp.bfloat16)
  channels = width if made else columns
  shape = batch, grid[0] * grid[1], channels
  x = jax.random.normal(keys[0], shape, bias.dtype)
  operands = [x, bias]
  if made:
    kernel = jax.random.normal(keys[1], (width, columns)) / width**0.5
    operands.append(kernel.astype(x.dtype))

  def take(x, bias, kernel=None):
    y = x if kernel is None else Factors(x, kernel, x.dtype)
    return take_apart(y, bias, x.dtype, parts=parts)

  def run():
    def both(operands, gradients):
      taken, pullback = jax.vjp(take, *operands)
      return taken, pullback(gradients)

    return jax.jit(both)(operands, gradients)

  chosen = "_suit_product" if made else "suit_rows"
  if made:
    y = Factors(x, operands[2], x.dtype)
    assert parts_module._suit_product(y, x.dtype, parts, False)
  else:
    assert parts_module.suit_rows(x.shape, x.dtype)
  chex.assert_trees_all_equal(run(), run())
  assert_as_xla_does(run, monkeypatch, parts_module, chosen)
