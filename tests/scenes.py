"""Frames to be written, of one small size."""

import numpy as np

from point3r_jax.data.frames import Frame
from point3r_jax.data.images import Preparation

SIZE = (16, 32)


def frame(index: int, value: int = 100) -> Frame:
  """Returns a frame whose pixels all have one value."""
  return Frame(
    image=np.full((*SIZE, 3), value, np.uint8),
    preparation=Preparation(SIZE, SIZE, (0, 0), SIZE),
    source="film",
    index=index,
    timestamp=None,
  )
