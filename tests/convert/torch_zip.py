"""Writes torch zip files without torch, for tests."""

import dataclasses
import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class LazyArray:
  """An array that is made only when its elements are written."""

  shape: tuple[int, ...]
  dtype: Any
  make: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Parameter:
  """Wraps an array that is to be saved as a `torch.nn.Parameter`."""

  data: np.ndarray | LazyArray


def fake_class(name: str) -> type:
  """Returns a class with a dotted name, such as one of a missing package."""
  module, _, name = name.rpartition(".")
  return type(name, (), {"__module__": module})


def _fake_function(name: str) -> Callable[..., None]:
  def function(*_):
    raise AssertionError("exists to be named in a pickle")

  function.__module__, _, function.__qualname__ = name.rpartition(".")
  return function


_rebuild_tensor = _fake_function("torch._utils._rebuild_tensor_v2")
_rebuild_parameter = _fake_function("torch._utils._rebuild_parameter")

_STORAGE_CLASSES = {
  np.dtype(dtype): fake_class(f"torch.{name}Storage")
  for dtype, name in {
    np.float32: "Float",
    np.float16: "Half",
    ml_dtypes.bfloat16: "BFloat16",
    np.float64: "Double",
    np.int64: "Long",
    np.int32: "Int",
    np.int16: "Short",
    np.int8: "Char",
    np.uint8: "Byte",
    np.bool_: "Bool",
  }.items()
}


@dataclasses.dataclass(frozen=True, eq=False)
class _Storage:
  key: str
  source: np.ndarray | LazyArray  # Contiguous, if it is an array.

  @property
  def numel(self) -> int:
    return math.prod(self.source.shape)

  def elements(self) -> np.ndarray:
    lazy = isinstance(self.source, LazyArray)
    array = self.source.make() if lazy else self.source
    assert array.shape == self.source.shape
    assert array.dtype == np.dtype(self.source.dtype)
    return np.ascontiguousarray(array)


# The pickler written in Python, because only it lets globals be written that
# cannot be imported.
class _Pickler(pickle._Pickler):
  dispatch: ClassVar = dict(pickle._Pickler.dispatch)

  def __init__(self, file: io.BytesIO, protocol: int):
    super().__init__(file, protocol)
    self.storages: dict[int, _Storage] = {}  # By the id of their source.

  def save_global(self, obj, name=None):
    name = name or obj.__qualname__
    module = pickle.whichmodule(obj, name)
    self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())
    self.memoize(obj)

  dispatch[type(_rebuild_tensor)] = save_global

  def persistent_id(self, obj):
    if not isinstance(obj, _Storage):
      return None
    storage_class = _STORAGE_CLASSES[np.dtype(obj.source.dtype)]
    return "storage", storage_class, obj.key, "cpu", obj.numel

  def reducer_override(self, obj):
    if isinstance(obj, Parameter):
      return _rebuild_parameter, (obj.data, True, OrderedDict())
    if isinstance(obj, LazyArray):
      axes = range(len(obj.shape))
      stride = tuple(math.prod(obj.shape[axis + 1 :]) for axis in axes)
      return self._tensor(obj, 0, obj.shape, stride)
    if isinstance(obj, np.ndarray):
      source = obj
      while isinstance(source.base, np.ndarray):
        source = source.base
      if not source.flags.c_contiguous or min(obj.strides, default=0) < 0:
        obj = source = np.array(obj, order="C")
      start, address = (a.__array_interface__["data"][0] for a in (source, obj))
      offset = (address - start) // obj.itemsize
      stride = tuple(step // obj.itemsize for step in obj.strides)
      return self._tensor(source, offset, obj.shape, stride)
    return NotImplemented

  def _tensor(self, source, offset, size, stride):
    storage = self.storages.setdefault(
      id(source), _Storage(str(len(self.storages)), source)
    )
    arguments = (storage, offset, size, stride, False, OrderedDict())
    return _rebuild_tensor, arguments


def write_torch_zip(
  path: Path,
  payload: Any,
  *,
  root: str = "archive",
  byteorder: str = "little",
  compression: int = zipfile.ZIP_STORED,
  protocol: int = 2,
) -> None:
  """Writes what `torch.save(payload, path)` would, with arrays for tensors.

  Arrays become tensors, and views of one array share its storage. One tensor is
  in memory at a time while the data of `LazyArray`s is written.

  Args:
    path: The file to write.
    payload: Arrays, `LazyArray`s and `Parameter`s in any other objects. Classes
      and functions are saved by name, and need not be importable.
    root: The folder in the archive.
    byteorder: What the file claims.
    compression: Of the archive; torch uses none.
    protocol: Of the pickle.
  """
  pickled = io.BytesIO()
  pickler = _Pickler(pickled, protocol)
  pickler.dump(payload)
  storages = (
    (storage.key, storage.elements()) for storage in pickler.storages.values()
  )
  write_archive(
    path,
    pickled.getvalue(),
    storages,
    root=root,
    byteorder=byteorder,
    compression=compression,
  )


def write_archive(
  path: Path,
  pickled: bytes,
  storages: Iterable[tuple[str, np.ndarray]] = (),
  *,
  root: str = "archive",
  byteorder: str = "little",
  compression: int = zipfile.ZIP_STORED,
) -> None:
  """Writes a torch zip file with this pickle and these storages, by key."""
  with zipfile.ZipFile(path, "w", compression) as archive:
    archive.writestr(f"{root}/data.pkl", pickled)
    archive.writestr(f"{root}/byteorder", byteorder)
    for key, elements in storages:
      entry = zipfile.ZipInfo(f"{root}/data/{key}")
      entry.compress_type = compression
      with archive.open(entry, "w", force_zip64=True) as file:
        file.write(elements.reshape(-1).view(np.uint8))
    archive.writestr(f"{root}/version", "3\n")
