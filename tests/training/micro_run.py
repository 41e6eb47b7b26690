"""A training run of the micro model, in this process or one of its own.

  python -m tests.training.micro_run --config FILE --workdir DIR ...

KILL_AT_STEP=N in the environment kills the process, uncaught, after step N.
"""

import os
import signal

from ml_collections import ConfigDict

from configs import synthetic_tiny
from point3r_jax.config import PRESETS
from tests import micro

STEPS = 6


def get_config() -> ConfigDict:
  c = synthetic_tiny.get_config()
  c.model.preset = "micro"
  c.rollout.precision = "float32"
  c.rollout.remat = "none"
  c.rollout.sizes = 1
  c.views = 2
  c.image_sizes = (micro.IMAGE_SIZE,)
  c.batch_size = 2
  c.epochs = 1
  c.render_on_devices = False
  c.loader.workers = 0
  c.log.every = 1
  c.log.panel_every = 0
  c.optimizer.lr = 1e-3
  c.optimizer.warmup_epochs = 0.2
  c.optimizer.ema_decay = 0.9
  # What the loop does is the same for all parameters, and without gradients
  # through most of the model its step compiles in a third of the time.
  c.optimizer.freeze = (r"(?!pose_head/|camera_dense/head_)",)
  c.checkpoint.every_epochs = 2 / STEPS
  c.datasets.synthetic.samples = 2 * STEPS
  return c


def register() -> None:
  """Makes the micro model a preset."""
  PRESETS["micro"] = micro.CONFIG


def _kill_at(step: int) -> None:
  from point3r_jax.training.logs import MetricLog

  write = MetricLog.write

  def write_or_die(self, at, values):
    write(self, at, values)
    if at == step:
      os.kill(os.getpid(), signal.SIGKILL)

  MetricLog.write = write_or_die


if __name__ == "__main__":
  from point3r_jax.cli.train import main

  register()
  if "KILL_AT_STEP" in os.environ:
    _kill_at(int(os.environ["KILL_AT_STEP"]))
  main()
