"""Camera trajectories in the TUM text format."""

import os

import numpy as np

from point3r_jax import files


def tum_line(timestamp: float, pose: np.ndarray) -> str:
  """Formats one pose; note that TUM puts the real part of quaternions last.

  Args:
    timestamp: Seconds. Written with as many digits as identify the float64.
    pose: (7,) camera-to-world translation and quaternion w, x, y, z.

  Returns:
    "timestamp tx ty tz qx qy qz qw" without a line end.

  Raises:
    ValueError: If a number is not finite.
  """
  tx, ty, tz, qw, qx, qy, qz = np.asarray(pose, np.float64)
  values = [tx, ty, tz, qx, qy, qz, qw]
  if not np.isfinite([timestamp, *values]).all():
    raise ValueError(f"Not a finite pose at {timestamp}: {pose}.")
  time = np.format_float_positional(np.float64(timestamp), trim="0")
  # Nine digits identify a float32.
  return " ".join([time, *(f"{value:.9g}" for value in values)])


class TrajectoryWriter:
  """Writes a TUM trajectory line by line; valid whenever the run ends."""

  def __init__(self, path: str | os.PathLike[str]):
    """Starts the file.

    Args:
      path: Name of the file; an existing one is replaced.
    """
    header = b"# timestamp tx ty tz qx qy qz qw\n"
    self._file = files.AppendFile(path, header)

  def write(self, timestamp: float, pose: np.ndarray) -> None:
    """Appends a pose: see `tum_line`.

    Args:
      timestamp: Seconds.
      pose: (7,) camera-to-world translation and quaternion w, x, y, z.
    """
    self._file.append(f"{tum_line(timestamp, pose)}\n".encode("ascii"))

  def close(self) -> None:
    """Closes the file."""
    self._file.close()

  def __enter__(self) -> "TrajectoryWriter":
    """Returns the writer, which is closed at the end of the block."""
    return self

  def __exit__(self, *_) -> None:
    """Closes the file."""
    self.close()
