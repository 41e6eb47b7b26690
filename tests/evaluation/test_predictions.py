"""Saved predictions: complete and undamaged, or not there."""

import json
import logging

import numpy as np
import pytest

from point3r_jax.data.errors import InputError
from point3r_jax.evaluation.predictions import PredictionStore
from point3r_jax.evaluation.sequences import Sequence

DEPTH = np.arange(24, dtype=np.float32).reshape(3, 2, 4)
POSE = np.ones((3, 7), np.float32)


def make_sequence(folder, name="a/b"):
  frames = [folder / f"{index}.png" for index in range(3)]
  for index, frame in enumerate(frames):
    frame.write_bytes(bytes(index + 1))
  return Sequence(name, tuple(map(str, frames)), (32, 48), lambda index: None)


def save(store, sequence, frames=(2, 0, 1)):
  writer = store.writer(sequence)
  return [
    writer.write(i, {"depth": DEPTH[i], "pose": POSE[i]}, 10 + i, i, 0.5)
    for i in frames
  ]


@pytest.fixture
def sequence(tmp_path):
  return make_sequence(tmp_path)


@pytest.fixture
def store(tmp_path):
  return PredictionStore(tmp_path / "predictions")


def test_there_and_back_in_any_order(store, sequence):
  assert store.load(sequence) is None
  assert save(store, sequence) == [False, False, True]
  found = store.load(sequence)
  np.testing.assert_array_equal(found.arrays["depth"], DEPTH)
  np.testing.assert_array_equal(found.arrays["pose"], POSE)
  assert found.pointers == [10, 11, 12] and found.overflow == 2
  assert found.seconds == [0.5] * 3


def test_half_a_sequence_is_none(store, sequence):
  save(store, sequence, frames=(0, 2))
  assert store.load(sequence) is None
  save(store, sequence)
  assert store.load(sequence) is not None
  store.writer(sequence)
  assert store.load(sequence) is None


def flip(folder):
  path = folder / "depth.npy"
  data = bytearray(path.read_bytes())
  data[-1] ^= 1
  path.write_bytes(data)


def cut(folder):
  path = folder / "depth.npy"
  path.write_bytes(path.read_bytes()[:-8])


def spoil(folder):
  (folder / "prediction.json").write_text("{")


@pytest.mark.parametrize("damage", [flip, cut, spoil])
def test_what_is_damaged_is_none(store, sequence, caplog, damage):
  save(store, sequence)
  (folder,) = (p for p in store.directory.iterdir() if p.is_dir())
  damage(folder)
  with caplog.at_level(logging.WARNING):
    assert store.load(sequence) is None
  assert "damaged" in caplog.text


def test_other_images_are_noticed(store, sequence, tmp_path, caplog):
  save(store, sequence)
  (tmp_path / "1.png").write_bytes(bytes(100))
  assert store.load(sequence) is None
  assert "is of other images" in caplog.text


def test_names_do_not_collide(store, tmp_path):
  names = ("a/b", "a__b", "a_b", "a%2Fb", "..", "A/B")
  sequences = [make_sequence(tmp_path, name) for name in names]
  for sequence in sequences:
    save(store, sequence)
  assert all(store.load(sequence) for sequence in sequences)
  assert not (tmp_path / "prediction.json").exists()


def test_what_made_them_has_to_be_the_same(store):
  with pytest.raises(InputError, match="holds no predictions to score"):
    store.manifest()
  first = {"made_by": {"model": {"width": 8}, "fusion": True}, "device": "a"}
  store.start(first)
  store.start(first | {"device": "b"})
  assert store.manifest() == first
  second = {"made_by": {"model": {"width": 9}, "fusion": True}}
  with pytest.raises(
    InputError, match=r"made otherwise: model\.width was 8 an"
  ):
    store.start(second)
  store.clear()
  store.start(second)
  assert json.loads((store.directory / "manifest.json").read_text()) == second
