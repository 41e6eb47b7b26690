"""Stage 3 of the published training: eight views, the image encoder frozen.

  python train.py --config configs/stage3_long.py --workdir runs/stage3 \
    --config.init_from runs/stage2

The published run: 8 GPUs with 1 sequence each, 2112 steps an epoch, 10 epochs.

Expected: weights for longer sequences. Of this stage no scores are known, the
published ones being of the released weights; with data it was not run here. A
step with one GPU's sequence at 512×384, the largest shape, takes 192 ms on an
H200 (benchmarks/README.md; bfloat16): at that rate 1.1 hours on eight.
"""

from ml_collections import ConfigDict

from configs import base, stage2_512


def get_config() -> ConfigDict:
  """Returns the config."""
  c = stage2_512.get_config()
  c.views = 8
  c.batch_size = 8
  c.optimizer.lr, c.optimizer.min_lr = 1e-5, 1e-6
  c.optimizer.freeze = ("encoder/",)
  c.datasets = base.published_datasets(
    {
      "co3d": 2_000,
      "wildrgbd": 2_000,
      "arkitscenes": 2_000,
      "arkitscenes_highres": 1_000,
      "scannetpp": 1_000,
      "scannet": 2_000,
      "hypersim": 500,
      "blendedmvs": 1_000,
      "megadepth": 1_000,
      "waymo": 1_000,
      "vkitti2": 800,
      "omniobject3d": 800,
      "spring": 800,
      "mvs_synth": 100,
      "point_odyssey": 900,
    },
    allow_repeat=True,
  )
  return c
