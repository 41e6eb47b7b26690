"""Parts against their plain definitions."""

import chex
import flax.linen as nn
import flax.traverse_util
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ScopeParamShapeError
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.extend.core import jaxprs_in_params

from point3r_jax.models import blocks
from point3r_jax.models.attention import attention
from point3r_jax.models.compute import Compute
from point3r_jax.models.encoder import VisionTransformer, patchify
from point3r_jax.models.gelus import add_bias_gelu, gelu
from point3r_jax.models.heads import point_map, pose_encoding
from point3r_jax.models.linear import Linear, add_bias
from point3r_jax.models.point3r import Context, Point3R
from point3r_jax.models.rotary import (
  apply_rotary,
  disable_where,
  rotary_2d,
  rotary_3d,
  surround_by_identity,
)
from point3r_jax.precision import get_precision
from tests import micro

BASES = (10.0, 100.0, 1000.0, 10000.0)


def rotate_group(x, position, base):
  """One group of channels (q,) at one coordinate, as the definition says."""
  size = len(x)
  half = (size + 1) // 2
  frequency = base ** (-2 * np.arange(half) / size)
  angle = np.concatenate([position * frequency] * 2)[:size]
  rotated = np.concatenate([-x[half:], x[:half]])
  return x * np.cos(angle) + rotated * np.sin(angle)


@pytest.mark.parametrize("head_dim", [12, 48, 64])
def test_rotary_3d_is_the_mean_of_rotations(head_dim):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, 5, 3, head_dim))
  position = rng.uniform(-4, 4, (2, 5, 3))
  table = rotary_3d(jnp.asarray(position, jnp.float32), head_dim, BASES)
  result = apply_rotary(jnp.asarray(x, jnp.float32), table)
  third = head_dim // 3
  bounds = [0, third, 2 * third, head_dim]
  expected = np.zeros_like(x)
  for index in np.ndindex(2, 5, 3):
    for axis in range(3):
      group = slice(bounds[axis], bounds[axis + 1])
      expected[index][group] = np.mean(
        [
          rotate_group(x[index][group], position[index[:2]][axis], base)
          for base in BASES
        ],
        axis=0,
      )
  np.testing.assert_allclose(result, expected, atol=1e-5)


def test_rotary_2d_depends_on_relative_positions():
  """Dot products of rotated vectors see only differences of indices."""
  rng = np.random.default_rng(0)
  query, key = (jnp.asarray(rng.standard_normal(16), jnp.float32) for _ in "qk")
  table = rotary_2d((4, 6), 16)

  def rotate(x):
    tokens = jnp.broadcast_to(x, (1, 24, 1, 16))
    return apply_rotary(tokens, table)[0, :, 0].reshape(4, 6, 16)

  scores = jnp.einsum("yxd,vud->yxvu", rotate(query), rotate(key))
  np.testing.assert_allclose(scores[0, 1, 2, 3], scores[1, 3, 3, 5], rtol=1e-4)
  assert abs(scores[0, 1, 2, 3] - scores[0, 1, 3, 3]) > 1e-3


def test_rotary_can_be_disabled_for_samples_and_tokens():
  position = jnp.ones((2, 3, 3))
  table = disable_where(rotary_3d(position, 12, BASES), jnp.array([1, 0], bool))
  table = surround_by_identity(table, 1, 2)
  x = jnp.ones((2, 6, 1, 12))
  result = apply_rotary(x, table)
  np.testing.assert_array_equal(result[0], x[0])
  np.testing.assert_array_equal(result[1, [0, 4, 5]], x[1, [0, 4, 5]])
  assert (jnp.abs(result[1, 1:4] - x[1, 1:4]).max(-1) > 0.1).all()


