"""The order of samples, their reproducibility, and what is refused."""

import dataclasses
import json
import pickle

import chex
import numpy as np
import pytest

from point3r_jax.data import datasets
from point3r_jax.data.mixture import Mixture
from point3r_jax.data.record import check_record
from point3r_jax.errors import InputError
from tests.data.tiny_source import TinySource

SIZES = [(4, 6), (6, 4), (2, 8), (8, 2), (4, 4)]


def make_mixture(**changes):
  options = {
    "parts": [(TinySource("few", 3), 8), (TinySource("many", 40), 11)],
    "image_sizes": SIZES,
    "views": (1, 3),
    "batch_size": 4,
    "epochs": 3,
  }
  return Mixture(**{**options, **changes})


def published_epoch(lengths, samples, batch_size, epoch):
  """The published order, step by step: (dataset, index, size, views)."""
  pool = []
  for number, (length, wanted) in enumerate(zip(lengths, samples, strict=True)):
    subset = np.random.default_rng(epoch + 777).permutation(length).tolist()
    while len(subset) < wanted:
      subset += subset
    pool += [(number, index) for index in subset[:wanted]]
  rng = np.random.default_rng(epoch + 788)
  places = np.arange(len(pool))
  rng.shuffle(places)
  batches = int(np.ceil(len(pool) / batch_size))
  sizes = rng.choice(5, size=batches, p=np.array([2, 2, 1, 1, 1]) / 7)
  views = rng.integers(1, 4, size=batches)
  for k in range(len(pool) // batch_size):
    for place in places[k * batch_size : (k + 1) * batch_size]:
      yield *pool[place], SIZES[sizes[k]], views[k]


def test_order_is_the_published_one():
  mixture = make_mixture()
  assert mixture.steps_per_epoch == 4  # 19 samples, the last 3 dropped.
  assert len(mixture) == 3 * 4 * 4
  want = [
    sample
    for epoch in range(3)
    for sample in published_epoch((3, 40), (8, 11), 4, epoch)
  ]
  assert len({size for _, _, size, _ in want}) > 1
  for position in range(len(mixture)):
    record = mixture[position]
    number, index, image_size, views = want[position]
    assert (record["source"], record["index"]) == (number, index)
    assert record["image"].shape == (views, *image_size, 3)
    assert mixture.image_size_of(position // 4) == image_size


def test_one_size_and_one_number_of_views():
  mixture = make_mixture(image_sizes=[(4, 6)], views=2)
  assert {x["image"].shape for x in mixture} == {(2, 4, 6, 3)}


def test_first_half_of_the_sizes_is_twice_as_likely():
  mixture = make_mixture(
    parts=[(TinySource(), 20_000)], batch_size=1, epochs=1, views=1
  )
  drawn = [mixture.image_size_of(step) for step in range(20_000)]
  share = [drawn.count(size) / len(drawn) for size in SIZES]
  np.testing.assert_allclose(share, np.array([2, 2, 1, 1, 1]) / 7, atol=0.02)


def test_a_sample_depends_on_its_position_alone():
  mixture = make_mixture()
  records = list(mixture)
  copy = pickle.loads(pickle.dumps(mixture))
  for position in np.random.default_rng(0).permutation(len(mixture)):
    chex.assert_trees_all_equal(copy[position], records[position])


def test_samples_of_one_record_differ():
  """A record that comes again is augmented anew; so it is with another seed."""
  one = {"parts": [(TinySource(length=1), 4)], "image_sizes": [(4, 6)]}
  images = [
    record["image"].tobytes()
    for seed in (0, 1)
    for record in make_mixture(**one, views=1, seed=seed)
  ]
  assert len(set(images)) == len(images) == 2 * 3 * 4


def test_seed_changes_the_order():
  orders = [
    [(int(x["source"]), int(x["index"])) for x in make_mixture(seed=seed)]
    for seed in (0, 1)
  ]
  assert orders[0] != orders[1]


def test_no_sample_beyond_the_end():
  mixture = make_mixture()
  for position in (-1, len(mixture)):
    with pytest.raises(IndexError, match="mixture of 48 samples"):
      mixture[position]
  with pytest.raises(IndexError, match="step 12"):
    mixture.image_size_of(12)


def test_fingerprint_tells_orders_apart():
  options = {
    "parts": [(TinySource("other", 3), 8), (TinySource("many", 40), 11)],
    "image_sizes": SIZES[::-1],
    "views": 3,
    "batch_size": 3,
    "epochs": 4,
    "seed": 1,
  }
  prints = [make_mixture(**{k: v}).fingerprint() for k, v in options.items()]
  prints.append(make_mixture().fingerprint())
  assert len({json.dumps(x) for x in prints}) == 7
  assert json.loads(json.dumps(prints)) == prints


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"parts": []}, "needs a dataset"),
    ({"parts": [(TinySource("void", 0), 4)]}, "'void' is empty"),
    ({"parts": [(TinySource(), 0)]}, "'tiny': 0 samples"),
    ({"views": 0}, "views is 0"),
    ({"views": (3, 2)}, r"views is \(3, 2\)"),
    ({"image_sizes": [(4, 0)]}, r"image size \(4, 0\)"),
    ({"epochs": 0}, "epochs 0"),
    ({"batch_size": 20}, "19 samples has no full batch of 20"),
  ],
)
def test_refuses_what_makes_no_sense(changes, message):
  with pytest.raises(InputError, match=message):
    make_mixture(**changes)


