"""Kernels for attention: values, gradients, and over meshes."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec

from point3r_jax.models import attention as attention_module
from point3r_jax.models import hopper_attention, hopper_attention_gradient
from point3r_jax.models.attention import attention
from point3r_jax.training.sharding import make_mesh


def operands(batch, channels=16):
  rng = np.random.default_rng(0)
  query = rng.standard_normal((batch, 9, 2, channels), np.float32)
  key, value = rng.standard_normal((2, batch, 150, 2, channels), np.float32)
  return query, key, value, rng.integers(1, 150, batch, np.int32)


def gradient(implementation, **options):
  """Returns a gradient through frames, traced as `rollout` traces them."""

  def total(query, key, value, length):
    def frame(query, _):
      result = attention(
        query,
        key,
        value,
        key_length=length,
        implementation=implementation,
        **options,
      )
      return result, None

    with jax.default_matmul_precision("tensorfloat32"):
      return jnp.sum(jax.lax.scan(frame, query, length=2)[0] ** 3)

  return jax.jit(jax.grad(total, argnums=(0, 1, 2)))


def lowered_over_a_mesh(program, arrays, platform):
  """Returns a program's jaxpr and text, its arrays split over eight devices."""
  mesh = make_mesh(2, 4)
  split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  with jax.set_mesh(mesh):
    traced = program.trace(*jax.device_put(arrays, split))
  lowered = traced.lower(lowering_platforms=(platform,))
  return str(traced.jaxpr), lowered.as_text()


@pytest.mark.parametrize("tokens", [1, 127, 128, 300])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_blocks_of_queries(tokens, dtype):
  """Rows of blocks that hold no valid query are zero."""
  rng = np.random.default_rng(tokens)
  query = rng.standard_normal((2, tokens, 3, 8)).astype(dtype)
  key, value = rng.standard_normal((2, 2, 150, 3, 8)).astype(dtype)
  length, key_length = np.array([[tokens, 1], [1, 140]], np.int32)
  plain = jax.jit(
    functools.partial(jax.nn.dot_product_attention, implementation="xla")
  )
  expected = plain(query, key, value, key_value_seq_lengths=key_length)
  blocks = jax.jit(
    functools.partial(attention, query, key, value, implementation="blocks")
  )
  result = np.asarray(blocks(query_length=length, key_length=key_length))
  assert result.dtype == dtype
  near = {"atol": 1e-6 if dtype == np.float32 else 2e-2}
  np.testing.assert_allclose(
    result.astype(np.float32), np.asarray(expected, np.float32), **near
  )
  few = np.asarray(
    blocks(query_length=np.minimum(length, 100), key_length=key_length)
  )
  np.testing.assert_array_equal(few[:, :128], result[:, :128])
  assert not few[:, 128:].any()


@pytest.mark.parametrize("implementation", ["xla", "blocks", "tpu"])
@pytest.mark.parametrize("keys", [1, 150])
def test_values_may_be_among_other_heads(implementation, keys):
  query, key, value, length = operands(2)
  key, value, length = key[:, :keys], value[:, :keys], np.minimum(length, keys)
  run = jax.jit(
    functools.partial(
      attention, query, key, key_length=length, implementation=implementation
    ),
    static_argnames="value_head",
  )
  more = np.concatenate([key[:, :, :1], value, key], axis=2)
  with pltpu.force_tpu_interpret_mode():
    np.testing.assert_array_equal(run(more, value_head=1), run(value))