@pytest.mark.parametrize("head_dim", [12, 16, 22])
def test_rotary_has_the_gradient_of_what_it_computes(head_dim):
  """Its rotation of halves is given one by hand; some groups are odd."""
  keys = jax.random.split(jax.random.key(0), 3)
  table = rotary_3d(jax.random.normal(keys[0], (1, 2, 3)), head_dim, BASES)
  x, weight = (jax.random.normal(key, (1, 2, 1, head_dim)) for key in keys[1:])

  def weighted(x):
    return jnp.vdot(apply_rotary(x, table), weight)

  columns = jax.jit(jax.vmap(weighted))(np.eye(x.size).reshape(-1, *x.shape))
  gradient = jax.jit(jax.grad(weighted))(x)
  np.testing.assert_allclose(gradient.ravel(), columns, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_rows_behind_the_tokens_change_nothing(monkeypatch, scan_layers):
  """In 16 bits three tokens become eight, of which five are nobody's."""
  compute = Compute(get_precision("bfloat16"), "xla")
  encoder = VisionTransformer(32, 2, 4, 2, 2, compute, scan_layers)
  rng = np.random.default_rng(0)
  image = jnp.asarray(rng.standard_normal((2, 2, 6, 3)), jnp.float32)
  shapes = jax.eval_shape(encoder.init, jax.random.key(0), image)
  variables = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), shapes
  )
  padded = jax.jit(lambda x: encoder.apply(variables, x))(image)
  monkeypatch.setattr(Compute, "token_block", 1)
  expected = jax.jit(lambda x: encoder.apply(variables, x))(image)
  assert padded.shape == expected.shape == (2, 3, 32)
  np.testing.assert_allclose(padded, expected, atol=0.01, rtol=0.01)


