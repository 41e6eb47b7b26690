"""Opens checkpoint files: torch zip files, without torch, and safetensors.

A torch file (since torch 1.6) is a zip archive. `NAME/data.pkl` is a pickle of
what was saved; in it a tensor is a call of a rebuilding function with a
storage, offset, size and strides, and a storage is a persistent id with a key.
The elements of the storage lie in `NAME/data/KEY`, little-endian. The pickle is
read as data, see `plain_pickle`: no code in it is run.
"""

import dataclasses
import os
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from point3r_jax.convert import plain_pickle
from point3r_jax.convert.plain_pickle import Inert
from point3r_jax.convert.safetensors_file import is_safetensors, open_safetensors
from point3r_jax.convert.tensor_file import (
  CheckpointFileError,
  TensorFile,
  TensorInfo,
)

__all__ = ["CheckpointFileError", "TensorFile", "TensorInfo", "open_tensors"]

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
_DOWNLOAD = "download it again"


def open_tensors(path: str | os.PathLike[str]) -> TensorFile:
  """Opens the weights in a torch or safetensors file, whatever it is called.

  Of a torch file these are the tensors of the state dict: the entry `model` of
  the saved dict if that is a dict of tensors, else its entry `state_dict`, else
  the saved dict itself. What lies beside it (arguments, optimizer) is not read.

  Args:
    path: The file.

  Returns:
    The tensors by name. Close it, or use it in a `with` statement.

  Raises:
    CheckpointFileError: The file is missing or damaged, is of another kind, or
      holds no state dict or an unusual one.
  """
  path = os.fspath(path)
  if os.path.isdir(path):
    raise CheckpointFileError(
      f"{path} is a directory; give the path of a .pth or .safetensors file."
    )
  try:
    with open(path, "rb") as file:
      head = file.read(512)
  except FileNotFoundError as error:
    raise CheckpointFileError(
      f"{path} does not exist; check the path."
    ) from error
  except OSError as error:
    raise CheckpointFileError(
      f"{path} cannot be read ({error.strerror}); check its permissions."
    ) from error
  if head.startswith(b"PK\x03\x04"):
    return _open_torch(path)
  if is_safetensors(head):
    return open_safetensors(path)
  raise CheckpointFileError(f"{path} {_explain(head)}.")


def _explain(head: bytes) -> str:
  """Says what a file in neither format seems to be, and what to do."""
  if not head:
    return f"is empty; {_DOWNLOAD}"
  if head.startswith(b"version https://git-lfs"):
    return (
      "is a git-lfs pointer, not the checkpoint itself; fetch it with "
      "`git lfs pull` or download it from its page"
    )
  if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
    return (
      "is a web page, not a checkpoint; the download failed, open its address "
      "in a browser"
    )
  # A bare pickle (of protocol 2 or more), or a tar archive (magic at 257).
  if head.startswith(b"\x80") or head[257:262] == b"ustar":
    return (
      "is in the format of torch before 1.6 (or some other pickle); load and "
      "re-save it with torch >= 1.6"
    )
  return (
    f"is neither a torch nor a safetensors file; check the path or {_DOWNLOAD}"
  )


@dataclasses.dataclass(frozen=True, slots=True)
class _Storage:
  """A flat run of elements in the archive: its class, key and length."""

  kind: str
  key: str
  numel: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Tensor:
  """A strided view of a storage, as the pickle claims it; not yet checked."""

  storage: _Storage
  offset: Any
  size: Any
  stride: Any
  dtype: str  # A key of _DTYPES, if it is a supported one.


def _persistent_load(pid: Any) -> _Storage | Inert:
  """Returns the storage of a persistent id."""
  match pid:
    case ("storage", Inert(name=kind), str(key), _, int(numel)):
      return _Storage(kind.replace("torch.cuda.", "torch."), key, numel)
  return Inert("an unknown persistent id")


def _construct(name: str, arguments: tuple) -> Any:
  """Returns a tensor or dict if that is what a call makes, else a stand-in."""
  match name.removeprefix("torch._utils."), arguments:
    case "_rebuild_tensor", (_Storage() as storage, offset, size, stride):
      return _Tensor(storage, offset, size, stride, storage.kind)
    # The rest: requires_grad, hooks, and a dict if the view is conjugated or
    # negated, which no weights are.
    case (
      "_rebuild_tensor_v2",
      (_Storage() as storage, offset, size, stride, _, _, *metadata),
    ) if not any(metadata):
      return _Tensor(storage, offset, size, stride, storage.kind)
    case (
      "_rebuild_tensor_v3",
      (_Storage() as storage, offset, size, stride, _, _, Inert(name=dtype), *_),
    ):
      return _Tensor(storage, offset, size, stride, dtype)
    case (
      "_rebuild_parameter"
      | "_rebuild_parameter_with_state"
      | "torch.nn.parameter.Parameter",
      (_Tensor() as tensor, *_),
    ):
      return tensor
    # A tensor with attributes: function, class, arguments, attributes.
    case (
      "torch._tensor._rebuild_from_type_v2",
      (Inert(name=function), Inert(), tuple(inner), _),
    ):
      return _construct(function, inner)
    case "collections.OrderedDict", ():
      return {}
    case "collections.defaultdict", _:
      return {}
  return Inert(name)


def _open_torch(path: str) -> TensorFile:
  """Opens a torch zip file."""
  try:
    archive = _Archive(path)
  except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
    raise CheckpointFileError(
      f"{path} is a truncated or damaged torch file ({error}); {_DOWNLOAD}."
    ) from error
  try:
    tensors = _state_dict(path, _unpickle(path, archive))
    infos = {
      name: _checked_info(path, archive, name, tensor)
      for name, tensor in tensors.items()
    }
  except BaseException:
    archive.close()
    raise
  return TensorFile(
    path, infos, lambda name: archive.read_tensor(tensors[name]), archive.close
  )


