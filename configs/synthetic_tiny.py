"""A small model on rendered scenes: needs no data, one device is enough.

  python train.py --config configs/synthetic_tiny.py --workdir runs/tiny

Scenes are rendered as they are needed, on the CPU.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """Returns the config."""
  c = base.get_config()
  c.model.preset = "small"
  c.views = 5
  c.image_sizes = ((96, 128),)
  c.batch_size = 16
  c.epochs = 20
  c.loader.workers = 2
  c.optimizer.lr, c.optimizer.min_lr = 3e-4, 1e-6
  c.optimizer.warmup_epochs = 1.0
  c.checkpoint.every_epochs = 0.5
  c.log.panel_every = 200
  c.datasets.synthetic = ConfigDict({"samples": 16_000, "scenes": 100_000})
  return c
