"""Fresh parameters, policies' types and the layouts of parameters."""

import functools
import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import point3r_jax as p3r
from point3r_jax.params import (
  cast_params,
  check_params,
  check_rounding,
  flat_shapes,
  fold_norms,
  join_params,
  param_shapes,
  prepare_params,
  stack_layers,
  unstack_layers,
)
from tests import micro

SMALL = p3r.preset("small")


def test_full_size_without_allocating():
  shapes = flat_shapes(param_shapes(p3r.preset("point3r_512")))
  assert sum(np.prod(shape, dtype=int) for shape in shapes.values()) == (
    828_014_991
  )


def test_fresh_parameters_follow_the_published_start():
  params = p3r.init_params(SMALL)
  chex.assert_trees_all_equal_shapes(params, param_shapes(SMALL))
  block = params["decoder"]["layer_1"]["image_block"]
  qkv = block["self_attention"]["qkv"]
  bound = np.sqrt(6 / (192 + 3 * 192))  # Xavier, of the fused projection.
  assert 0.99 * bound < np.abs(qkv["kernel"]).max() <= bound
  assert not qkv["bias"].any()
  assert (block["self_norm"]["scale"] == 1).all()
  assert not block["self_norm"]["bias"].any()

  block = params["decoder"]["layer_1"]["pointer_block"]
  query = block["cross_attention"]["query"]
  for leaf in query.values():
    assert 0.9 * 192**-0.5 < np.abs(leaf).max() <= 192**-0.5
  conv = params["camera_dense"]["layer_1"]["kernel"]
  assert 0.99 < np.abs(conv).max() * (9 * conv.shape[2]) ** 0.5 <= 1
  resize = params["camera_dense"]["resize_0"]
  for leaf in resize.values():
    assert 0.8 < np.abs(leaf).max() * (16 * 24) ** 0.5 <= 1

  assert params["pose_token"].std() == pytest.approx(0.02, rel=0.2)
  slots = params["pose_memory"]["slots"]
  assert slots.std() == pytest.approx(0.2, rel=0.05)


def test_fresh_parameters_depend_on_the_seed_only():
  first, again, other = (p3r.init_params(SMALL, seed) for seed in (0, 0, 1))
  chex.assert_trees_all_equal(first, again)
  kernel = first["key_head"]["hidden"]["kernel"]
  assert (kernel != other["key_head"]["hidden"]["kernel"]).mean() > 0.99


@pytest.mark.parametrize("host", [True, False])
def test_layouts_of_layers_are_inverse(host):
  params = jax.tree.map(np.asarray if host else jnp.asarray, micro.params())
  stacked = stack_layers(params)
  chex.assert_trees_all_equal_shapes(stacked, param_shapes(micro.SCANNED))
  leaf = stacked["encoder"]["blocks"]["mlp"]["hidden"]["kernel"]
  assert isinstance(leaf, np.ndarray if host else jax.Array)
  chex.assert_trees_all_equal(unstack_layers(stacked), params)


