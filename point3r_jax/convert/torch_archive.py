"""The zip archive that a torch file is: its pickle, and its tensors by views.

`NAME/data.pkl` is a pickle of what was saved. In it a tensor is the call of a
rebuilding function with a storage, an offset, a size and strides; a storage is
a persistent id with a key, and its elements lie in `NAME/data/KEY`.
"""

import dataclasses
import math
import os
import zipfile
from typing import Any

import ml_dtypes
import numpy as np

from point3r_jax.convert import plain_pickle
from point3r_jax.convert.plain_pickle import Inert
from point3r_jax.convert.tensor_file import CheckpointFileError, TensorInfo

_DTYPES = {
  "torch.FloatStorage": np.float32,
  "torch.HalfStorage": np.float16,
  "torch.BFloat16Storage": ml_dtypes.bfloat16,
  "torch.DoubleStorage": np.float64,
  "torch.LongStorage": np.int64,
  "torch.IntStorage": np.int32,
  "torch.ShortStorage": np.int16,
  "torch.CharStorage": np.int8,
  "torch.ByteStorage": np.uint8,
  "torch.BoolStorage": np.bool_,
  # Types without a storage class of their own lie in untyped storages.
  "torch.uint16": np.uint16,
  "torch.uint32": np.uint32,
  "torch.uint64": np.uint64,
}

_MAX_NDIM = 32  # Of NumPy 1.
_EMPTY = 1 << 20  # Bytes of an empty tensor if lengths of 0 were 1.


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
  """A flat run of elements: its class, its key and its number of elements."""

  kind: str
  key: str
  numel: int


@dataclasses.dataclass(frozen=True, slots=True)
class TensorView:
  """A strided view of a storage, as the pickle claims it: yet to be checked.

  Attributes:
    storage: Where the elements are.
    offset: The index of the first element.
    size: The length of every axis.
    stride: The step of every axis, in elements.
    dtype: torch's name of the type of the elements or of their storage.
  """

  storage: Storage
  offset: Any
  size: Any
  stride: Any
  dtype: str


