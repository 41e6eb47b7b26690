"""Opens checkpoint files: torch zip files, without torch, and safetensors."""

import itertools
import os
from typing import Any

from point3r_jax.convert.plain_pickle import Inert
from point3r_jax.convert.safetensors_file import (
  is_safetensors,
  open_safetensors,
)
from point3r_jax.convert.tensor_file import (
  CheckpointFileError,
  TensorFile,
  TensorInfo,
)
from point3r_jax.convert.torch_archive import TensorView, TorchArchive

__all__ = ["CheckpointFileError", "TensorFile", "TensorInfo", "open_tensors"]

# Versions of modules, which torch keeps in an attribute and some tools in an
# entry of the state dict.
_HARMLESS_ENTRIES = frozenset({"_metadata"})


def open_tensors(path: str | os.PathLike[str]) -> TensorFile:
  """Opens the weights in a torch or safetensors file, whatever its name.

  Of a torch file these are the tensors of the state dict: the entry `model` of
  the saved dict if that is a dict of tensors, else its entry `state_dict`, else
  the saved dict itself. What lies beside it (arguments, optimizer) is not read,
  and no code in the file is run.

  Args:
    path: The file.

  Returns:
    The tensors by name. Close it, or use it in a `with` statement.

  Raises:
    CheckpointFileError: The file is missing or damaged, is of another kind, or
      holds no state dict, or one with entries that are not tensors.
  """
  path = os.fspath(path)
  head = _head(path)
  if head.startswith(b"PK\x03\x04"):
    return _open_torch(path)
  if is_safetensors(head):
    return open_safetensors(path)
  raise CheckpointFileError(f"{path} {_explain(head)}.")


def _head(path: str) -> bytes:
  """Returns the start of a file."""
  if os.path.isdir(path):
    raise CheckpointFileError(
      f"{path} is a directory; give the path of a .pth or .safetensors file."
    )
  try:
    with open(path, "rb") as file:
      return file.read(512)
  except FileNotFoundError as error:
    raise CheckpointFileError(
      f"{path} does not exist; check the path."
    ) from error
  except OSError as error:
    raise CheckpointFileError(
      f"{path} cannot be read ({error}); check its permissions."
    ) from error


def _explain(head: bytes) -> str:
  """Says what a file of another format seems to be, and what to do."""
  if not head:
    return "is empty; download it again"
  if head.startswith(b"version https://git-lfs"):
    return (
      "is a git-lfs pointer, not the checkpoint itself; run `git lfs pull` or "
      "download the file from its web page"
    )
  if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
    return (
      "is a web page, not a checkpoint, so its download failed; open the "
      "address in a browser to see why"
    )
  # A bare pickle (of protocol 2 or more) or a tar archive (magic at 257).
  if head.startswith(b"\x80") or head[257:262] == b"ustar":
    return (
      "is in the format of torch before 1.6, or some other pickle; load and "
      "re-save it with torch >= 1.6"
    )
  return (
    "is neither a torch nor a safetensors file; check the path or download it "
    "again"
  )


def _open_torch(path: str) -> TensorFile:
  """Opens a torch zip file."""
  archive = TorchArchive(path)
  try:
    views = _state_dict(path, archive.unpickle())
    infos = {name: archive.describe(name, v) for name, v in views.items()}
  except BaseException:
    archive.close()
    raise
  return TensorFile(
    path, infos, lambda name: archive.read(views[name]), archive.close
  )


def _state_dict(path: str, saved: Any) -> dict[str, TensorView]:
  """Finds the state dict in what was saved."""
  if not isinstance(saved, dict):
    raise CheckpointFileError(
      f"{path} holds an object of type {_kind(saved)} instead of a dict; save "
      "{'model': model.state_dict()}."
    )
  for candidate in (saved.get("model"), saved.get("state_dict"), saved):
    if _has_tensors(candidate):
      break
  else:
    raise CheckpointFileError(
      f"{path} holds no state dict, only {_entries(saved)}; save "
      "{'model': model.state_dict()}."
    )
  views, others = {}, {}
  for name, value in candidate.items():
    is_tensor = isinstance(name, str) and isinstance(value, TensorView)
    if name not in _HARMLESS_ENTRIES:
      (views if is_tensor else others)[name] = value
  if others:
    raise CheckpointFileError(
      f"{path} has a state dict with entries that are not tensors with a name: "
      f"{_entries(others)}; re-save it without them."
    )
  return views


def _has_tensors(value: Any) -> bool:
  return isinstance(value, dict) and any(
    isinstance(item, TensorView) for item in value.values()
  )


def _entries(values: dict[Any, Any], limit: int = 8) -> str:
  """Lists the entries of a dict for a message, without looking inside them."""
  names = [
    f"{_label(key)} ({_kind(value)})"
    for key, value in itertools.islice(values.items(), limit)
  ]
  more = len(values) - len(names)
  listed = ", ".join(names) or "an empty dict"
  return f"{listed} and {more} more" if more else listed


def _label(key: Any) -> str:
  return repr(key[:80]) if isinstance(key, str) else f"key of type {_kind(key)}"


def _kind(value: Any) -> str:
  match value:
    case Inert(name=name):
      return name[:80]
    case TensorView():
      return "tensor"
  return type(value).__name__
