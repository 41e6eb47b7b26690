"""Fusion against lists that grow, and what must not change anything."""

import chex
import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

import point3r_jax as p3r
from point3r_jax.memory import fuse

CONFIG = p3r.preset("small").replace(
  decoder_width=16, decoder_heads=1, pointer_heads=1, pose_slots=1
)
FEATURES = CONFIG.decoder_width
IMAGE_SIZE = (32, 64)
TOKENS = 8
CAPACITY = 24
DIVISOR = 4.0

jitted_fuse = jax.jit(fuse, static_argnames=("divisor", "fusion"))


def reference(old, new, capacity, divisor=DIVISOR, fusion=True):
  """Fuses lists of (position, feature); returns the list and the overflow."""
  result, assigned, overflow = list(old), {}, 0
  everything = np.stack([p for p, _ in (*old, *new)])
  extent = everything.max(0) - everything.min(0)
  threshold = np.linalg.norm(extent / np.float32(divisor))
  for position, feature in new:
    distance = [np.linalg.norm(position - p) for p, _ in old]
    nearest = int(np.argmin(distance)) if old else None
    far = not old or distance[nearest] >= threshold
    if (far or not fusion) and len(result) < capacity:
      result.append((position, feature))
      continue
    overflow += far or not fusion
    assigned.setdefault(nearest, []).append((position, feature))
  for index, items in assigned.items():
    result[index] = tuple(np.mean(x, axis=0) for x in zip(*items, strict=True))
  return result, overflow


def make_memory(samples, capacity=CAPACITY, garbage=0.0):
  """Packs lists of (position, feature) into a memory with garbage padding."""
  memory = p3r.init_memory(CONFIG, len(samples), IMAGE_SIZE, capacity)
  position = np.full(memory.position.shape, garbage, np.float32)
  feature = np.full(memory.feature.shape, garbage, np.float32)
  for b, pointers in enumerate(samples):
    for i, (p, f) in enumerate(pointers):
      position[b, i], feature[b, i] = p, f
  count = np.array([len(pointers) for pointers in samples], np.int32)
  return memory.replace(position=position, feature=feature, count=count)


def pack(samples):
  return tuple(
    np.stack([[pointer[k] for pointer in pointers] for pointers in samples])
    for k in (0, 1)
  )


def cloud(rng, count, scale=1.0):
  return [
    (
      (scale * rng.standard_normal(3)).astype(np.float32),
      rng.standard_normal(FEATURES).astype(np.float32),
    )
    for _ in range(count)
  ]


def check(samples, new, capacity=CAPACITY, fusion=True):
  """Compares one fusion of a batch with the reference; returns the memory."""
  memory = make_memory(samples, capacity)
  memory = jitted_fuse(memory, *pack(new), divisor=DIVISOR, fusion=fusion)
  for b, old in enumerate(samples):
    want, overflow = reference(old, new[b], capacity, fusion=fusion)
    assert memory.count[b] == len(want)
    assert memory.overflow[b] == overflow
    for k, value in enumerate((memory.position[b], memory.feature[b])):
      np.testing.assert_allclose(
        value[: len(want)], [pointer[k] for pointer in want], atol=1e-6
      )
  return memory


@hypothesis.given(
  seed=st.integers(0, 2**32 - 1),
  counts=st.lists(st.integers(0, 16), min_size=3, max_size=3),
  spread=st.sampled_from([0.05, 0.5, 1.0, 3.0]),
  fusion=st.booleans(),
)
@hypothesis.settings(deadline=None, max_examples=60)
def test_random_clouds(seed, counts, spread, fusion):
  rng = np.random.default_rng(seed)
  old = [cloud(rng, count) for count in counts]
  new = [cloud(rng, TOKENS, spread) for _ in counts]
  check(old, new, fusion=fusion)