@pytest.mark.parametrize("stacked", [False, True])
def test_norms_become_part_of_the_linear_maps_behind(stacked):
  params = micro.scanned_params() if stacked else micro.params()
  folded = fold_norms(params)
  left = {
    path.split("/")[-2]
    for path in flat_shapes(folded)
    if path.endswith("/scale")
  }
  assert left == {"norm", "pointer_norm"}  # No linear map alone reads these.
  linear = ("decoder", "layers") if stacked else ("decoder", "layer_1")
  block = params[linear[0]][linear[1]]["pointer_block"]
  x = np.random.default_rng(0).standard_normal((5, 48)).astype(np.float32)
  for part, name, norm in (
    ("self_attention", "qkv", "self_norm"),
    ("cross_attention", "query", "cross_norm"),
    ("cross_attention", "key", "context_norm"),
    ("cross_attention", "value", "context_norm"),
    ("mlp", "hidden", "mlp_norm"),
  ):
    affine, before = block[norm], block[part][name]
    after = folded[linear[0]][linear[1]]["pointer_block"][part][name]
    if stacked:
      affine, before, after = (
        jax.tree.map(lambda leaf: leaf[1], x) for x in (affine, before, after)
      )
    expected = x * affine["scale"] + affine["bias"]
    expected = expected @ before["kernel"] + before["bias"]
    found = x @ after["kernel"] + after["bias"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def stacked_layer(tree, name):
  return jax.tree.map(lambda x: x[int(name[6:])], tree["layers"])


@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("stacked", [False, True])
def test_maps_of_one_stream_are_joined(stacked, host):
  params = micro.scanned_params() if stacked else micro.params()
  params = jax.tree.map(np.asarray if host else jnp.asarray, params)
  prepared = prepare_params(params, "bfloat16")
  folded = cast_params(fold_norms(params), "bfloat16")
  layer = stacked_layer if stacked else operator.getitem
  before, after = (
    layer(tree["decoder"], "layer_1") for tree in (folded, prepared)
  )
  for stream, other in (("image", "pointer"), ("pointer", "image")):
    own, others = (before[f"{name}_block"] for name in (stream, other))
    for leaf in ("kernel", "bias"):
      maps = np.split(after[f"{stream}_products"][leaf], (3 * 48, 4 * 48), -1)
      expected = (
        own["self_attention"]["qkv"],
        others["cross_attention"]["key"],
        others["cross_attention"]["value"],
      )
      for found, linear in zip(maps, expected, strict=True):
        np.testing.assert_array_equal(found, linear[leaf])
    left = after[f"{stream}_block"]
    assert set(left["self_attention"]) == {"projection"}
    assert set(left["cross_attention"]) == {"query", "projection"}


def test_the_last_layer_and_the_pose_memory_join_keys_and_values():
  prepared = prepare_params(micro.params(), "bfloat16")
  last = prepared["decoder"]["layer_3"]
  assert set(last) == {"image_block"}
  block = prepared["pose_memory"]["read_blocks_0"]
  for attention in (x["cross_attention"] for x in (last["image_block"], block)):
    assert set(attention) == {"query", "key_value", "projection"}
  assert "pointer_norm" not in prepared["decoder"]


@pytest.mark.parametrize("host", [True, False])
def test_prepared_parameters_stay_as_they_are(host):
  params = jax.tree.map(np.asarray if host else jnp.asarray, micro.params())
  prepared = prepare_params(params, "bfloat16")
  kinds = {isinstance(x, np.ndarray) for x in jax.tree.leaves(prepared)}
  assert kinds == {host}
  chex.assert_trees_all_equal_dtypes(
    prepared, cast_params(prepared, "bfloat16")
  )
  again = prepare_params(prepared, "bfloat16")
  chex.assert_trees_all_equal(again, prepared)
  chex.assert_trees_all_equal_dtypes(again, prepared)
  chex.assert_trees_all_equal(prepare_params(params, "float32"), params)


@pytest.mark.parametrize(
  ("rounded", "run"),
  [("bfloat16", "float32"), ("bfloat16", "tf32"), ("bfloat16", "mixed")],
)
def test_what_was_rounded_to_more_is_refused(rounded, run):
  params = prepare_params(micro.params(), rounded)
  with pytest.raises(ValueError, match=rf"rounded to bfloat16.* {run!r}"):
    prepare_params(params, run)


@pytest.mark.parametrize("rounded", ["float32", "mixed", "bfloat16"])
def test_what_was_rounded_to_less_is_not(rounded):
  check_rounding(prepare_params(micro.params(), rounded), "bfloat16")


def test_parameters_are_prepared_after_they_were_cast_too():
  cast = cast_params(micro.params(), "bfloat16")
  twice = prepare_params(cast, "bfloat16")
  once = prepare_params(micro.params(), "bfloat16")
  chex.assert_trees_all_equal_dtypes(twice, once)
  as_float32 = functools.partial(jax.tree.map, np.float32)
  chex.assert_trees_all_close(
    as_float32(twice), as_float32(once), rtol=2**-6, atol=2**-7
  )


def test_only_what_asks_for_it_takes_prepared_parameters():
  prepared = prepare_params(micro.params(), "bfloat16")
  check_params(micro.CONFIG, prepared)
  with pytest.raises(ValueError, match="prepared to run"):
    check_params(micro.CONFIG, prepared, prepared=False)
  del prepared["pose_token"]
  with pytest.raises(ValueError, match=r"missing: .*pose_token"):
    check_params(micro.CONFIG, prepared)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_biases_are_joined_and_split_again(precision):
  params = cast_params(micro.params(), precision)
  flat = flat_shapes(params)
  joined = join_params(params, biases=True)
  groups = [
    len(paths)
    for paths, dtype in zip(joined.paths, joined.dtypes, strict=True)
    if dtype is not None
  ]
  assert sum(groups) == sum(path.endswith("/bias") for path in flat)
  left = len(flat) - sum(groups) + len(groups)
  assert len(jax.tree.leaves(joined)) == left < 0.7 * len(flat)
  chex.assert_trees_all_equal_shapes_and_dtypes(joined.split(), params)
  chex.assert_trees_all_equal(jax.jit(lambda x: x.split())(joined), params)
  apart = join_params(params, biases=False)
  chex.assert_trees_all_equal(apart.split(), params)
  assert len(jax.tree.leaves(apart)) == len(flat)


def test_fresh_parameters_come_in_the_layout_of_the_config():
  chex.assert_trees_all_equal(
    p3r.init_params(micro.SCANNED), stack_layers(p3r.init_params(micro.CONFIG))
  )


def test_policies_cast_operands_only():
  params = cast_params(micro.params(), "bfloat16")
  low = {"bfloat16", "float32"}
  assert {str(x.dtype) for x in jax.tree.leaves(params)} == low
  block = params["decoder"]["layer_0"]["image_block"]
  assert block["mlp"]["hidden"]["kernel"].dtype == jnp.bfloat16
  assert block["mlp"]["hidden"]["bias"].dtype == jnp.bfloat16
  assert block["mlp"]["output"]["kernel"].dtype == jnp.bfloat16
  assert block["mlp"]["output"]["bias"].dtype == jnp.float32
  pointers = params["decoder"]["layer_0"]["pointer_block"]
  assert pointers["mlp"]["output"]["bias"].dtype == jnp.bfloat16
  assert block["mlp_norm"]["scale"].dtype == jnp.float32
  assert block["mlp_norm"]["bias"].dtype == jnp.float32
  modulated = params["world_head"]["block_0"]["mlp_norm"]
  assert modulated["norm"]["bias"].dtype == jnp.float32
  assert modulated["modulation"]["kernel"].dtype == jnp.bfloat16
  assert modulated["modulation"]["bias"].dtype == jnp.float32
  assert params["pose_head"]["output"]["kernel"].dtype == jnp.float32
  assert params["encoder"]["patch_embed"]["kernel"].dtype == jnp.float32
  assert params["pose_token"].dtype == jnp.float32
  unchanged = cast_params(micro.params(), "float32")
  chex.assert_trees_all_equal(unchanged, micro.params())