def test_patchify_is_row_major():
  image = jnp.arange(2 * 6).reshape(1, 2, 6, 1)
  patches = patchify(image, 2)
  np.testing.assert_array_equal(
    patches[0], [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
  )


@pytest.mark.parametrize("lengths", [None, (1, 150), (150, 3)])
@pytest.mark.parametrize("implementation", ["xla", "blocks", "tpu"])
def test_attention_is_softmax_over_the_valid_keys(implementation, lengths):
  rng = np.random.default_rng(0)
  query = rng.standard_normal((2, 9, 2, 16)).astype(np.float32)
  key, value = rng.standard_normal((2, 2, 150, 2, 16)).astype(np.float32)
  with pltpu.force_tpu_interpret_mode():
    result = attention(
      query,
      key,
      value,
      key_length=lengths and jnp.array(lengths, jnp.int32),
      implementation=implementation,
    )
  for b in range(2):
    valid = slice(0, 150 if lengths is None else lengths[b])
    logits = np.einsum("nhd,mhd->hnm", query[b], key[b, valid]) / 4
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("hnm,mhd->nhd", weights, value[b, valid])
    np.testing.assert_allclose(result[b], expected, atol=1e-5)


def test_unknown_attention_is_refused():
  with pytest.raises(ValueError, match="unknown attention"):
    attention(*jnp.zeros((3, 1, 2, 1, 8)), implementation="magic")


def test_gelu_and_its_form_within_a_product():
  x = jnp.linspace(-10, 10, 100_001)[:, None]
  exact = gelu(x)
  published = jax.nn.gelu(x, approximate=False)
  np.testing.assert_allclose(exact, published, atol=2e-6)
  bias = jnp.ones(1)
  within = add_bias_gelu(x - bias, bias, jnp.float32)
  np.testing.assert_allclose(within, exact, atol=5e-4)
  half = add_bias_gelu(x - bias, bias, jnp.bfloat16)
  assert half.dtype == jnp.bfloat16
  np.testing.assert_allclose(half, exact, rtol=0.01, atol=5e-3)


@pytest.mark.parametrize(
  ("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.02)]
)
def test_gradients_of_a_gelu_within_a_product(dtype, tolerance):
  keys = jax.random.split(jax.random.key(0), 3)
  y = 3 * jax.random.normal(keys[0], (4, 24, 32))
  bias = jax.random.normal(keys[1], (32,))
  of = jax.random.normal(keys[2], y.shape)
  _, plain = jax.vjp(lambda y, b: jax.nn.gelu(y + b, approximate=True), y, bias)
  _, own = jax.vjp(
    lambda y, b: add_bias_gelu(y, b, dtype), y.astype(dtype), bias.astype(dtype)
  )
  chex.assert_trees_all_close(
    jax.tree.map(jnp.float32, own(of.astype(dtype))),
    plain(of),
    rtol=tolerance,
    atol=10 * tolerance,
  )


@pytest.mark.parametrize(
  ("precision", "remat", "exact"),
  [
    ("float32", None, True),
    ("bfloat16", None, False),
    ("float32", "none", True),
    ("bfloat16", "elementwise", False),
  ],
)
def test_only_float32_has_the_exact_gelu(precision, remat, exact):
  compute = Compute(get_precision(precision), remat=remat)
  assert compute.exact_gelu == exact


@pytest.mark.parametrize("remat", [None, "none"])  # The latter: in training.
def test_residual_streams_have_their_types(remat):
  config, grid = micro.CONFIG, (2, 3)
  width, tokens = config.decoder_width, micro.TOKENS
  model = Point3R(config, Compute(get_precision("bfloat16"), "xla", remat))
  params = micro.params()
  context = Context(
    position=jnp.zeros((1, tokens, 3)),
    feature=jnp.zeros((1, tokens, width)),
    count=jnp.full((1,), tokens),
    pose_slots=jnp.zeros((1, config.pose_slots, 2 * width)),
    image_position=jnp.zeros((1, tokens, 3)),
    first=jnp.zeros((1,), bool),
  )

  def run(image):
    _, outputs = model.apply(
      {"params": params},
      method=lambda model: model(model.encode(image), context, grid),
      capture_intermediates=lambda module, _: "block" in (module.name or ""),
    )
    return outputs["intermediates"]

  blocks = jax.eval_shape(run, jnp.zeros((1, *micro.IMAGE_SIZE, 3)))
  flat = flax.traverse_util.flatten_dict(blocks, sep="/")
  types = {
    name.removesuffix("/__call__"): x[0].dtype
    for name, x in flat.items()
    if name.endswith("/__call__")
  }
  wide = {
    name
    for name in types
    if name.startswith(("pose_memory", "world_head")) or "image_block" in name
  }
  rounded = set(types) - wide
  of_wide = jnp.float32 if remat is None else jnp.bfloat16
  assert {types[name] for name in wide} == {jnp.dtype(of_wide)}
  assert {types[name] for name in rounded} == {jnp.dtype(jnp.bfloat16)}
  assert {"encoder/block_0", "value_encoder/block_0"} < rounded
  assert sum("pointer_block" in x for x in rounded) == config.decoder_depth - 1


@pytest.mark.parametrize(
  ("backend", "remat", "sums"),
  [
    ("cpu", None, jnp.float32),
    ("cpu", "none", None),
    ("cpu", "elementwise", None),
    ("gpu", None, None),
  ],
)
def test_cpus_sum_in_float32_what_is_not_kept(
  monkeypatch, backend, remat, sums
):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  compute = Compute(get_precision("bfloat16"), remat=remat)
  assert compute.inner_sums == sums


@pytest.mark.parametrize(("remat", "kept"), [("elementwise", 3), ("blocks", 0)])
def test_a_block_keeps_what_attends_and_not_what_it_is_made_of(remat, kept):
  compute = Compute(get_precision("bfloat16"), remat=remat)
  block = compute.remat_block(blocks.EncoderBlock)(4, 4, compute)
  x = jnp.ones((2, 6, 64))
  table = rotary_2d((2, 3), 16)
  params = jax.eval_shape(block.init, jax.random.key(0), x, table)
  pullback = jax.eval_shape(
    lambda params: jax.vjp(lambda p: block.apply(p, x, table), params)[1],
    params,
  )
  shapes = [x.shape for x in jax.tree.leaves(pullback)]
  queries, product = (2, 6, 4, 16), (2, 6, 3 * 64)
  assert shapes.count(queries) == kept
  assert product not in shapes


@pytest.mark.parametrize(
  ("remat", "runs"), [("none", 1), ("elementwise", 1), ("blocks", 2)]
)
def test_attention_that_is_kept_does_not_run_again(remat, runs):
  compute = Compute(get_precision("bfloat16"), attention="hopper", remat=remat)
  block = compute.remat_block(blocks.EncoderBlock)(4, 4, compute)
  x = jnp.ones((2, 8, 64))
  params = jax.eval_shape(block.init, jax.random.key(0), x)
  gradient = jax.grad(lambda params: block.apply(params, x).sum())
  text = str(jax.make_jaxpr(gradient)(params))
  assert text.count("name=hopper_attention\n") == runs
  assert text.count("name=hopper_attention_gradient\n") == 1


@pytest.mark.parametrize(
  ("remat", "scanned", "apart"),
  [
    ("none", False, False),
    ("elementwise", False, True),
    ("elementwise", True, False),
    ("blocks", False, True),
  ],
)
def test_what_is_computed_again_is_kept_apart(remat, scanned, apart):
  """From its first computation: the compiler would merge them."""
  compute = Compute(get_precision("float32"), remat=remat)
  block = compute.remat_block(blocks.EncoderBlock, scanned)(4, 4, compute)
  x = jnp.ones((2, 6, 64))
  table = rotary_2d((2, 3), 16)
  params = jax.eval_shape(block.init, jax.random.key(0), x, table)
  gradient = jax.grad(lambda params: block.apply(params, x, table).sum())
  lowered = jax.jit(gradient).lower(params).as_text()
  assert ("optimization_barrier" in lowered) == apart


def test_linear_rounds_its_result_once_where_sums_are_float32():
  rng = np.random.default_rng(0)
  x, kernel, bias = (
    jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    for shape in ((5, 64), (64, 3), (3,))
  )
  linear = Linear(3, jnp.bfloat16, sums=jnp.float32)
  y = linear.apply({"params": {"kernel": kernel, "bias": bias}}, x)
  wide = (np.asarray(z, np.float64) for z in (x, kernel, bias))
  expected = (lambda x, kernel, bias: x @ kernel + bias)(*wide)
  np.testing.assert_array_equal(y, jnp.asarray(expected, jnp.bfloat16))


def test_activations():
  raw = jnp.array([[3.0, 0.0, 4.0, 0.5], [0.0, 0.0, 0.0, -2.0]])
  points, confidence = point_map(raw)
  np.testing.assert_allclose(
    points, [np.expm1(5) * np.array([0.6, 0, 0.8]), [0, 0, 0]], rtol=1e-6
  )
  np.testing.assert_allclose(confidence, 1 + np.exp([0.5, -2]), rtol=1e-6)

  pose = pose_encoding(jnp.array([3.0, 0, 4, -2, 0, 0, 2]))
  np.testing.assert_allclose(pose[:3], np.expm1(5) * np.array([0.6, 0, 0.8]))
  np.testing.assert_allclose(pose[3:], [0.5**0.5, 0, 0, -(0.5**0.5)], rtol=1e-6)


def test_activations_have_finite_gradients_at_zero():
  gradient = jax.jit(jax.grad(lambda x: point_map(x)[0].sum()))(np.zeros(4))
  assert np.isfinite(gradient).all()
  gradient = jax.jit(jax.jacobian(pose_encoding))(np.zeros(7))
  assert np.isfinite(gradient).all()


def test_layers_of_one_kind_are_traced_once():
  model = VisionTransformer(
    width=16,
    depth=5,
    heads=2,
    patch_size=16,
    mlp_ratio=3,
    compute=Compute(get_precision("float32")),
  )
  image = np.zeros((1, 16, 32, 3), np.float32)
  params = model.init(jax.random.key(0), image)
  jaxpr = jax.make_jaxpr(model.apply)(params, image)
  blocks = [
    equation.params["jaxpr"]
    for equation in jaxpr.eqns
    if "core_fn" in str(equation.params.get("name"))
  ]
  assert len(blocks) == 5
  assert all(block is blocks[0] for block in blocks)


@hypothesis.given(
  rows=st.sampled_from([1, 63, 64, 70, 520, 1024, 3200]),
  dtype=st.sampled_from(["float32", "bfloat16"]),
)
@hypothesis.settings(deadline=None, max_examples=14)
def test_gradients_of_a_bias_are_sums_over_rows(rows, dtype):
  rng = np.random.default_rng(rows)
  gradient = rng.standard_normal((rows, 24)).astype(dtype)
  pull_back = jax.jit(lambda y, bias, of: jax.vjp(add_bias, y, bias)[1](of))
  of_y, of_bias = pull_back(np.zeros_like(gradient), gradient[0], gradient)
  np.testing.assert_array_equal(of_y, gradient)
  expected = np.asarray(gradient, np.float64).sum(0)
  rounding = 2e-7 if dtype == "float32" else 2**-8
  error = np.abs(np.asarray(of_bias, np.float64) - expected)
  np.testing.assert_array_less(error, rounding * (rows + np.abs(expected)))


class _Block(nn.Module):
  """What a block does before a linear map."""

  compute: Compute

  @nn.compact
  def __call__(self, x):
    """Normalises x."""
    return blocks._norm(self, "mlp_norm", x)[0]


@pytest.mark.parametrize(
  ("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.02)]
)
def test_norms_without_parameters_only_normalise(precision, tolerance):
  """Values and gradients are those of the norm with scale 1 and bias 0."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(3 + 2 * rng.standard_normal((2, 7, 32)), jnp.float32)
  weight = rng.standard_normal(x.shape).astype(np.float32)
  block = _Block(Compute(get_precision(precision), remat="none"))
  affine = {"mlp_norm": {"scale": jnp.ones(32), "bias": jnp.zeros(32)}}

  def run(params):
    def weighted(x):
      y = block.apply({"params": params}, x)
      return jnp.vdot(y.astype(jnp.float32), weight), y

    return jax.grad(weighted, has_aux=True)(x)

  (gradient, y), (expected_gradient, expected) = run({}), run(affine)
  assert y.dtype == block.compute.dtype and expected.dtype == jnp.float32
  np.testing.assert_allclose(y, expected, atol=tolerance, rtol=tolerance)
  np.testing.assert_allclose(gradient, expected_gradient, atol=tolerance)


def _products(jaxpr, scope=""):
  """Yields scopes and operands' types of all products in a program."""
  for equation in jaxpr.eqns:
    own = f"{scope}/{equation.source_info.name_stack}"
    if equation.primitive.name == "dot_general":
      yield own, {x.aval.dtype for x in equation.invars}
    for inner in jaxprs_in_params(equation.params):
      yield from _products(inner, own)


def test_training_multiplies_gradients_between_parts_in_16_bits():
  """In float32 a GPU takes thrice as long."""
  compute = Compute(get_precision("bfloat16"), "xla", remat="none")
  model = Point3R(micro.CONFIG, compute)
  grid = micro.CONFIG.grid(micro.IMAGE_SIZE)
  context = Context(
    position=jnp.zeros((2, micro.TOKENS, 3)),
    feature=jnp.ones((2, micro.TOKENS, micro.CONFIG.decoder_width)),
    count=jnp.full(2, micro.TOKENS),
    pose_slots=jnp.ones((2, 4, 2 * micro.CONFIG.decoder_width)),
    image_position=jnp.zeros((2, micro.TOKENS, 3)),
    first=jnp.zeros(2, bool),
  )

  def total(params):
    def run(model):
      tokens = model.encode(micro.images(1, 2)[0])
      output = model(tokens, context, grid)
      return output.feature.sum() + output.points_world.sum()

    return model.apply({"params": params}, method=run)

  output = jax.eval_shape(total, micro.params())
  assert output.dtype == jnp.float32
  found = list(_products(jax.make_jaxpr(jax.grad(total))(micro.params()).jaxpr))
  for name in (
    *("image_projection", "pointer_projection", "value_projection"),
    *("key_head", "pose_memory.summarise"),
  ):
    types = [types for scope, types in found if name in scope]
    assert len(types) > 2  # Forward, and for its weights' gradient.
    assert set.union(*types) == {jnp.dtype(compute.dtype)}


def test_a_parameter_of_another_shape_is_refused():
  linear = Linear(3, jnp.float32)
  kernel, bias = jnp.zeros((2, 4)), jnp.zeros(3)
  with pytest.raises(ScopeParamShapeError, match=r'"kernel" .* \(2, 3\)'):
    linear.apply({"params": {"kernel": kernel, "bias": bias}}, jnp.ones((1, 2)))
