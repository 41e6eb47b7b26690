"""Kernels over rows, interpreted, against XLA's forms of the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from point3r_jax.models import gelus, norms, row_kernels
from point3r_jax.models.gelus import add_bias_gelu
from point3r_jax.training.sharding import make_mesh
from tests.models.arrays import assert_close, draw

CHANNELS = 768  # Two parts, as it is no power of two.


@pytest.fixture
def interpreted(monkeypatch):
  """Lets norms and GELUs take the kernels, on a CPU."""
  for module, names in (
    (norms, ("normalize_rows", "normalize_rows_gradient")),
    (gelus, ("gelu_gradient",)),
  ):
    for name in names:
      kernel = functools.partial(getattr(row_kernels, name), interpret=True)
      monkeypatch.setattr(module, name, kernel)
    monkeypatch.setattr(module, "suit_rows", suit_rows)


def suit_rows(shape, _, width=256):
  return shape[-1] % width == 0


def normalize(x, biases=(None, None)):
  return norms._normalize(x, biases, jnp.bfloat16)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_norms_by_rows(request, dtype):
  shape = (2, 12, CHANNELS)
  x = 3 + 2 * draw(0, shape, dtype)
  gradients = draw(1, shape), draw(2, shape, dtype)

  def run():
    result, pullback = jax.vjp(normalize, x)
    return result, pullback(gradients)

  expected = run()
  request.getfixturevalue("interpreted")
  assert_close(run(), expected, atol=1e-5)


# A block of them, several, and a last one that is not whole.
@pytest.mark.parametrize("rows", [8, 64, 200])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("channels", [CHANNELS, 2 * CHANNELS])
def test_norms_by_rows_sum_gradients_of_biases(
  request, monkeypatch, rows, wanted, channels
):
  """Of parts that are summed at once, too, which the wider rows have."""
  monkeypatch.setattr(row_kernels, "_NORM_BLOCKS", 3)
  shape = (1, rows, channels)
  x, types = draw(0, shape), (jnp.float32, jnp.bfloat16)
  biases = tuple(
    draw(number, (channels,), dtype) if want else None
    for number, (want, dtype) in enumerate(zip(wanted, types, strict=True))
  )
  gradients = draw(1, shape), draw(2, shape)

  def run():
    result, pullback = jax.vjp(normalize, x, biases)
    return result, *pullback(gradients)

  result, of_x, of_biases = run()
  request.getfixturevalue("interpreted")
  again, of_x_again, of_biases_again = run()
  assert_close((again, of_x_again), (result, of_x), atol=1e-5)
  expected = tuple(
    bias if bias is None else np.float32(x).sum((0, 1)).astype(bias.dtype)
    for bias, x in zip(biases, (of_x, gradients[1]), strict=True)
  )
  # Rows of a gradient are rounded before XLA sums them, or after.
  for found in (of_biases, of_biases_again):
    assert_close(found, expected, atol=0.2)


@pytest.mark.usefixtures("interpreted")
def test_devices_of_a_mesh_share_the_rows_that_are_summed():
  x, gradient = draw(0, (8, 40, CHANNELS)), draw(1, (8, 40, CHANNELS))
  biases = draw(2, (CHANNELS,)), draw(3, (CHANNELS,))

  @jax.jit
  def gradients(x, biases):
    return jax.vjp(normalize, x, biases)[1]((gradient, gradient))

  expected = gradients(x, biases)
  with jax.set_mesh(make_mesh(2, 4)):
    found = gradients(x, biases)
  assert_close(found, expected, atol=1e-5)


@pytest.mark.parametrize("rows", [8, 64, 200])
def test_gelus_by_rows(request, rows):
  shape = (1, rows, CHANNELS)
  y, bias, gradient = 3 * draw(0, shape), draw(1, (CHANNELS,)), draw(2, shape)

  def run():
    result, pullback = jax.vjp(
      lambda y, bias: add_bias_gelu(y, bias, jnp.bfloat16), y, bias
    )
    return result, pullback(gradient)

  expected = run()
  request.getfixturevalue("interpreted")
  assert_close(run(), expected, atol=0.05)


@pytest.mark.usefixtures("interpreted")
def test_rows_of_a_device_that_are_not_in_eights_are_refused():
  """They would be left out."""
  x = draw(0, (8, 6, CHANNELS))
  with jax.set_mesh(make_mesh(2, 4)), pytest.raises(ValueError, match="got 6"):
    jax.jit(normalize)(x)


@pytest.mark.parametrize(
  ("shape", "dtype", "suits"),
  [
    ((2, 4, 256), jnp.bfloat16, True),
    ((2, 4, 256), jnp.float32, False),
    ((3, 4, 256), jnp.bfloat16, False),
    ((2, 4, 128), jnp.bfloat16, False),
  ],
)
def test_rows_that_suit(monkeypatch, shape, dtype, suits):
  assert not row_kernels.suit_rows(shape, dtype)  # A CPU has no kernels.
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  device = type("Device", (), {"compute_capability": "9.0"})
  monkeypatch.setattr(jax, "devices", lambda: [device])
  assert row_kernels.suit_rows(shape, dtype) == suits
  assert row_kernels.suit_rows((8, 128), jnp.bfloat16, 128)
  for other in ("7.5", "gfx942"):
    device.compute_capability = other
    assert not row_kernels.suit_rows(shape, dtype)


def test_blocks_that_count_are_added():
  blocks = draw(0, (5, 3, 24, 512))
  counts, lengths = (jnp.array(x, jnp.int32) for x in ((1, 5, 3), (24, 3, 16)))
  unread = jnp.arange(5)[:, None] >= counts
  poisoned = jnp.where(unread[..., None, None], jnp.nan, blocks)
  found = row_kernels.add_blocks(poisoned, counts, lengths, interpret=True)
  total = jnp.where(unread[..., None, None], 0, blocks).astype(jnp.float32)
  valid = jnp.arange(24) < lengths[:, None]
  expected = jnp.where(valid[..., None], total.sum(axis=0), 0)
  assert_close(found, expected.astype(jnp.bfloat16), 1e-2)
  assert not found[1, 3:].any() and not found[2, 16:].any()
