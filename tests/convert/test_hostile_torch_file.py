"""Hostile and damaged checkpoint files run nothing and crash nothing."""

import contextlib
import copyreg
import pickle
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from point3r_jax.convert.torch_file import CheckpointFileError, open_tensors
from tests.convert.torch_zip import write_archive


@pytest.fixture
def path(tmp_path):
  return tmp_path / "checkpoint.pth"


def _read(path):
  """Returns the only tensor of a file."""
  with open_tensors(path) as tensors:
    (name,) = tensors
    return tensors.read(name)


def _calls(name: str, text: str) -> dict[str, bytes]:
  """Returns every way to pickle a call of a global with one string."""
  module, _, function = name.rpartition(".")
  function_code = f"c{module}\n{function}\n".encode()
  text_code = f"V{text}\n".encode()
  return {
    "REDUCE": function_code + text_code + b"\x85R",
    "OBJ": b"(" + function_code + text_code + b"o",
    "INST": b"(" + text_code + f"i{module}\n{function}\n".encode(),
    "STACK_GLOBAL": (
      f"V{module}\nV{function}\n".encode() + b"\x93" + text_code + b"\x85R"
    ),
    "EXT1": b"\x82\xf0" + text_code + b"\x85R",
    "EXT4": b"\x84\xf0\0\0\0" + text_code + b"\x85R",
  }


