"""Checkpoint files are read exactly, lazily, and without running them."""

import argparse
import struct
import zipfile
from collections import Counter, OrderedDict, defaultdict

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from point3r_jax.convert.torch_file import CheckpointFileError, open_tensors
from tests.convert.torch_zip import (
  LazyArray,
  Parameter,
  fake_class,
  write_torch_zip,
)

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture
def path(tmp_path):
  return tmp_path / "checkpoint.pth"


def _read_all(path):
  with open_tensors(path) as tensors:
    arrays = {name: tensors.read(name) for name in tensors}
    for name, array in arrays.items():
      assert tensors[name].shape == array.shape
      assert tensors[name].dtype == array.dtype
      assert array.flags.c_contiguous and array.flags.writeable
  return arrays


def _assert_equal(actual, expected):
  assert list(actual) == list(expected)
  for name, array in expected.items():
    assert actual[name].dtype == array.dtype, name
    np.testing.assert_array_equal(actual[name], array, err_msg=name)


def _weights():
  table = np.arange(24, dtype=np.float32).reshape(4, 6)
  return OrderedDict(
    table=table,
    again=table,
    transposed=table.T,
    window=table[1:3, ::2],
    half=table.astype(np.float16),
    bfloat=table.astype(_BFLOAT16),
    count=np.array(7),
    flag=np.array([True, False]),
    empty=np.zeros((0, 3), np.float32),
  )


class TestTorchFile:
  def test_reads_strided_shared_and_every_type(self, path):
    write_torch_zip(path, {"model": _weights(), "epoch": 3})
    _assert_equal(_read_all(path), _weights())

  @pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
  def test_every_pickle_protocol(self, path, protocol):
    write_torch_zip(path, {"model": _weights()}, protocol=protocol)
    _assert_equal(_read_all(path), _weights())

  def test_compressed_archive(self, path):
    weights = {"w": np.zeros((300, 400), np.float32)}
    write_torch_zip(path, weights, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < weights["w"].nbytes
    _assert_equal(_read_all(path), weights)

  def test_parameters(self, path):
    write_torch_zip(path, {"w": Parameter(np.ones(3, np.float32))})
    _assert_equal(_read_all(path), {"w": np.ones(3, np.float32)})

  @pytest.mark.parametrize(
    "wrap",
    [
      lambda w: {"state_dict": {"other": np.ones(1)}, "model": w},
      lambda w: {"state_dict": w, "model": "ViT-L"},
      lambda w: {"state_dict": w, "model": {"depth": 24}},
      lambda w: w,
      lambda w: {**w, "_metadata": {"": {"version": 1}}},
      lambda w: {f"module.{name}": array for name, array in w.items()},
    ],
  )
  def test_finds_the_state_dict(self, path, wrap):
    weights = {"a.weight": np.ones(2, np.float32), "a.bias": np.zeros(2)}
    write_torch_zip(path, wrap(weights))
    _assert_equal(_read_all(path), weights)

  def test_prefix_stays_unless_all_have_it(self, path):
    weights = {"module.a": np.ones(2), "b": np.ones(2)}
    write_torch_zip(path, weights)
    _assert_equal(_read_all(path), weights)

  def test_other_objects_do_no_harm(self, path):
    config_class = fake_class("omegaconf.dictconfig.DictConfig")
    config = config_class()
    config._content = {"lr": 1e-4, "parent": config, "items": [config, {1}]}
    cyclic = []
    cyclic.append(cyclic)
    args = argparse.Namespace(
      config=config,
      keys={config: 1, (1, (2, "x")): 2, None: 3, 2.5: 4, frozenset({1}): 5},
      counts=Counter("abca"),
      lists=defaultdict(list, a=[1], b=[config]),
      numbers=[np.float64(3), 10**40, -1.5, 1j, b"bytes", bytearray(b"b")],
      cyclic=cyclic,
      kind=config_class,
    )
    payload = {"args": args, "model": _weights(), "epoch": 3}
    for protocol in (2, 4):
      write_torch_zip(path, payload, protocol=protocol)
      _assert_equal(_read_all(path), _weights())

  def test_reads_only_what_is_asked_for(self, path, monkeypatch):
    def broken():
      raise AssertionError("was read")

    weights = {
      "good": np.ones(2, np.float32),
      "bad": np.full(1000, 3, np.float32),
    }
    optimizer = {"state": {0: {"exp_avg": np.full(1000, 4, np.float32)}}}
    write_torch_zip(path, {"model": weights, "optimizer": optimizer})
    data = bytearray(path.read_bytes())
    for value in (3, 4):  # Breaks their checksums.
      data[data.index(np.full(9, value, np.float32).tobytes())] ^= 1
    path.write_bytes(data)
    with open_tensors(path) as tensors:
      assert tensors["bad"].shape == (1000,)
      np.testing.assert_array_equal(tensors.read("good"), weights["good"])
      with pytest.raises(
        CheckpointFileError, match="damaged at archive/data/1"
      ):
        tensors.read("bad")

  def test_mapping(self, path):
    write_torch_zip(path, {"model": _weights()})
    with open_tensors(path) as tensors:
      assert len(tensors) == len(_weights())
      assert "table" in tensors and "tabel" not in tensors
      assert tensors["transposed"].shape == (6, 4)
      with pytest.raises(KeyError):
        tensors.read("tabel")
    with pytest.raises(ValueError, match="closed"):
      tensors.read("table")

  def test_arrays_are_independent(self, path):
    write_torch_zip(path, {"model": _weights()})
    with open_tensors(path) as tensors:
      tensors.read("table")[:] = -1
      expected = _weights()
      np.testing.assert_array_equal(tensors.read("again"), expected["again"])

  def test_lazy_arrays_are_written_like_arrays(self, tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    lazy = LazyArray(array.shape, array.dtype, lambda: array)
    write_torch_zip(tmp_path / "a", {"w": array})
    write_torch_zip(tmp_path / "b", {"w": lazy})
    _assert_equal(_read_all(tmp_path / "b"), _read_all(tmp_path / "a"))


_DTYPES = (
  *(np.float32, np.float16, _BFLOAT16, np.float64, np.bool_),
  *(np.int64, np.int32, np.int16, np.int8, np.uint8),
)


@st.composite
def _arrays(draw):
  """Arrays of any type, many of them views."""
  shape = draw(st.lists(st.integers(0, 5), max_size=4))
  dtype = np.dtype(draw(st.sampled_from(_DTYPES)))
  seed = draw(st.integers(0, 99))
  array = np.random.default_rng(seed).integers(0, 99, shape).astype(dtype)
  array = array.transpose(draw(st.permutations(range(array.ndim))))
  steps = draw(st.tuples(*[st.integers(1, 3)] * array.ndim))
  return array[(..., *(slice(None, None, step) for step in steps))]


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(max_size=5), _arrays(), min_size=1, max_size=4))
@example({"": np.zeros((0, 4, 5, 5))})  # Larger than the file but for the 0.
def test_round_trip(tmp_path_factory, arrays):
  path = tmp_path_factory.mktemp("round_trip") / "x"
  write_torch_zip(path, {"model": arrays})
  _assert_equal(_read_all(path), arrays)


