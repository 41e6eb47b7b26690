"""The model of the embedded checkpoint: small, on synthetic scenes alone.

Stages in the spirit of the published ones, each from the last one's
parameters; one GPU, no data. Scenes are rendered where the model is trained.

  python train.py --config configs/synthetic_tiny.py:pairs --workdir runs/pairs
  python train.py --config configs/synthetic_tiny.py:views \
    --workdir runs/views --config.init_from runs/pairs
  python train.py --config configs/synthetic_tiny.py:long \
    --workdir runs/long --config.init_from runs/views

and the last one again on other scenes, for nearly twice as long:

  python train.py --config configs/synthetic_tiny.py:long \
    --workdir runs/longer --config.init_from runs/long \
    --config.seed 1 --config.epochs 19

On one H200 they take 2, 6, 5 and 10 minutes (115, 245 and 421 ms a step with
its rendering, medians) and one or two each to compile. This gave the checkpoint
`tiny`: on 64 sequences of 24 frames of the test split depth is off by 10.9 %
(one scale for a sequence; the same depth everywhere: 48 %), paths by 6.1 % of
their length (before the last command: 11.8 % and 6.0 %). Losses of different
steps do not compare: they are in units of the mean distance of those points
that the model trusts.

Without a GPU, loader processes render as fast as the device:
`--config.render_on_devices=False`.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from configs import base

_EPOCHS = 10


class _Stage(NamedTuple):
  """Views, sequences a step, steps, highest learning rate, memory fusion."""

  views: int
  batch: int
  steps: int
  rate: float
  fusion: bool


_STAGES = {
  "pairs": _Stage(2, 256, 1_000, 2e-3, False),
  "views": _Stage(5, 256, 1_500, 2e-3, False),
  "long": _Stage(12, 128, 750, 1e-3, True),
}


def get_config(stage: str = "pairs") -> ConfigDict:
  """Returns the config of a stage: pairs, views or long."""
  if stage not in _STAGES:
    raise ValueError(f"unknown stage {stage!r}; there are {list(_STAGES)}")
  views, batch, steps, rate, fusion = _STAGES[stage]
  c = base.get_config()
  c.model.preset = "tiny"
  c.views = views
  c.image_sizes = ((96, 128),)
  c.batch_size = batch
  c.epochs = _EPOCHS
  c.rollout.fusion = fusion
  c.rollout.precision = "bfloat16"
  c.rollout.attention = "xla"
  c.rollout.remat = "elementwise"
  # Launches decide: fewer rows in more programs would save nothing.
  c.rollout.sizes, c.rollout.unroll = 2, 1
  # Above its clip the pose has no gradient; fresh parameters begin there.
  c.loss.pose_clip = 1e3
  c.optimizer.name = "muon"
  c.optimizer.lr, c.optimizer.min_lr = rate, 1e-6
  c.optimizer.warmup_epochs = 0.5
  c.render_on_devices = True
  c.cuda_graphs = "all"
  c.checkpoint.every_epochs = 1.0
  c.checkpoint.keep_every_epochs = 0.0
  c.log.panel_every = 0
  # Of most sequences the shape alone counts: errors of scale, which a picture
  # hardly shows, would outweigh it.
  c.datasets.synthetic = ConfigDict(
    {"samples": batch * steps // _EPOCHS, "scenes": 1_000_000, "metric": 0.25}
  )
  return c