def test_blocks_have_derivatives():
  expected = gradient("xla")(*operands(2))
  result = gradient("blocks")(*operands(2))
  for x, y in zip(result, expected, strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize(
  ("tokens", "forward_only", "name"),
  [(129, True, "blocks"), (128, True, "xla"), (129, False, "xla")],
)
def test_a_cpu_takes_blocks_of_many_queries(tokens, forward_only, name):
  x = jnp.zeros((1, tokens, 1, 8))

  def jaxpr(**options):
    return str(jax.make_jaxpr(lambda x: attention(x, x, x, **options))(x))

  chosen = jaxpr(implementation="auto", forward_only=forward_only)
  assert ("while" in chosen) == (name == "blocks")
  assert ("while" in jaxpr(implementation=name)) == (name == "blocks")


@pytest.mark.slow
def test_the_tpu_kernels_gradient():
  expected = gradient("xla")(*operands(2))
  with pltpu.force_tpu_interpret_mode():
    result = gradient("tpu")(*operands(2))
  for x, y in zip(result, expected, strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5)


def test_a_mesh_splits_the_tpu_kernels_batch():
  program, text = lowered_over_a_mesh(gradient("tpu"), operands(8), "tpu")
  assert "tpu_custom_call" in text
  assert "tensor<1x2x128x16xf32>" in text  # One sample a device.
  # Float32 is float32 whatever the precision around, gradients included.
  products = program.count("dot_general[")
  assert program.count("precision=(Precision.HIGHEST") == products > 0


def test_a_mesh_splits_the_hopper_kernels_batch():
  *arrays, length = operands(8)
  arrays = [x.astype(jnp.bfloat16) for x in arrays]

  @jax.jit
  def run(query, key, value, length):
    return attention(
      query, key, value, key_length=length, implementation="hopper"
    )

  _, text = lowered_over_a_mesh(run, (*arrays, length), "cuda")
  assert "mosaic_gpu" in text
  # One sample a device; nine tokens are sixteen for the kernel.
  assert "tensor<1x16x2x16xbf16>" in text


def test_a_mesh_splits_the_batch_of_the_hopper_kernels_gradients():
  *arrays, length = operands(8)
  arrays = [x.astype(jnp.bfloat16) for x in arrays]
  _, text = lowered_over_a_mesh(gradient("hopper"), (*arrays, length), "cuda")
  calls = re.findall(r"custom_call @mosaic_gpu\S*\(.*", text)
  # One sample a device; nine tokens are sixteen for the kernels.
  forward = [call for call in calls if "-> (tensor<1x16x2x16xbf16>, " in call]
  backward = [call for call in calls if "-> (tensor<1x1x16x2x16xbf16>" in call]
  assert forward and backward
  assert len(forward) + len(backward) == len(calls)


@pytest.mark.parametrize(
  "form", [*hopper_attention._FORMS, *hopper_attention_gradient.FORMS]
)
def test_a_hopper_block_has_the_registers_that_it_asks_for(form):
  """More would be waited for without an end."""
  warpgroups = form.computing + 1
  at_first = 65536 // (128 * warpgroups) // 8 * 8
  computing, fetching = form.registers
  assert form.computing * computing + fetching <= warpgroups * at_first
  assert computing % 8 == fetching % 8 == 0


@pytest.mark.parametrize(
  ("heads", "queries", "channels", "computing"),
  [
    (16, 768, 64, 2),  # An image's tokens.
    (1280, 200, 64, 4),  # Those of small images, in training: one task each.
    (16, 2560, 48, 5),  # Pointers: 128 tasks are one turn of 132,
    (16, 2560, 64, 3),  # but registers do not hold larger heads;
    (16, 3072, 48, 3),  # 160 would be two.
    (128, 3840, 48, 3),
    (128, 2560, 48, 3),  # Of eight streams.
  ],
)
def test_hopper_blocks_that_take_the_least_time(
  heads, queries, channels, computing
):
  form = hopper_attention._choose(heads, queries, channels)
  assert form.computing == computing


@pytest.mark.parametrize(
  ("keys", "channels", "of_a_step"),
  [
    (776, 48, (112, 112, 64, 64)),  # Seven steps, 13 steps.
    (776, 64, (128, 128, 64, 64)),
    (2560, 48, (128, 128, 64, 64)),
    (8, 16, (16, 16, 16, 16)),
  ],
)
def test_hopper_steps_have_equal_shares_of_the_keys(keys, channels, of_a_step):
  forms = hopper_attention._FORMS
  found = [form.share(keys, channels) for form in forms]
  assert tuple(form.keys for form in found) == of_a_step
  for form, shared in zip(forms, found, strict=True):
    assert shared.keys <= form.keys
    assert -(-keys // shared.keys) == -(-keys // form.keys)


@pytest.mark.parametrize(
  ("batch", "channels", "training", "blocks"),
  [
    (16, 64, False, 256),
    (25, 64, False, 132),
    (25, 80, False, 800),  # Wide heads.
    (16, 64, True, 132),
    (2, 64, True, 64),
  ],
)
def test_hopper_blocks_stay_for_many_tasks(batch, channels, training, blocks):
  """In training if there are more than multiprocessors, else thrice as many."""
  operand = jax.ShapeDtypeStruct((batch, 200, 16, channels), jnp.bfloat16)
  length = jax.ShapeDtypeStruct((batch,), jnp.int32)
  kernel = functools.partial(
    hopper_attention.hopper_attention, keep_log_sum=training
  )
  program = str(jax.make_jaxpr(kernel)(*3 * [operand], *2 * [length]))
  assert f"grid=({blocks},)" in program


@pytest.mark.parametrize(
  ("heads", "keys", "computing"),
  [
    (1280, 200, 4),  # Tokens of small images, in training: one task each.
    (256, 784, 3),
    (48, 3072, 3),
    (32, 200, 3),  # In one turn of 132 multiprocessors, with two blocks, too.
    (67, 200, 4),
  ],
)
def test_hopper_blocks_of_keys_that_take_the_least_time(heads, keys, computing):
  form = hopper_attention.quickest(hopper_attention_gradient.FORMS, heads, keys)
  assert form.computing == computing


def test_hopper_blocks_have_limits_that_are_said():
  most = max(form.channels for form in hopper_attention._FORMS)
  assert attention_module._MOST_HOPPER_CHANNELS == most == 128
  with pytest.raises(ValueError, match=r"144 channels, .* takes 128 at most"):
    hopper_attention._choose(16, 768, 144)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("form", hopper_attention._FORMS)
def test_shared_memory_holds_a_hopper_block(monkeypatch, form, training):
  """With the widest heads, and where blocks stay the next task's queries."""
  monkeypatch.setattr(hopper_attention, "_FORMS", (form,))
  monkeypatch.setattr(hopper_attention, "multiprocessors", lambda: 1)
  channels = form.channels
  if training:
    channels = min(channels, hopper_attention.MOST_CHANNELS_BACKWARD)
  operand = jax.ShapeDtypeStruct((1, 128, 3, channels), jnp.bfloat16)
  length = jax.ShapeDtypeStruct((1,), jnp.int32)
  kernel = functools.partial(
    hopper_attention.hopper_attention.__wrapped__, keep_log_sum=training
  )
  traced = jax.jit(kernel).trace(*3 * [operand], *2 * [length])
  assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("channels", [16, 80])
def test_what_surrounds_the_hopper_kernels(monkeypatch, channels):
  """Padding, lengths and derivatives, with XLA in the place of GPU kernels.

  Those of wide heads are cuDNN's.
  """
  reference = jax.nn.dot_product_attention
  sizes = []

  def probabilities(query, key, key_length, log_sum=None):
    scores = jnp.einsum("bnhd,bmhd->bhnm", query, key) * channels**-0.5
    valid = jnp.arange(key.shape[1]) < key_length[:, None, None, None]
    scores = jnp.where(valid, scores / jnp.log(2), -jnp.inf)
    if log_sum is None:
      log_sum = jnp.log2(jnp.exp2(scores).sum(axis=-1))
    return jnp.exp2(scores - log_sum[..., None]), log_sum

  def kernel(
    query, key, value, query_length, key_length, value_head, keep_log_sum=False
  ):
    sizes.append((query.shape[1], key.shape[1], query_length.shape))
    value = value[:, :, value_head : value_head + 2]
    weights, log_sum = probabilities(query, key, key_length)
    output = jnp.einsum("bhnm,bmhd->bnhd", weights, value)
    return (output, log_sum) if keep_log_sum else output

  def backward_kernel(query, key, value, *others):
    query_length, key_length, output, log_sum, gradient = others
    assert query_length.shape == (2,)
    weights, _ = probabilities(query, key, key_length, log_sum)
    dots = jnp.einsum("bnhd,bnhd->bhn", output, gradient)
    of_weights = jnp.einsum("bnhd,bmhd->bhnm", gradient, value)
    of_scores = weights * (of_weights - dots[..., None]) * channels**-0.5
    return (
      jnp.einsum("bhnm,bmhd->bnhd", of_scores, key),
      jnp.einsum("bhnm,bnhd->bmhd", of_scores, query),
      jnp.einsum("bhnm,bnhd->bmhd", weights, gradient),
    )

  def anywhere(*operands, implementation, **options):
    assert implementation == "xla" or channels == 80
    return reference(*operands, **options)

  monkeypatch.setattr(hopper_attention, "hopper_attention", kernel)
  monkeypatch.setattr(
    hopper_attention_gradient, "hopper_attention_gradient", backward_kernel
  )
  monkeypatch.setattr(jax.nn, "dot_product_attention", anywhere)
  query, key, value, length = operands(2, channels)
  more = np.concatenate([key[:, :, :1], value, key], axis=2)
  expected = gradient("xla")(query, key, value, length)
  result = gradient("hopper", value_head=1)(query, key, more, length)
  for others in (slice(1), slice(3, None)):
    assert not result[2][:, :, others].any()
  result = (*result[:2], result[2][:, :, 1:3])
  for x, y in zip(result, expected, strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5)
  assert set(sizes) == {(16, 152, (2,))}


def test_the_hopper_kernel_has_a_backward_pass_for_narrow_heads_only():
  most = attention_module._MOST_HOPPER_CHANNELS_BACKWARD
  assert most == hopper_attention.MOST_CHANNELS_BACKWARD == 64
  query, key, value, length = (jnp.asarray(x) for x in operands(1, 80))
  with pytest.raises(ValueError, match=r"80 channels, .* takes 64 at most"):
    hopper_attention_gradient.hopper_attention_gradient(
      query, key, value, length, length, query, length, query
    )
  with pytest.raises(ValueError, match=r"80 channels, .* takes 64 at most"):
    hopper_attention.hopper_attention(
      query, key, value, length, length, keep_log_sum=True
    )


@pytest.mark.parametrize(
  ("tokens", "channels", "forward_only", "capability", "name"),
  [
    (200, 64, False, "9.0", "hopper"),
    (200, 128, False, "9.0", "cudnn"),
    (196, 64, False, "9.0", "cudnn"),
    (196, 128, True, "9.0", "hopper"),
    (200, 24, True, "9.0", "cudnn"),
    (200, 64, False, "8.0", "cudnn"),
    (200, 4, True, "9.0", "xla"),
  ],
)
def test_what_suits_a_gpu(
  monkeypatch, tokens, channels, forward_only, capability, name
):
  device = types.SimpleNamespace(compute_capability=capability)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(jax, "devices", lambda: [device])
  x = jax.ShapeDtypeStruct((2, tokens, 4, channels), jnp.bfloat16)
  assert attention_module._choose(x, x, forward_only) == name
