"""Stage 2 of the published training: ten shapes at 512, five views, fusion.

  python train.py --config configs/stage2_512.py --workdir runs/stage2 \
    --config.init_from runs/stage1

The published run: 8 GPUs with 3 sequences each, 4916 steps an epoch, 10 epochs.

Expected: weights for images of the size and shapes that reconstruction uses and
for memories that are fused, to begin stage 3 with. Of this stage no scores are
known, the published ones being of the released weights; with data it was not
run here. A step with one GPU's 3 sequences at 512×384, the largest shape, takes
210 ms on an H200 (benchmarks/README.md; bfloat16): at that rate 3 hours on
eight.
"""

from ml_collections import ConfigDict

from configs import base

# (height, width); the first half is drawn twice as often as the rest.
IMAGE_SIZES = (
  (384, 512),
  (336, 512),
  (288, 512),
  (256, 512),
  (208, 512),
  (144, 512),
  (512, 384),
  (512, 336),
  (512, 288),
  (512, 256),
)


def get_config() -> ConfigDict:
  """Returns the config."""
  c = base.get_config()
  c.views = 5
  c.image_sizes = IMAGE_SIZES
  c.batch_size = 24
  c.epochs = 10
  c.loader.workers = 24  # Published for each GPU; here of a process.
  c.optimizer.lr, c.optimizer.min_lr = 5e-5, 1e-6
  c.optimizer.warmup_epochs = 0.5
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
      "vkitti2": 3_000,
      "omniobject3d": 5_000,
      "spring": 6_000,
      "mvs_synth": 1_000,
      "point_odyssey": 8_000,
    },
    allow_repeat=False,
  )
  return c
