"""Streams of the micro model, for tests of several files."""

import numpy as np

import point3r_jax as p3r
from tests import micro

FRAMES = 6
OPEN = []


def images(frames: int = FRAMES) -> np.ndarray:
  """Returns (T, H, W, 3) uint8 images of one stream."""
  return micro.images(frames, 1)[:, 0]


def make_stream(**options) -> p3r.Stream:
  """Opens a stream; it compiles what it needs only, unless told otherwise.

  The fixture `finished_streams` waits for what it compiles.
  """
  options = {"compile_ahead": 1.0, **options}
  OPEN.append(
    p3r.Stream(
      micro.SCANNED, micro.scanned_params(), micro.IMAGE_SIZE, **options
    )
  )
  return OPEN[-1]