class TorchArchive:
  """An open torch file. Every error is a `CheckpointFileError`."""

  def __init__(self, path: str):
    """Opens the file.

    Args:
      path: A file that starts like a zip archive.
    """
    self.path = path
    self._size = os.path.getsize(path)
    self._root = ""
    # The last storage is kept, for models saved as many views of a large one.
    self._last: tuple[str, bytes] | None = None
    try:
      self._zip = zipfile.ZipFile(path)
    except Exception as error:
      raise CheckpointFileError(
        f"{path} is a truncated or damaged torch file ({error}); "
        "download it again."
      ) from error

  def close(self) -> None:
    """Closes the file."""
    self._last = None
    self._zip.close()

  def unpickle(self) -> Any:
    """Returns what was saved: `TensorView`s in dicts, `Inert` for the rest."""
    names = self._zip.namelist()
    pickles = [name for name in names if f"/{name}".endswith("/data.pkl")]
    if len(pickles) != 1:
      raise CheckpointFileError(
        f"{self.path} is a zip file with {len(pickles)} data.pkl inside, not a "
        "torch checkpoint; check the path."
      )
    self._root = pickles[0].removesuffix("data.pkl")
    order = self._root + "byteorder"
    if order in names and self._read(order).strip() != b"little":
      raise CheckpointFileError(
        f"{self.path} was saved on a big-endian machine; re-save it on a "
        "little-endian one."
      )
    data = self._read(pickles[0])
    try:
      return plain_pickle.load(data, _construct, _persistent_load)
    except Exception as error:
      raise CheckpointFileError(
        f"{self.path} has a malformed data.pkl ({type(error).__name__}: "
        f"{error}); download it again."
      ) from error

  def describe(self, name: str, view: TensorView) -> TensorInfo:
    """Checks what the pickle claims of a tensor.

    Args:
      name: The name of the tensor, for messages.
      view: The tensor.

    Returns:
      Its shape and dtype; it can be read now.
    """
    if view.dtype not in _DTYPES:
      raise CheckpointFileError(
        f"{self.path}: tensor {name!r} has the type {view.dtype}, which is not "
        "supported; save the weights as float32, float16 or bfloat16."
      )
    problem = self._problem(view)
    if problem:
      raise CheckpointFileError(
        f"{self.path}: tensor {name!r} {problem}; download the file again."
      )
    return TensorInfo(view.size, np.dtype(_DTYPES[view.dtype]))

  def read(self, view: TensorView) -> np.ndarray:
    """Reads a tensor for which `describe` found no fault."""
    dtype = np.dtype(_DTYPES[view.dtype])
    if 0 in view.size:
      return np.zeros(view.size, dtype)
    data = self._storage(view.storage.key)
    elements = np.frombuffer(data, dtype, count=len(data) // dtype.itemsize)
    strides = [
      # The stride of an axis of length 1 may be any number, even a huge one.
      stride * dtype.itemsize if length > 1 else 0
      for length, stride in zip(view.size, view.stride, strict=True)
    ]
    strided = np.lib.stride_tricks.as_strided(
      elements[view.offset :], view.size, strides, writeable=False
    )
    return strided.copy(order="C")

  def _problem(self, view: TensorView) -> str | None:
    """Returns what is wrong with a view, if anything."""
    if not (
      _is_length(view.storage.numel)
      and _is_length(view.offset)
      and _are_lengths(view.size)
      and _are_lengths(view.stride)
      and len(view.size) == len(view.stride) <= _MAX_NDIM
    ):
      return "has a malformed size, stride or offset"

    try:
      entry = self._zip.getinfo(f"{self._root}data/{view.storage.key}")
    except KeyError:
      return f"has no data (storage {view.storage.key!r} is missing)"
    # The length of an untyped storage is in bytes.
    itemsize = np.dtype(_DTYPES.get(view.storage.kind, np.uint8)).itemsize
    capacity = view.storage.numel * itemsize
    if entry.file_size < capacity:
      return f"has truncated data ({entry.file_size} of {capacity} bytes)"

    itemsize = np.dtype(_DTYPES[view.dtype]).itemsize
    last = view.offset + sum(
      (length - 1) * stride
      for length, stride in zip(view.size, view.stride, strict=True)
    )
    if 0 not in view.size and (last + 1) * itemsize > capacity:
      return "reaches beyond the end of its data"
    # Strides of 0 can make a few bytes into any number of elements. NumPy
    # refuses large lengths beside one of 0, too, but a few are harmless.
    nbytes = math.prod(max(length, 1) for length in view.size) * itemsize
    allowed = max(self._size, entry.file_size, _EMPTY if 0 in view.size else 0)
    if nbytes > allowed:
      return "is larger than the whole file"
    return None

  def _storage(self, key: str) -> bytes:
    """Returns the bytes of a storage."""
    if self._last is None or self._last[0] != key:
      self._last = None  # Frees the memory first.
      self._last = (key, self._read(f"{self._root}data/{key}"))
    return self._last[1]

  def _read(self, name: str) -> bytes:
    """Reads an entry of the archive and verifies its checksum."""
    try:
      entry = self._zip.getinfo(name)
      if entry.compress_size > self._size:  # Do not allocate what is not there.
        raise EOFError("it is larger than the file")
      data = self._zip.read(entry)
      if len(data) < entry.file_size:
        raise EOFError("it is too short")
      return data
    except MemoryError:
      raise
    # A damaged entry raises zlib.error, RuntimeError, NotImplementedError …
    except Exception as error:
      raise CheckpointFileError(
        f"{self.path} is damaged at {name} ({error}); download it again."
      ) from error


def _is_length(value: Any) -> bool:
  return type(value) is int and 0 <= value < 2**63


def _are_lengths(values: Any) -> bool:
  return isinstance(values, tuple) and all(map(_is_length, values))


def _persistent_load(pid: Any) -> Storage | Inert:
  """Returns the storage of a persistent id."""
  match pid:
    case ("storage", Inert(name=kind), str(key), _, int(numel)):
      return Storage(kind.replace("torch.cuda.", "torch."), key, numel)
  return Inert("an unknown persistent id")


def _construct(name: str, arguments: tuple) -> Any:
  """Returns a tensor or dict if that is what a call makes, else a stand-in."""
  match name.removeprefix("torch._utils."), arguments:
    case "_rebuild_tensor", (Storage() as storage, offset, size, stride):
      return TensorView(storage, offset, size, stride, storage.kind)
    # The rest: requires_grad, hooks, and a dict if the view is conjugated or
    # negated, which no weights are.
    case (
      "_rebuild_tensor_v2",
      (Storage() as storage, offset, size, stride, _, _, *metadata),
    ) if not any(metadata):
      return TensorView(storage, offset, size, stride, storage.kind)
    case (
      "_rebuild_tensor_v3",
      (Storage() as storage, offset, size, stride, _, _, Inert(name=dtype)),
    ):
      return TensorView(storage, offset, size, stride, dtype)
    case (
      "_rebuild_parameter" | "_rebuild_parameter_with_state",
      (TensorView() as tensor, *_),
    ):
      return tensor
    # A tensor with attributes: function, class, arguments, attributes.
    case (
      "torch._tensor._rebuild_from_type_v2",
      (Inert(name=function), _, tuple(inner), _),
    ):
      return _construct(function, inner)
    case "torch.nn.parameter.Parameter", (TensorView() as tensor, *_):
      return tensor
    case "torch.Size", (tuple(size),):
      return size
    case ("collections.OrderedDict", ()) | ("collections.defaultdict", _):
      return {}
  return Inert(name)
