"""A read-only file of named tensors, whatever its format."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Self

import numpy as np

from point3r_jax.errors import UserError

_WRAPPER_PREFIX = "module."


class CheckpointFileError(UserError):
  """A checkpoint file cannot be read; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
  """What is known of a tensor before it is read.

  Attributes:
    shape: The length of every axis.
    dtype: The NumPy type of its elements, as `TensorFile.read` returns them.
  """

  shape: tuple[int, ...]
  dtype: np.dtype


class TensorFile(Mapping[str, TensorInfo]):
  """The tensors of an open checkpoint file, by name; a context manager.

  As a mapping it describes the tensors without reading them; `read` reads one:

      with open_tensors("point3r_512.pth") as tensors:
        for name, info in tensors.items():
          print(name, info.shape, info.dtype)
        weight = tensors.read("dec_norm.weight")

  If every name in the file starts with `module.` (a model that was saved inside
  a data-parallel wrapper), the names are given without it.

  Attributes:
    path: The file, for messages.
    metadata: Words that the file holds beside the tensors, by their names.
  """

  path: str
  metadata: Mapping[str, str]

  def __init__(
    self,
    path: str | os.PathLike[str],
    infos: Mapping[str, TensorInfo],
    read: Callable[[str], np.ndarray],
    close: Callable[[], None],
    metadata: Mapping[str, str] | None = None,
  ):
    """Wraps an open file; `open_tensors` is the public way to get one.

    Args:
      path: The file, for messages.
      infos: The tensors by their names in the file.
      read: Reads the tensor of this name in the file.
      close: Lets go of the file.
      metadata: What else the file says.
    """
    wrapped = all(name.startswith(_WRAPPER_PREFIX) for name in infos)
    prefix = _WRAPPER_PREFIX if wrapped else ""
    self.path = os.fspath(path)
    self.metadata = dict(metadata or {})
    self._names = {name.removeprefix(prefix): name for name in infos}
    self._infos = dict(infos)
    self._read = read
    self._close = close
    self._closed = False

  def __getitem__(self, name: str) -> TensorInfo:
    """Returns shape and dtype of a tensor without reading it."""
    return self._infos[self._names[name]]

  def __iter__(self) -> Iterator[str]:
    """Iterates over the names, in the order of the file."""
    return iter(self._names)

  def __len__(self) -> int:
    """Returns the number of tensors."""
    return len(self._names)

  def read(self, name: str) -> np.ndarray:
    """Reads one tensor.

    Args:
      name: A name of this mapping.

    Returns:
      A new, contiguous, writable array.

    Raises:
      KeyError: There is no tensor of this name.
      CheckpointFileError: The tensor's data is damaged.
    """
    if self._closed:
      raise ValueError(f"{self.path} is closed")
    return self._read(self._names[name])

  def close(self) -> None:
    """Closes the file; tensors already read stay valid."""
    self._closed = True
    self._close()

  def __enter__(self) -> Self:
    """Returns the file itself."""
    return self

  def __exit__(self, *exception: object) -> None:
    """Closes the file."""
    self.close()
