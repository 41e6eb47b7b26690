"""Stage 1 of the published training: 224×224, five views, no fusion.

  python train.py --config configs/stage1_224.py --workdir runs/stage1 \
    --config.init_from DUSt3R_ViTLarge_BaseDecoder_512_dpt.pth

The published run: 8 GPUs, 16 sequences each, 781 steps an epoch, 100 epochs.

Expected: weights that know pointers, at this size and for short sequences, to
begin stage 2 with. Of this stage no scores are known, the published ones being
of the released weights; with data it was not run here. A step with one GPU's 16
sequences takes 252 ms on an H200 (benchmarks/README.md; bfloat16): at that rate
5.5 hours on eight.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """Returns the config."""
  c = base.get_config()
  c.model.preset = "point3r_224"
  c.views = 5
  c.image_sizes = ((224, 224),)
  c.batch_size = 128
  c.epochs = 100
  c.loader.workers = 24  # Published for each GPU; here of a process.
  c.rollout.fusion = False
  c.loss.per_sample = False
  c.optimizer.lr, c.optimizer.min_lr = 5e-5, 1e-6
  c.optimizer.warmup_epochs = 5.0
  c.checkpoint.every_epochs = 1.0
  c.checkpoint.keep_every_epochs = 1.0
  c.datasets = base.published_datasets(
    {
      "co3d": 10_000,
      "wildrgbd": 10_000,
      "arkitscenes": 10_000,
      "arkitscenes_highres": 10_000,
      "scannetpp": 10_000,
      "scannet": 10_000,
      "hypersim": 5_000,
      "blendedmvs": 10_000,
      "megadepth": 10_000,
      "waymo": 10_000,
      "vkitti2": 5_000,
    },
    allow_repeat=False,
  )
  return c
