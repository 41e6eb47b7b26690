"""Cameras of all frames in one JSON file, written as the run goes."""

import dataclasses
import json
import os

import numpy as np

from point3r_jax import files

_HEADER = {
  "format": "point3r-jax cameras",
  "version": 1,
  "pose_convention": (
    "camera-to-world, OpenCV axes: x right, y down, z forward; "
    "world = first camera"
  ),
  "intrinsics_convention": (
    "pinhole, 3x3 rows, in pixels of the given width and height; "
    "integer pixel coordinates are pixel centres"
  ),
  "units": (
    "lengths in the scale predicted by the model; timestamps in seconds of the "
    "video, or the index of the image"
  ),
}


@dataclasses.dataclass(frozen=True)
class CameraFrame:
  """The camera of one frame.

  Attributes:
    camera_to_world: (4, 4) rigid, OpenCV axes, world = first camera.
    intrinsics: (3, 3) in pixels of the network's input.
    image_size: (height, width) of the network's input.
    original_intrinsics: (3, 3) in pixels of the source image.
    original_size: (height, width) of the source image.
    source_file: Image or video that the frame came from.
    source_index: Index of the frame in the video or list of images.
    timestamp: Seconds of the video, or the index of an image.
    depth_file: Name of the frame's depth map, if one was written.
  """

  camera_to_world: np.ndarray
  intrinsics: np.ndarray
  image_size: tuple[int, int]
  original_intrinsics: np.ndarray
  original_size: tuple[int, int]
  source_file: str
  source_index: int
  timestamp: float
  depth_file: str | None = None


def _image(size: tuple[int, int], intrinsics: np.ndarray) -> dict:
  """The JSON fields of an image and its intrinsics."""
  height, width = size
  return {
    "width": int(width),
    "height": int(height),
    "intrinsics": np.asarray(intrinsics).tolist(),
  }


def _frame_json(frame: CameraFrame) -> str:
  """One frame as a line of JSON; raises ValueError unless all is finite."""
  fields = {
    "source_file": str(frame.source_file),
    "source_index": int(frame.source_index),
    "timestamp": float(frame.timestamp),
    "camera_to_world": np.asarray(frame.camera_to_world).tolist(),
    "network": _image(frame.image_size, frame.intrinsics),
    "original": _image(frame.original_size, frame.original_intrinsics),
    "depth_file": frame.depth_file,
  }
  return json.dumps(fields, allow_nan=False)


def _footer(complete: bool) -> bytes:
  """The end of the file, after the last frame."""
  return f'\n  ],\n  "complete": {json.dumps(complete)}\n}}\n'.encode()


class CameraWriter:
  """Writes cameras.json frame by frame; valid JSON whenever the run ends.

  The field "complete" is true only if the writer was closed, or its block left,
  without an exception.
  """

  def __init__(self, path: str | os.PathLike[str]):
    """Starts the file without frames.

    Args:
      path: Name of the file; an existing one is replaced.
    """
    header = json.dumps(_HEADER, indent=2).removesuffix("\n}")
    header += ',\n  "frames": ['
    self._file = files.AppendFile(path, header.encode(), _footer(False))
    self._separator = "\n    "
    self._closed = False

  def write(self, frame: CameraFrame) -> None:
    """Appends a frame.

    Args:
      frame: Its camera.

    Raises:
      ValueError: If a number is not finite, which JSON cannot hold; the file
        stays as it was.
    """
    self._file.append((self._separator + _frame_json(frame)).encode())
    self._separator = ",\n    "

  def close(self, complete: bool = True) -> None:
    """Closes the file; further calls have no effect.

    Args:
      complete: Whether all frames of the input were written.
    """
    if not self._closed:
      self._closed = True
      try:
        self._file.append(b"", _footer(complete))
      finally:
        self._file.close()

  def __enter__(self) -> "CameraWriter":
    """Returns the writer, which is closed at the end of the block."""
    return self

  def __exit__(self, kind: type[BaseException] | None, *_) -> None:
    """Closes the file, as incomplete after an exception."""
    self.close(complete=kind is None)
