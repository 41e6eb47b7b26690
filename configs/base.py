"""All fields of a training config, with the published model's defaults.

Not a run of its own: the other files of this folder start from it. Any field
can be changed on the command line, `--config.optimizer.lr=1e-5`; a name that
is not here is an error.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the defaults."""
  c = ConfigDict()

  # The model: a preset of point3r_jax.config; scan_layers stacks the parameters
  # of like layers, see unroll_layers.
  c.model = ConfigDict()
  c.model.preset = "point3r_512"
  c.model.scan_layers = True
  c.model.rotary_bases = (10.0, 100.0, 1000.0, 10000.0)

  # Where to start, unless the workdir has a checkpoint: a checkpoint directory
  # or workdir of ours, a .pth or .safetensors file of Point3R or DUSt3R, or ""
  # for fresh parameters.
  c.init_from = ""
  c.seed = 0

  # Data. An epoch takes so many samples of each dataset; other fields of a
  # dataset are its reader's options, `folder` is in `data_root`. Their order
  # counts: it decides which sample comes when.
  c.data_root = "data"
  c.datasets = ConfigDict(sort_keys=False)
  c.views = 5
  c.image_sizes = ((224, 224),)  # (height, width); one is drawn for each batch.
  c.batch_size = 128  # Sequences a step, over all devices.
  c.epochs = 100

  # Synthetic scenes can be rendered on the devices that train, instead of by
  # the loader; `synthetic` is the only dataset then.
  c.render_on_devices = False

  # How many records, the next ones of a dataset, may be tried in the place of
  # one that cannot be read, with a warning. 0: the run ends.
  c.replace_unreadable = 0

  # The loader: worker processes (0: this one's threads), threads in each,
  # batches made ahead by each.
  c.loader = ConfigDict()
  c.loader.workers = 8
  c.loader.threads = 4
  c.loader.prefetch = 2

  # How sequences are run; see training.rollout and streaming.StepOptions.
  c.rollout = ConfigDict()
  c.rollout.fusion = True
  c.rollout.fusion_divisor = 20.0
  c.rollout.rotary = True
  c.rollout.precision = "mixed"
  c.rollout.attention = "auto"
  c.rollout.remat = "none"
  c.rollout.remat_frames = False
  c.rollout.truncate = 0
  c.rollout.capacity = 0  # 0: room for all pointers.
  c.rollout.sizes = 4
  c.rollout.unroll = 2

  # The loss; see losses.LossOptions.
  c.loss = ConfigDict()
  c.loss.per_sample = True
  c.loss.alpha = 0.2
  c.loss.points_weight = 2.0
  c.loss.pose_weight = 5.0
  c.loss.pose_clip = 0.3
  c.loss.sky_loss = 2.0

  # The optimiser; see training.optimizer.OptimizerOptions. `epochs` is above.
  c.optimizer = ConfigDict()
  c.optimizer.name = "adamw"
  c.optimizer.lr = 5e-5
  c.optimizer.min_lr = 1e-6
  c.optimizer.warmup_epochs = 5.0
  c.optimizer.weight_decay = 0.05
  c.optimizer.b1 = 0.9
  c.optimizer.b2 = 0.95
  c.optimizer.eps = 1e-8
  c.optimizer.clip_norm = 1.0
  c.optimizer.accumulate = 1
  c.optimizer.freeze = ()
  c.optimizer.ema_decay = 0.0

  # What GPUs launch as CUDA graphs: "none", "bodies" of loops, "all". Measured:
  # benchmarks/README.md.
  c.cuda_graphs = "bodies"

  # Where the stacked layers of encoders and decoders are written out one after
  # the other in a step's program: "never", "gpu" or "always". That saves copies
  # and takes longer to compile.
  c.unroll_layers = "gpu"

  # The mesh: -1 takes the devices that the other axis leaves. `rules` are pairs
  # of an expression for a parameter's path and "fsdp" or "replicate".
  c.mesh = ConfigDict()
  c.mesh.data = -1
  c.mesh.fsdp = 1
  c.mesh.rules = ((".*", "fsdp"),)

  # Checkpoints: one every so many epochs, of which the last few are kept, and
  # those of every so many epochs for good (0: none).
  c.checkpoint = ConfigDict()
  c.checkpoint.every_epochs = 0.1
  c.checkpoint.keep_last = 2
  c.checkpoint.keep_every_epochs = 1.0

  # Logs: a line every so many steps, a picture every so many (0: none).
  c.log = ConfigDict()
  c.log.every = 20
  c.log.panel_every = 1000

  # The run stops after so many steps in a row whose loss was not finite.
  c.max_streak = 10

  # So a misspelt field is an error in files that start from here, too.
  c.lock()
  c.datasets.unlock()
  return c


def published_datasets(
  samples: dict[str, int], allow_repeat: bool
) -> ConfigDict:
  """Returns the datasets of a published stage, in its order.

  Their readers are yet to come, but a run is resumed only with the options that
  it began with: those that the published stages set are all here.

  Args:
    samples: dataset → samples in an epoch.
    allow_repeat: whether scenes with fewer frames than views are used, too,
      some of their frames more than once.
  """
  options = {
    "allow_repeat": allow_repeat,
    "aug_crop": 16,  # A view is scaled to up to 15 pixels more, then cropped.
    "color_jitter": True,  # The same for all views of a sequence.
  }
  folders = {
    "co3d": "processed_co3d",
    "arkitscenes": "processed_arkitscenes",
    "arkitscenes_highres": "processed_arkitscenes_highres",
    "scannetpp": "processed_scannetpp",
    "scannet": "processed_scannet",
    "blendedmvs": "processed_blendedmvs",
    "megadepth": "processed_megadepth",
    "vkitti2": "processed_vkitti",
    "omniobject3d": "omniobject3d",
  }
  return ConfigDict(
    {
      name: ConfigDict(
        {"samples": count, "folder": folders.get(name, name), **options}
      )
      for name, count in samples.items()
    },
    sort_keys=False,
  )
