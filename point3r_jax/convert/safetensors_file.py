"""Reads safetensors files."""

import contextlib
import os

import ml_dtypes
import numpy as np
import safetensors

from point3r_jax.convert.tensor_file import (
  CheckpointFileError,
  TensorFile,
  TensorInfo,
)

_DTYPES = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U64": np.uint64,
  "U32": np.uint32,
  "U16": np.uint16,
  "U8": np.uint8,
  "BOOL": np.bool_,
}


def is_safetensors(head: bytes) -> bool:
  """Tells from its first 9 bytes if a file is in the safetensors format.

  Args:
    head: The start of the file: the length of the header, then the header,
      which is a JSON object.

  Returns:
    If this is the start of a safetensors file.
  """
  longest = 100_000_000  # The limit of the safetensors library.
  return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= longest


def open_safetensors(path: str | os.PathLike[str]) -> TensorFile:
  """Opens a safetensors file.

  Args:
    path: The file.

  Returns:
    Its tensors.

  Raises:
    CheckpointFileError: The file is damaged or holds an unsupported type.
  """
  path = os.fspath(path)
  with contextlib.ExitStack() as stack:
    try:
      file = stack.enter_context(safetensors.safe_open(path, framework="numpy"))
      infos = {name: _info(path, file, name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
      raise CheckpointFileError(
        f"{path} is not a complete safetensors file ({error}); "
        "download or save it again."
      ) from error
    close = stack.pop_all().close
  return TensorFile(path, infos, file.get_tensor, close, file.metadata())


def _info(path: str, file: safetensors.safe_open, name: str) -> TensorInfo:
  """Returns shape and dtype of a tensor."""
  tensor = file.get_slice(name)
  dtype = tensor.get_dtype()
  if dtype not in _DTYPES:
    raise CheckpointFileError(
      f"{path}: tensor {name!r} has the type {dtype}, which is not supported; "
      "save the weights as float32, float16 or bfloat16."
    )
  return TensorInfo(tuple(tensor.get_shape()), np.dtype(_DTYPES[dtype]))