def test_what_a_source_raises_names_dataset_and_record():
  source = TinySource("torn", 1, [0], KeyError("depth"))
  with pytest.raises(
    InputError, match=r"dataset 'torn', record 0: KeyError: 'depth'"
  ):
    make_mixture(parts=[(source, 4)])[0]


def test_unreadable_records_may_be_replaced(caplog):
  whole = TinySource(length=5)
  source = TinySource(length=5, broken=(1, 2), error=OSError("gone"))
  read = Mixture([(source, 5)], [(4, 6)], 2, 5, 1, replace_unreadable=2)
  sound = Mixture([(whole, 5)], [(4, 6)], 2, 5, 1)
  for position in range(5):
    index = sound.draw(position).index
    record, expected = read[position], sound[position]
    assert record["index"] == {1: 3, 2: 3}.get(index, index)
    same = np.array_equal(record["image"], expected["image"])
    assert same == (index not in source.broken)
    np.testing.assert_array_equal(record["image"], read[position]["image"])
  assert (
    "record 3 is read instead: dataset 'tiny', record 1: OSE" in caplog.text
  )
  few = dataclasses.replace(read, replace_unreadable=1)
  position = next(i for i in range(5) if sound.draw(i).index == 1)
  with pytest.raises(InputError, match="record 1: OSError: gone"):
    few[position]


def broken_record(key, change):
  record = dict(make_mixture(views=3, image_sizes=[(4, 6)])[0])
  if change is None:
    del record[key]
  elif callable(change):
    record[key] = change(record[key])
  else:
    place, value = change
    record[key] = np.array(record.get(key, 0), copy=True)
    record[key][place] = value
  return record


@pytest.mark.parametrize(
  ("key", "change", "message"),
  [
    ("is_metric", None, r"lacks \['is_metric'\]"),
    ("label", ((), 1), r"unknown \['label'\]"),
    ("is_metric", lambda x: 1.0, "is_metric must be bool of shape .*got float"),
    ("image", lambda x: x / 255, "image must be uint8 .* got float64"),
    ("depth", lambda x: x[:, :3], r"depth .* \(3, 4, 6\), got .* \(3, 3, 6\)"),
    ("intrinsics", lambda x: x[:2], r"intrinsics .* \(3, 3, 3\), got"),
    ("depth", ((2, 0, 1), np.inf), "view 2: depth is not finite"),
    ("intrinsics", ((0, 0, 0), np.nan), "view 0: intrinsics are not finite"),
    ("intrinsics", ((1, 0, 0), -1), "view 1: focal lengths must be positive"),
    ("intrinsics", ((1, 0, 1), 0.1), "view 1: .* no skew"),
    ("intrinsics", ((1, 2, 2), 2), "view 1: the last row"),
    ("camera_to_world", ((1, 0, 3), np.nan), "view 1: .* not finite"),
    ("camera_to_world", ((1, 3, 0), 1), "view 1: the last row"),
    ("camera_to_world", ((1, 0, 0), 1.1), "view 1: .* scales or shears"),
    ("camera_to_world", ((1, 0, 0), -1), "view 1: .* reflects"),
  ],
)
def test_a_bad_record_is_named_with_its_view(key, change, message):
  record = broken_record(key, change)
  with pytest.raises(InputError, match=f"^here.*{message}"):
    check_record(record, "here")


def test_a_source_must_give_what_it_was_asked_for():
  class Small(TinySource):
    def sequence(self, index, views, image_size, rng):
      return super().sequence(index, views, (2, 2), rng)

  with pytest.raises(InputError, match=r"'tiny', record \d: image .* got"):
    make_mixture(parts=[(Small(), 4)], image_sizes=[(4, 6)])[0]


def test_open_sources_lists_all_that_is_missing(monkeypatch, tmp_path):
  monkeypatch.setitem(
    datasets._FACTORIES,
    "synthetic",
    lambda *, length, root=None: TinySource("synthetic", length),
  )
  fine = ("synthetic", 10, {"length": 3, "root": tmp_path})
  [(source, samples)] = datasets.open_sources([fine])
  assert (source.name, len(source), samples) == ("synthetic", 3, 10)
  with pytest.raises(InputError) as caught:
    datasets.open_sources(
      [
        ("co3d", 10, {"root": tmp_path}),
        ("waymo", 10, {"root": tmp_path}),
        fine,
        ("synthetic", 10, {"length": 3, "root": tmp_path / "gone"}),
        ("scanet", 10, {}),
        ("synthetic", 10, {"width": 3}),
      ]
    )
  message = str(caught.value)
  assert "5 of 6 datasets" in message
  assert "co3d, waymo: no reader in this version; " in message
  assert f"synthetic: there is no folder {tmp_path / 'gone'}" in message
  assert "scanet: unknown name; known are synthetic" in message
  assert "unexpected keyword argument 'width'" in message
