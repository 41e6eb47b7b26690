"""The record: one training sequence, what every dataset gives.

A record is a dict of NumPy arrays, T views of H×W pixels each:

  image            (T, H, W, 3) uint8, RGB.
  depth            (T, H, W) float32, z-depth in the dataset's unit; 0 where
                   nothing was measured, negative for sky.
  intrinsics       (T, 3, 3) float32, pixels; centres at integer coordinates.
  camera_to_world  (T, 4, 4) float32, OpenCV axes, the dataset's world frame.
  is_metric        () bool, whether the unit is the metre.
  camera_only      () bool, only viewing rays and poses are known.
  depth_only       () bool, depth is known up to scale and shift.
  single_view      () bool, the views have nothing to do with each other.
  source, index    () int32, where it comes from: the dataset's place in the
                   mixture and the record's index in the dataset.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from point3r_jax.errors import InputError, one_line

Record = dict[str, np.ndarray]

_ARRAYS = {
  "image": (np.uint8, ("T", "H", "W", 3)),
  "depth": (np.float32, ("T", "H", "W")),
  "intrinsics": (np.float32, ("T", 3, 3)),
  "camera_to_world": (np.float32, ("T", 4, 4)),
  "is_metric": (np.bool_, ()),
  "camera_only": (np.bool_, ()),
  "depth_only": (np.bool_, ()),
  "single_view": (np.bool_, ()),
  "source": (np.int32, ()),
  "index": (np.int32, ()),
}
_OPTIONAL_FLAGS = ("camera_only", "depth_only", "single_view")

# Poses in text files have few digits; a scale or a shear is off by far more.
_RIGID_TOLERANCE = 1e-3


class SequenceSource(Protocol):
  """A dataset. Read from several threads, pickled to worker processes.

  Attributes:
    name: what error messages and checkpoints call it.
  """

  name: str

  def __len__(self) -> int:
    """How many indices there are to ask for."""

  def sequence(
    self,
    index: int,
    views: int,
    image_size: tuple[int, int],
    rng: np.random.Generator,
  ) -> Mapping[str, Any]:
    """Returns a record without `source` and `index`.

    Flags but `is_metric` may be left out: they are False then.

    Args:
      index: in [0, len).
      views: T.
      image_size: (H, W).
      rng: the only source of randomness; same state, same record.

    Raises:
      InputError: what is on disk cannot be used.
    """


def complete_record(
  record: Mapping[str, Any], source: int, index: int
) -> Record:
  """Returns what a source gave with flags and identity filled in."""
  flags = {key: np.zeros((), np.bool_) for key in _OPTIONAL_FLAGS}
  return {
    **flags,
    **{key: np.asarray(value) for key, value in record.items()},
    "source": np.asarray(source, np.int32),
    "index": np.asarray(index, np.int32),
  }


def check_record(
  record: Mapping[str, np.ndarray],
  where: str,
  views: int | None = None,
  image_size: tuple[int, int] | None = None,
) -> None:
  """Checks that a record is one, in about a millisecond.

  Args:
    record: see above.
    where: names the dataset and the record in messages.
    views: T it must have; None: any.
    image_size: (H, W) it must have; None: any.

  Raises:
    InputError: keys, types or shapes are wrong, values are not finite, a pose
      is not rigid, or a camera is not a pinhole without skew.
  """
  if record.keys() != _ARRAYS.keys():
    missing = sorted(_ARRAYS.keys() - record.keys())
    unknown = sorted(record.keys() - _ARRAYS.keys())
    raise InputError(f"{where}: lacks {missing}, has unknown {unknown}")
  sizes = {}
  if views is not None:
    sizes["T"] = views
  if image_size is not None:
    sizes["H"], sizes["W"] = image_size
  for key, value in record.items():
    _check_array(key, value, sizes, where)
  _check_values(record, where)


def _check_array(
  key: str, value: np.ndarray, sizes: dict[str, int], where: str
) -> None:
  """Checks type and shape; sizes not known yet are taken from the array."""
  dtype, axes = _ARRAYS[key]
  shape, got = np.shape(value), getattr(value, "dtype", type(value).__name__)
  if len(shape) == len(axes):
    for axis, size in zip(axes, shape, strict=True):
      if isinstance(axis, str):
        sizes.setdefault(axis, size)
  want = tuple(sizes.get(axis, axis) for axis in axes)
  if got != dtype or shape != want:
    raise InputError(
      f"{where}: {key} must be {np.dtype(dtype)} of shape "
      f"({', '.join(map(str, want))}), got {got} of shape {shape}"
    )


def _check_values(record: Mapping[str, np.ndarray], where: str) -> None:
  """Checks what the numbers mean, view by view."""

  def require(good, problem: str) -> None:
    """Takes good (T, ...) bool: what every view must be everywhere."""
    if not good.all():
      view = int(np.argmin(good.reshape(len(good), -1).all(1)))
      raise InputError(f"{where}, view {view}: {problem}")

  depth, matrix = record["depth"], record["intrinsics"]
  pose = record["camera_to_world"]
  require(
    np.isfinite(depth), "depth is not finite; 0 says that nothing was measured"
  )
  require(np.isfinite(matrix), "intrinsics are not finite")
  require(np.isfinite(pose), "camera_to_world is not finite")
  require(matrix[:, (0, 1), (0, 1)] > 0, "focal lengths must be positive")
  require(
    (matrix[:, (0, 1), (1, 0)] == 0) & (matrix[:, 2, :2] == 0),
    "intrinsics must have no skew: fx 0 cx, 0 fy cy, 0 0 1",
  )
  require(matrix[:, 2, 2] == 1, "the last row of intrinsics must be 0 0 1")
  require(
    pose[:, 3] == (0, 0, 0, 1),
    "the last row of camera_to_world must be 0 0 0 1",
  )
  rotation = pose[:, :3, :3]
  square = rotation @ rotation.swapaxes(1, 2)
  require(
    np.abs(square - np.eye(3)) < _RIGID_TOLERANCE,
    "camera_to_world is not rigid: it scales or shears",
  )
  require(
    np.linalg.det(rotation) > 0, "camera_to_world is not rigid: it reflects"
  )


def record_error(where: str, error: Exception) -> InputError:
  """Returns the error to raise where reading a record failed.

  A bug in a reader keeps its traceback, as a note.

  Args:
    where: names the record.
    error: what was raised, an `InputError` or whatever else.
  """
  if isinstance(error, InputError):
    result = InputError(f"{where}: {error}")
    notes = getattr(error, "__notes__", [])
  else:
    result = InputError(f"{where}: {type(error).__name__}: {one_line(error)}")
    # As text, because causes, and some exceptions, do not survive the way out
    # of a worker process.
    notes = ["".join(traceback.format_exception(error))]
  for note in notes:
    result.add_note(note)
  return result