class TestErrors:
  @pytest.mark.parametrize(
    ("content", "message"),
    [
      (b"", "is empty"),
      (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "before 1.6"),
      (b"\0" * 257 + b"ustar" + b"\0" * 300, "before 1.6"),
      (b"version https://git-lfs.github.com/spec/v1\noid sha", "git lfs pull"),
      (b"\n<!DOCTYPE html><html>", "web page"),
      (b"<?xml version='1.0'?><Error>", "web page"),
      (b"Entry not found", "neither a torch nor a safetensors file"),
      (b"PK\x03\x04 and no more", "truncated or damaged"),
    ],
  )
  def test_other_files(self, path, content, message):
    path.write_bytes(content)
    with pytest.raises(CheckpointFileError, match=message) as error:
      open_tensors(path)
    assert str(path) in str(error.value)

  def test_missing_and_directory(self, path, tmp_path):
    with pytest.raises(CheckpointFileError, match="does not exist"):
      open_tensors(path)
    with pytest.raises(CheckpointFileError, match="is a directory"):
      open_tensors(tmp_path)

  def test_truncated(self, path):
    write_torch_zip(path, {"model": _weights()})
    content = path.read_bytes()
    for size in range(4, len(content), 37):
      path.write_bytes(content[:size])
      with pytest.raises(CheckpointFileError, match="truncated or damaged"):
        open_tensors(path)

  def test_other_zip_file(self, path):
    np.savez(path, w=np.ones(2))
    with pytest.raises(CheckpointFileError, match=r"0 data\.pkl"):
      open_tensors(f"{path}.npz")

  def test_big_endian(self, path):
    write_torch_zip(path, {"w": np.ones(2)}, byteorder="big")
    with pytest.raises(CheckpointFileError, match="big-endian"):
      open_tensors(path)

  @pytest.mark.parametrize(
    ("payload", "message"),
    [
      ({"epoch": 3, "model": {"depth": 24}}, r"only 'epoch' \(int\), 'model'"),
      ({"model": fake_class("net.Model")()}, r"'model' \(net\.Model\)"),
      ({}, "an empty dict"),
      ([np.ones(2)], "of type list"),
      (np.ones(2), "of type tensor"),
      ({"model": {"w": np.ones(2), "n": 3}}, r"not tensors.*: 'n' \(int\)"),
      ({"model": {"w": np.ones(2), 0: np.ones(2)}}, r"type int \(tensor\)"),
      ({"model": {"w": np.ones(2), "more": {}}}, r"'more' \(dict\)"),
    ],
  )
  def test_no_usable_state_dict(self, path, payload, message):
    write_torch_zip(path, payload)
    with pytest.raises(CheckpointFileError, match=message):
      open_tensors(path)