@hypothesis.given(
  seed=st.integers(0, 2**32 - 1), frames=st.integers(2, 5), fusion=st.booleans()
)
@hypothesis.settings(deadline=None, max_examples=20)
def test_many_frames(seed, frames, fusion):
  """Lists and memory stay the same over frames, also once memory is full."""
  rng = np.random.default_rng(seed)
  memory, want, overflow = make_memory([[]]), [], 0
  for _ in range(frames):
    new = cloud(rng, TOKENS)
    memory = jitted_fuse(memory, *pack([new]), divisor=DIVISOR, fusion=fusion)
    want, lost = reference(want, new, CAPACITY, fusion=fusion)
    overflow += lost
  assert memory.count[0] == len(want)
  assert memory.overflow[0] == overflow
  np.testing.assert_allclose(
    memory.position[0, : len(want)], [p for p, _ in want], atol=1e-5
  )


@hypothesis.given(seed=st.integers(0, 2**32 - 1))
@hypothesis.settings(deadline=None, max_examples=30)
def test_ties_go_to_the_lowest_index(seed):
  """On an integer lattice distances are exact and ties are common."""
  rng = np.random.default_rng(seed)

  def lattice(count, low, high):
    return [
      (rng.integers(low, high, 3).astype(np.float32), f)
      for _, f in cloud(rng, count)
    ]

  old, new = lattice(10, -2, 3), lattice(TOKENS - 2, -1, 2)
  # Two far corners fix the threshold at √18.75, between lattice distances.
  corners = [
    (np.full(3, v, np.float32), np.zeros(FEATURES, np.float32)) for v in (-5, 5)
  ]
  check([old], [new + corners])


def test_all_merge():
  rng = np.random.default_rng(0)
  old = cloud(rng, 10)
  near = [(p + np.float32(1e-3), -f) for p, f in old[:TOKENS]]
  memory = check([old], [near])
  assert memory.count[0] == 10


def test_all_append():
  rng = np.random.default_rng(0)
  old = [(p - 50, f) for p, f in cloud(rng, 10)]
  new = [(p + 50, f) for p, f in cloud(rng, TOKENS)]
  memory = check([old], [new])
  assert memory.count[0] == 10 + TOKENS


def test_one_pointer():
  rng = np.random.default_rng(0)
  check([cloud(rng, 1)], [cloud(rng, TOKENS)])


def test_identical_points_have_no_extent():
  """The threshold is 0, and a distance of 0 is not below it: all append."""
  point = [(np.ones(3, np.float32), np.ones(FEATURES, np.float32))]
  memory = check([point], [point * TOKENS])
  assert memory.count[0] == 1 + TOKENS


def test_first_frame_appends_in_order():
  new = [cloud(np.random.default_rng(0), TOKENS)]
  memory = check([[]], new)
  np.testing.assert_array_equal(memory.position[0, :TOKENS], pack(new)[0][0])


@pytest.mark.parametrize("fusion", [True, False])
@pytest.mark.parametrize("free", [0, 1, 3])
def test_capacity_reached(fusion, free):
  rng = np.random.default_rng(free)
  old = [(p - 50, f) for p, f in cloud(rng, CAPACITY - free)]
  new = [(p + 50, f) for p, f in cloud(rng, TOKENS)]
  memory = check([old], [new], fusion=fusion)
  assert memory.count[0] == CAPACITY
  assert memory.overflow[0] == TOKENS - free


@hypothesis.given(
  seed=st.integers(0, 2**32 - 1),
  garbage=st.sampled_from([1e30, -7.0, np.inf, np.nan]),
)
@hypothesis.settings(deadline=None, max_examples=20)
def test_garbage_in_padding_changes_nothing(seed, garbage):
  rng = np.random.default_rng(seed)
  old, new = [cloud(rng, 5), cloud(rng, 12)], [cloud(rng, TOKENS)] * 2
  clean, dirty = (
    jitted_fuse(make_memory(old, garbage=g), *pack(new), divisor=DIVISOR)
    for g in (0.0, garbage)
  )
  np.testing.assert_array_equal(clean.count, dirty.count)
  for b, count in enumerate(clean.count):
    for field in ("position", "feature", "updated"):
      x, y = getattr(clean, field), getattr(dirty, field)
      np.testing.assert_array_equal(x[b, :count], y[b, :count])


