"""Fine-tunes the released weights, as published: eight views, small steps.

  python convert_torch_weights.py --input point3r_512.pth \
    --output checkpoints/point3r_512
  python train.py --config configs/finetune.py --workdir runs/finetune \
    --config.init_from checkpoints/point3r_512

The published run: 8 GPUs with 1 sequence each, 3250 steps an epoch, 10 epochs.

Expected: weights near the released ones that suit these data, or yours, better.
No scores are known of what the published run gave; with data it was not run
here. A step costs what it does in stage 3, 192 ms at the largest shape: at that
rate 2 hours on eight H200.
"""

from ml_collections import ConfigDict

from configs import base, stage3_long


def get_config() -> ConfigDict:
  """Returns the config."""
  c = stage3_long.get_config()
  c.loader.workers = 16
  c.optimizer.lr, c.optimizer.min_lr = 1e-6, 1e-7
  c.datasets = base.published_datasets(
    {
      "co3d": 3_000,
      "wildrgbd": 3_000,
      "arkitscenes": 3_000,
      "arkitscenes_highres": 1_500,
      "scannetpp": 1_500,
      "scannet": 3_000,
      "hypersim": 800,
      "blendedmvs": 1_500,
      "megadepth": 1_500,
      "waymo": 1_500,
      "vkitti2": 1_500,
      "omniobject3d": 1_200,
      "spring": 1_200,
      "mvs_synth": 300,
      "point_odyssey": 1_500,
    },
    allow_repeat=True,
  )
  return c