class _Archive:
  """The zip archive of a torch file."""

  def __init__(self, path: str):
    self.path = path
    self.size = os.path.getsize(path)
    self._zip = zipfile.ZipFile(path)
    self._root = ""
    self._last: tuple[str, bytes] | None = None

  def close(self) -> None:
    self._last = None
    self._zip.close()

  def pickle(self) -> bytes:
    """Returns the pickle, and remembers the folder that it is in."""
    pickles = [
      name
      for name in self._zip.namelist()
      if name.rpartition("/")[2] == "data.pkl"
    ]
    if len(pickles) != 1:
      raise CheckpointFileError(
        f"{self.path} is a zip file with {len(pickles)} data.pkl inside, not a "
        "torch checkpoint; check the path."
      )
    self._root = pickles[0].removesuffix("data.pkl")
    order = self._root + "byteorder"
    if order in self._zip.namelist() and self._read(order).strip() != b"little":
      raise CheckpointFileError(
        f"{self.path} was saved on a big-endian machine; re-save it on a "
        "little-endian one."
      )
    return self._read(pickles[0])

  def storage_size(self, key: str) -> int | None:
    """Returns the bytes in a storage, or None if there is no such storage."""
    try:
      return self._zip.getinfo(f"{self._root}data/{key}").file_size
    except KeyError:
      return None

  def read_tensor(self, tensor: _Tensor) -> np.ndarray:
    """Reads a tensor that has been checked."""
    dtype = np.dtype(_DTYPES[tensor.dtype])
    elements = np.frombuffer(
      self._storage(tensor.storage.key), np.uint8
    )
    elements = elements[: elements.size // dtype.itemsize * dtype.itemsize]
    view = np.lib.stride_tricks.as_strided(
      elements.view(dtype)[tensor.offset :],
      tensor.size,
      [stride * dtype.itemsize for stride in tensor.stride],
      writeable=False,
    )
    return view.copy(order="C")

  def _storage(self, key: str) -> bytes:
    # The last one is kept for models that were saved as views of one storage.
    if self._last is None or self._last[0] != key:
      self._last = None
      self._last = key, self._read(f"{self._root}data/{key}")
    return self._last[1]

  def _read(self, name: str) -> bytes:
    """Reads an entry and checks its checksum."""
    info = self._zip.getinfo(name)
    try:
      if info.compress_size > self.size:
        raise zipfile.BadZipFile("it is larger than the file")
      data = self._zip.read(info)
      if len(data) != info.file_size:
        raise zipfile.BadZipFile("it is too short")
    except MemoryError:
      raise
    # A damaged entry can raise anything: zlib.error, EOFError, RuntimeError …
    except Exception as error:
      raise CheckpointFileError(
        f"{self.path} is damaged at {name} ({error}); {_DOWNLOAD}."
      ) from error
    return data


def _unpickle(path: str, archive: _Archive) -> Any:
  """Returns what was saved, with `_Tensor`s for the tensors."""
  data = archive.pickle()
  try:
    return plain_pickle.load(data, _construct, _persistent_load)
  except Exception as error:
    raise CheckpointFileError(
      f"{path} has a malformed data.pkl ({type(error).__name__}: {error}); "
      f"{_DOWNLOAD}."
    ) from error


def _state_dict(path: str, saved: Any) -> dict[str, _Tensor]:
  """Finds the state dict in what was saved."""
  saved = saved if isinstance(saved, dict) else {"": saved}
  for candidate in (saved.get("model"), saved.get("state_dict"), saved):
    if _has_tensors(candidate):
      break
  else:
    keys = ", ".join(_describe(key, value) for key, value in saved.items())
    raise CheckpointFileError(
      f"{path} holds no state dict, only {_shorten(keys)}; save "
      "{'model': model.state_dict()}."
    )
  # Module versions, which some tools save as an entry.
  entries = {key: v for key, v in candidate.items() if key != "_metadata"}
  others = {
    key: value
    for key, value in entries.items()
    if not (isinstance(key, str) and isinstance(value, _Tensor))
  }
  if others:
    names = ", ".join(_describe(key, value) for key, value in others.items())
    raise CheckpointFileError(
      f"{path} has a state dict with entries that are not tensors or have no "
      f"name: {_shorten(names)}; re-save it without them."
    )
  return entries


def _has_tensors(value: Any) -> bool:
  return isinstance(value, dict) and any(
    isinstance(item, _Tensor) for item in value.values()
  )


def _describe(key: Any, value: Any) -> str:
  """Names an entry of a dict, without looking inside it."""
  key = key if isinstance(key, str) else type(key).__name__
  kind = value.name if isinstance(value, Inert) else type(value).__name__
  return f"{key} ({kind})" if key else f"an object of type {kind}"


def _shorten(text: str, limit: int = 300) -> str:
  return text if len(text) <= limit else text[:limit] + " …"


def _checked_info(
  path: str, archive: _Archive, name: str, tensor: _Tensor
) -> TensorInfo:
  """Returns shape and dtype of a tensor after checking its claims."""
  if tensor.dtype not in _DTYPES:
    raise CheckpointFileError(
      f"{path}: tensor {name!r} has the type {tensor.dtype}, which is not "
      "supported; save the weights as float32, float16 or bfloat16."
    )
  dtype = np.dtype(_DTYPES[tensor.dtype])
  problem = _view_problem(tensor) or _size_problem(archive, tensor, dtype)
  if problem:
    raise CheckpointFileError(
      f"{path}: tensor {name!r} {problem}; the file is damaged, {_DOWNLOAD}."
    )
  return TensorInfo(tensor.size, dtype)