class TestSafetensors:
  def test_reads_every_type(self, path):
    weights = {
      name: np.ascontiguousarray(array) for name, array in _weights().items()
    }
    save_file(weights, path)
    _assert_equal(_read_all(path), dict(sorted(weights.items())))

  def test_strips_the_prefix(self, path):
    save_file({"module.a": np.ones(2)}, path)
    assert list(_read_all(path)) == ["a"]

  def test_truncated(self, path):
    save_file({"a": np.ones(100)}, path)
    content = path.read_bytes()
    for size in (9, 20, len(content) // 2, len(content) - 1):
      path.write_bytes(content[:size])
      with pytest.raises(CheckpointFileError, match="not a complete"):
        open_tensors(path)

  def test_unsupported_type(self, path):
    header = b'{"a":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    with pytest.raises(CheckpointFileError, match="'a' has the type F8_E4M3"):
      open_tensors(path)


class TestAgainstTorch:
  """Needs torch, which is not among the dependencies."""

  @pytest.fixture
  def torch(self):
    return pytest.importorskip("torch")

  def test_reads_what_torch_saves(self, torch, path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
      torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2)
    )
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(5, 4)).sum().backward()
    optimizer.step()
    state = model.state_dict()
    table = torch.randn(4, 6)
    state["transposed"] = table.T
    state["window"] = table[1:3, ::2]
    state["expanded"] = table[:, :1].expand(4, 5)
    state["parameter"] = torch.nn.Parameter(table)
    state["buffer"] = torch.nn.Buffer(table)
    state["bfloat"] = table.bfloat16()
    state["half"] = table.half()
    state["uint16"] = torch.arange(3).to(torch.uint16)
    state["empty"] = torch.zeros(0, 3)
    assert state._metadata  # torch saves it as an attribute.
    payload = {
      "model": state,
      "args": argparse.Namespace(device=torch.device("cpu"), size=(1, {2})),
      "optimizer": optimizer.state_dict(),
      "scaler": {"scale": np.float32(2), "dtype": torch.float16},
      "epoch": 3,
    }
    for protocol in (2, 5):
      torch.save(payload, path, pickle_protocol=protocol)
      actual = _read_all(path)
      assert list(actual) == list(state)
      for name, tensor in state.items():
        expected = tensor.detach()
        if tensor.dtype == torch.bfloat16:
          assert actual[name].dtype == _BFLOAT16
          actual[name] = actual[name].astype(np.float32)
          expected = expected.float()
        np.testing.assert_array_equal(actual[name], expected.numpy())
        assert actual[name].dtype == expected.numpy().dtype

  def test_refuses_other_tensors_by_name(self, torch, path):
    for tensor in (torch.eye(2).to_sparse(), torch.ones(2) * 1j):
      torch.save({"w": torch.ones(1), "odd": tensor}, path)
      with pytest.raises(CheckpointFileError, match="odd"):
        open_tensors(path)

  def test_refuses_legacy_files(self, torch, path):
    torch.save({"w": torch.ones(1)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointFileError, match=r"before 1\.6"):
      open_tensors(path)

  def test_torch_reads_what_the_helper_writes(self, torch, path):
    args = argparse.Namespace(lr=1e-4)
    write_torch_zip(path, {"model": _weights(), "args": args})
    loaded = torch.load(path, weights_only=False)
    assert loaded["args"] == args
    for name, array in _weights().items():
      tensor = loaded["model"][name]
      if array.dtype == _BFLOAT16:
        assert tensor.dtype == torch.bfloat16
        tensor, array = tensor.float(), array.astype(np.float32)
      np.testing.assert_array_equal(tensor.numpy(), array)
      assert tensor.numpy().dtype == array.dtype
    table, window = loaded["model"]["table"], loaded["model"]["window"]
    assert table.untyped_storage().data_ptr() == (
      window.untyped_storage().data_ptr()
    )
