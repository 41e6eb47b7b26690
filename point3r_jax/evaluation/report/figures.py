"""What the pictures of a report show: plain data of chosen sequences."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from point3r_jax.errors import InputError

MAX_SHOWN = 6  # Trajectories, depth maps, clouds, plots: of each.


@dataclasses.dataclass(frozen=True)
class TrajectoryFigure:
  """A true path and the predicted one.

  Attributes:
    name: of the sequence.
    truth: (T, 3) positions; the top view is right if x is to the right, y down
      and z forward, as in the frame of the first true camera.
    prediction: (T, 3) positions, aligned with the truth.
    error: the headline error in words.
    unit: of both.
  """

  name: str
  truth: np.ndarray
  prediction: np.ndarray
  error: str
  unit: str = "m"


@dataclasses.dataclass(frozen=True)
class DepthFigure:
  """A frame with its true and its predicted depth.

  Attributes:
    name: of the sequence.
    frame: its index.
    image: (H, W, 3) uint8; may be of another size than the maps.
    prediction: (H, W) z-depth, aligned with the truth.
    truth: (H, W) z-depth, metres; not positive or not finite: unknown.
    error: the frame's error in words.
  """

  name: str
  frame: int
  image: np.ndarray
  prediction: np.ndarray
  truth: np.ndarray
  error: str


@dataclasses.dataclass(frozen=True)
class CloudFigure:
  """A true point cloud and the predicted one.

  Attributes:
    name: of the sequence.
    truth: (N, 3) metres; axes as for `TrajectoryFigure`.
    prediction: (M, 3), aligned with the truth.
    colors: (M, 3) uint8, of the predicted points; None: one colour.
    error: the headline error in words.
  """

  name: str
  truth: np.ndarray
  prediction: np.ndarray
  colors: np.ndarray | None = None
  error: str = ""


@dataclasses.dataclass(frozen=True)
class Figures:
  """What a report shows of chosen sequences; the first `MAX_SHOWN` of each."""

  trajectories: Sequence[TrajectoryFigure] = ()
  depths: Sequence[DepthFigure] = ()
  clouds: Sequence[CloudFigure] = ()


def choose(errors: Sequence[float], count: int = MAX_SHOWN) -> list[int]:
  """Returns which to show: evenly by rank, from the best to the worst.

  Args:
    errors: one a candidate; those that are not finite are the worst.
    count: how many at most.
  """
  values = np.asarray(errors, np.float64)
  order = np.argsort(
    np.where(np.isfinite(values), values, np.inf), kind="stable"
  )
  picks = np.linspace(0, len(order) - 1, min(count, len(order)))
  return order[np.rint(picks).astype(int)].tolist()


def require_matplotlib() -> None:
  """Raises `InputError` if plots cannot be drawn."""
  try:
    import matplotlib.figure  # noqa: F401
  except ImportError as error:
    raise InputError(
      "reports need matplotlib: pip install point3r-jax[eval]"
    ) from error
