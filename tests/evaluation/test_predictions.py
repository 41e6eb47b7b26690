"""Saved predictions: complete and undamaged, or not there."""

import io
import json
import logging
import pathlib

import numpy as np
import pytest

from point3r_jax.errors import InputError
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


def test_what_something_else_made_is_none(store, sequence, caplog):
  """Such as what is left where a clearing was cut short."""
  store.start({"made_by": {"model": 1}})
  save(store, sequence)
  (store.directory / "manifest.json").unlink()
  store.start({"made_by": {"model": 2}})
  assert store.load(sequence) is None
  assert "made by something else" in caplog.text


def test_a_full_disk_is_an_error(store, sequence, monkeypatch):
  """Not a signal, as it would be where files are mapped into memory."""
  opened = pathlib.Path.open

  class Full(io.FileIO):
    def write(self, data):
      if self.tell() > 1000:
        raise OSError(28, "No space left on device")
      return super().write(data)

  def open_full(path, mode="r", *args, **kwargs):
    if path.suffix == ".npy":
      return Full(path, "w")
    return opened(path, mode, *args, **kwargs)

  monkeypatch.setattr(pathlib.Path, "open", open_full)
  writer = store.writer(sequence)
  writer.write(0, {"depth": np.zeros((30, 40))}, 1, 0, 0.1)
  with pytest.raises(OSError, match="No space left"):
    writer.write(1, {"depth": np.zeros((30, 40))}, 1, 0, 0.1)


@pytest.mark.parametrize("text", ["[]", "{}", '{"arrays": []}', "null"])
def test_facts_that_are_none(store, sequence, text, caplog):
  save(store, sequence)
  (folder,) = (p for p in store.directory.iterdir() if p.is_dir())
  (folder / "prediction.json").write_text(text)
  assert store.load(sequence) is None
  (store.directory / "manifest.json").write_text(text)
  with pytest.raises(InputError, match=r"manifest\.json is damaged"):
    store.manifest()


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
