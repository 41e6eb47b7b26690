"""A dataset of noise, in a module that is quick to import in a worker."""

import numpy as np


class TinySource:
  """Random records; `broken` indices raise `error` instead."""

  def __init__(self, name="tiny", length=5, broken=(), error=None):
    self.name = name
    self.length = length
    self.broken = broken
    self.error = error

  def __len__(self):
    return self.length

  def sequence(self, index, views, image_size, rng):
    if index in self.broken:
      raise self.error
    noise = rng.integers(0, 256, (views, *image_size, 3), np.uint8)
    pose = np.tile(np.eye(4, dtype=np.float32), (views, 1, 1))
    pose[:, 0, 3] = index
    return {
      "image": noise,
      "depth": np.ones((views, *image_size), np.float32),
      "intrinsics": np.tile(np.eye(3, dtype=np.float32), (views, 1, 1)),
      "camera_to_world": pose,
      "is_metric": True,
    }