@hypothesis.given(
  seed=st.integers(0, 2**32 - 1), order=st.permutations(range(4))
)
@hypothesis.settings(deadline=None, max_examples=20)
def test_permuting_samples_permutes_results(seed, order):
  rng = np.random.default_rng(seed)
  memory = make_memory([cloud(rng, count) for count in (0, 3, 9, 16)])
  new = pack([cloud(rng, TOKENS) for _ in range(4)])
  order = np.array(order)
  straight = jitted_fuse(memory, *new, divisor=DIVISOR)
  permuted = jitted_fuse(
    jax.tree.map(lambda x: x[order], memory),
    *(x[order] for x in new),
    divisor=DIVISOR,
  )
  chex.assert_trees_all_equal(
    jax.tree.map(lambda x: x[order], straight), permuted
  )


def test_updated_names_the_frame_of_the_last_write():
  rng = np.random.default_rng(0)
  memory = make_memory([cloud(rng, 3)]).replace(frame=np.array([7], np.int32))
  near = [(memory.position[0, 1], np.zeros(FEATURES, np.float32))]
  far = [(p + 50, f) for p, f in cloud(rng, TOKENS - 1)]
  memory = fuse(memory, *pack([near + far]), divisor=DIVISOR)
  np.testing.assert_array_equal(
    memory.updated[0, : 3 + TOKENS - 1], [0, 7, 0] + [7] * (TOKENS - 1)
  )


@pytest.mark.parametrize("mask", [[True], [0, 1], np.ones((2, 1), bool)])
def test_a_mask_of_another_shape_or_type_is_refused(mask):
  memory = p3r.init_memory(CONFIG, 2, IMAGE_SIZE, CAPACITY)
  with pytest.raises(ValueError, match=r"mask must be \(2,\) bool"):
    p3r.reset(memory, mask)


def test_reset_empties_the_masked_samples_only():
  rng = np.random.default_rng(0)
  memory = make_memory([cloud(rng, 3), cloud(rng, 5)])
  memory = memory.replace(frame=np.array([4, 4], np.int32))
  result = p3r.reset(memory, np.array([True, False]))

  def pick(tree, b):
    return jax.tree.map(lambda x: x[b], tree)

  chex.assert_trees_all_equal(pick(result, 1), pick(memory, 1))
  chex.assert_trees_all_equal(
    pick(result, 0),
    pick(p3r.init_memory(CONFIG, 2, IMAGE_SIZE, CAPACITY), 0),
  )
  chex.assert_trees_all_equal(
    p3r.reset(memory), p3r.init_memory(CONFIG, 2, IMAGE_SIZE, CAPACITY)
  )


def test_grow_loses_nothing():
  memory = make_memory([cloud(np.random.default_rng(0), 9)])
  larger = p3r.grow(memory, 40)
  assert larger.capacity == 40
  np.testing.assert_array_equal(larger.position[:, :CAPACITY], memory.position)
  np.testing.assert_array_equal(larger.feature[:, :CAPACITY], memory.feature)
  assert not larger.position[:, CAPACITY:].any()
  with pytest.raises(ValueError, match="cannot shrink"):
    p3r.grow(larger, CAPACITY)


def test_init_memory_refuses_what_does_not_fit():
  with pytest.raises(ValueError, match="multiple of the patch size"):
    p3r.init_memory(CONFIG, 1, (30, 64))
  with pytest.raises(ValueError, match="cannot hold the 8 pointers"):
    p3r.init_memory(CONFIG, 1, IMAGE_SIZE, capacity=7)