def _attacks(canary: str) -> dict[str, bytes]:
  """Returns pickled values that make the directory `canary` when loaded."""
  attacks = _calls("os.mkdir", canary)
  attacks["system"] = _calls("os.system", f"mkdir {canary}")["REDUCE"]
  make = f"__import__('os').mkdir('{canary}')"
  attacks["eval"] = _calls("builtins.eval", make)["REDUCE"]
  attacks["exec"] = _calls("builtins.exec", make)["INST"]
  # getattr(__import__("os"), "mkdir")(canary)
  attacks["getattr"] = (
    b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(Vos\ntRVmkdir\ntR"
    + f"(V{canary}\ntR".encode()
  )
  # bytes(map(os.mkdir, [canary])), where bytes runs through the map.
  arguments = f"(cos\nmkdir\n(V{canary}\nlt".encode()
  for how, code in {"NEWOBJ": b"\x81", "NEWOBJ_EX": b"}\x92"}.items():
    mapped = b"cbuiltins\nmap\n" + arguments + code
    attacks[how] = b"cbuiltins\nbytes\n" + mapped + b"\x85" + code
  # An object of a new class, to which os.mkdir gives its state.
  attacks["BUILD"] = (
    b"cbuiltins\ntype\n(VX\n)}V__setstate__\ncos\nmkdir\nstR)R"
    + f"V{canary}\nb".encode()
  )
  return attacks


@pytest.fixture
def extension_code():
  copyreg.add_extension("os", "mkdir", 240)
  yield
  copyreg.remove_extension("os", "mkdir", 240)


_DATA = np.arange(4, dtype=np.float32)


def _tensor(
  numel=4, offset=0, size=(4,), stride=(1,), *, key="0", kind="FloatStorage"
) -> bytes:
  """Returns the code of a tensor."""
  pid = b"(Vstorage\n" + f"ctorch\n{kind}\n".encode()
  pid += _code(key) + _code("cpu") + _code(numel) + b"tQ"
  arguments = _code(offset) + _code(size) + _code(stride) + b"\x89Nt"
  return b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid + arguments + b"R"


def _code(value) -> bytes:
  """Returns the code of a plain value, without memo."""
  if isinstance(value, tuple):
    return b"(" + b"".join(map(_code, value)) + b"t"
  if isinstance(value, str):
    return f"V{value}\n".encode()
  return pickle.dumps(value, 2)[2:-1]


def _checkpoint(weight: bytes, args: bytes = b"N") -> bytes:
  """Returns the pickle of {"args": args, "model": {"w": weight}}."""
  return b"\x80\x02}(Vargs\n" + args + b"Vmodel\n}Vw\n" + weight + b"su."


def _nested_rebuilding(depth: int) -> bytes:
  """Returns the code of a call that is to make the same call, and so on."""
  function = b"ctorch._tensor\n_rebuild_from_type_v2\n"
  arguments = (b"(" + function + b"N") * depth + b")" + b"Nt" * depth
  return function + arguments + b"R"


class TestHostilePickle:
  @pytest.mark.parametrize("attack", _attacks(""))
  def test_nothing_runs(self, path, tmp_path, attack, extension_code):
    canary = tmp_path / "canary"
    code = _attacks(str(canary))[attack]
    with contextlib.suppress(TypeError):
      pickle.loads(b"\x80\x02" + code + b".")
    assert canary.exists(), "the attack itself does not work"
    canary.rmdir()

    write_archive(path, _checkpoint(_tensor(), args=code), [("0", _DATA)])
    np.testing.assert_array_equal(_read(path), _DATA)
    write_archive(path, _checkpoint(code), [("0", _DATA)])
    with pytest.raises(CheckpointFileError, match="no state dict"):
      open_tensors(path)
    write_archive(path, b"\x80\x02" + code + b".")
    with pytest.raises(CheckpointFileError, match="instead of a dict"):
      open_tensors(path)
    assert not canary.exists()

  @pytest.mark.parametrize(
    "args",
    {
      "state of a function": b"ctorch._utils\n_rebuild_tensor_v2\n}Vx\nNsb",
      "state of a dict": b"}}Vitems\nNsb",
      "list as key": b"}]Ns",
      "dict as key": b"}}Ns",
      "object as key": b"}cos\nsystem\nNs",
      "tensor as key": b"}" + _tensor() + b"Ns",
      "list in set": b"\x8f(]\x90",
      "items of an object": b"cos\nsystem\n(Va\nNVb\nNu(NNeNa",
      "call of a dict": b"})R",
      "call with a list": b"cos\nsystem\n]R",
      "number as storage": b"K\x01Q",
      "text as storage": b"Pstorage\n",
      "storage without a key": b"(Vstorage\ntQ",
      "tensor without a storage": b"ctorch._utils\n_rebuild_tensor_v2\n)R",
      "name of a number": b"K\x01K\x02\x93",
      "out-of-band buffer": b"\x97\x98",
      "deep tuple": b"N" + b"\x85" * 10**5,
      "deep tuple as key": b"}N" + b"\x85" * 10**5 + b"Ns",
      "deep dict": b"".join([b"}", b"Va\n}" * 10**4, b"s" * 10**4]),
      "dict in itself": b"}p0\nVa\ng0\ns",
    }.items(),
    ids=lambda item: item[0],
  )
  def test_odd_objects_are_inert(self, path, args):
    write_archive(path, _checkpoint(_tensor(), args=args[1]), [("0", _DATA)])
    np.testing.assert_array_equal(_read(path), _DATA)

  @pytest.mark.parametrize(
    "pickled",
    [
      b"",
      b"}",  # No end.
      b".",  # Nothing on the stack.
      b"\xff",
      b"t.",
      b"\x85.",
      b"}Na.",
      b"h\x07.",
      b"}(Vodd\nu.",
      b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",
      b"I" + b"9" * 5000 + b"\n.",
      _checkpoint(_nested_rebuilding(10**5)),
    ],
    ids=lambda pickled: repr(pickled[:9]),
  )
  def test_malformed(self, path, pickled):
    write_archive(path, pickled)
    with pytest.raises(CheckpointFileError):
      open_tensors(path)

  @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Of STRING.
  @settings(max_examples=200, deadline=None)
  @given(st.data())
  def test_random_damage(self, tmp_path_factory, data):
    pickled = bytearray(_checkpoint(_tensor(), args=b"cos\nsystem\n)R}b"))
    places = st.integers(0, len(pickled) - 1)
    for place in data.draw(st.lists(places, min_size=1, max_size=4)):
      pickled[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damage") / "x"
    write_archive(path, bytes(pickled), [("0", _DATA)])
    with contextlib.suppress(CheckpointFileError):
      _read(path)


class TestClaimsOfTensors:
  @pytest.mark.parametrize(
    ("tensor", "expected"),
    [
      (_tensor(size=(2,), stride=(3,)), [0, 3]),
      (_tensor(offset=3, size=(), stride=()), 3),
      (_tensor(offset=1, size=(2, 2), stride=(1, 1)), [[1, 2], [2, 3]]),
      (_tensor(size=(2, 3), stride=(1, 0)), [[0, 0, 0], [1, 1, 1]]),
      (_tensor(size=(1, 4), stride=(2**62, 1)), [[0, 1, 2, 3]]),
      (_tensor(numel=2, size=(2,)), [0, 1]),
      (_tensor(offset=9, size=(0, 2), stride=(2**62, 9)), np.zeros((0, 2))),
      (_tensor(kind="cuda.FloatStorage"), [0, 1, 2, 3]),
    ],
    ids=lambda _: "",
  )
  def test_valid_view(self, path, tensor, expected):
    write_archive(path, _checkpoint(tensor), [("0", _DATA)])
    np.testing.assert_array_equal(_read(path), expected)

  @pytest.mark.parametrize(
    ("tensor", "message"),
    [
      (_tensor(size=(5,)), "beyond the end"),
      (_tensor(offset=1), "beyond the end"),
      (_tensor(size=(2, 2), stride=(3, 1)), "beyond the end"),
      (_tensor(numel=2), "beyond the end"),
      (_tensor(size=(2,), stride=(2**62,)), "beyond the end"),
      (_tensor(numel=5), r"truncated data \(16 of 20 bytes\)"),
      (_tensor(numel=10**12, size=(10**12,)), "truncated data"),
      (_tensor(size=(10**12,), stride=(0,)), "larger than the whole file"),
      (_tensor(size=(0, 10**12), stride=(1, 1)), "larger than the whole file"),
      (_tensor(key="1"), "storage '1' is missing"),
      (_tensor(key="../data.pkl"), "is missing"),
      (_tensor(size=(-1,)), "malformed"),
      (_tensor(offset=-1), "malformed"),
      (_tensor(stride=(-1,)), "malformed"),
      (_tensor(size=(2, 2)), "malformed"),
      (_tensor(size=4), "malformed"),
      (_tensor(size=("4",)), "malformed"),
      (_tensor(offset=None), "malformed"),
      (_tensor(numel=10**5000), "malformed"),
      (_tensor(size=(1,) * 33, stride=(1,) * 33), "malformed"),
      (_tensor(kind="ComplexFloatStorage"), "torch.ComplexFloatStorage"),
      (_tensor(kind="storage.UntypedStorage"), "not supported"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
  )
  def test_invalid_view(self, path, tensor, message):
    write_archive(path, _checkpoint(tensor), [("0", _DATA)])
    with pytest.raises(CheckpointFileError, match=message):
      open_tensors(path)

  def test_directory_that_lies(self, path):
    claim = _tensor(numel=2**32, size=(2**32,))
    write_archive(path, _checkpoint(claim), [("0", _DATA)])
    data = path.read_bytes()
    # Sizes of entries over 4 GiB are in an extra field of the directory.
    with zipfile.ZipFile(path) as archive:
      start = archive.start_dir
    entry = data.rindex(b"archive/data/0") - 46
    assert entry >= start
    name = data[entry + 46 : entry + 60]
    extra = struct.pack("<HHQQ", 1, 16, 2**34, 2**34)
    header = bytearray(data[entry : entry + 46])
    header[20:28] = b"\xff" * 8
    header[30:32] = struct.pack("<H", len(extra))
    rest = data[entry + 60 :]
    end = bytearray(rest[-22:])
    size = struct.unpack("<I", end[12:16])[0]
    end[12:16] = struct.pack("<I", size + len(extra))
    path.write_bytes(data[:entry] + header + name + extra + rest[:-22] + end)
    with (
      open_tensors(path) as tensors,
      pytest.raises(CheckpointFileError, match="larger than the file"),
    ):
      tensors.read("w")
