"""The configs: the published numbers, and what is said about wrong ones."""

import pathlib
from typing import NamedTuple

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from configs import synthetic_tiny
from point3r_jax.errors import InputError
from point3r_jax.training.experiment import (
  ConfigError,
  make_mixture,
  make_step_config,
  open_experiment,
)

FOLDER = pathlib.Path(__file__).parents[1] / "configs"


class Stage(NamedTuple):
  """What the published training says of a stage."""

  views: int
  sequences: int  # For each of 8 GPUs.
  epochs: int
  warmup: float
  rates: tuple[float, float]
  samples: int
  steps: int  # In an epoch.
  checkpoint: float  # Every so many epochs.
  repeat: bool  # Frames of short scenes.
  workers: int


STAGES = {
  "stage1_224": Stage(5, 16, 100, 5, (5e-5, 1e-6), 100_000, 781, 1, False, 24),
  "stage2_512": Stage(
    5, 3, 10, 0.5, (5e-5, 1e-6), 118_000, 4916, 0.1, False, 24
  ),
  "stage3_long": Stage(
    8, 1, 10, 0.5, (1e-5, 1e-6), 16_900, 2112, 0.1, True, 24
  ),
  "finetune": Stage(8, 1, 10, 0.5, (1e-6, 1e-7), 26_000, 3250, 0.1, True, 16),
}
TINY = {"pairs": 2, "views": 5, "long": 12}  # Views of its stages.
LATER = ("stage2_512", "stage3_long", "finetune")

# Samples in an epoch of the four stages, and the folder.
DATASETS = {
  "co3d": (10_000, 10_000, 2_000, 3_000, "processed_co3d"),
  "wildrgbd": (10_000, 10_000, 2_000, 3_000, "wildrgbd"),
  "arkitscenes": (10_000, 10_000, 2_000, 3_000, "processed_arkitscenes"),
  "arkitscenes_highres": (
    *(10_000, 10_000, 1_000, 1_500),
    "processed_arkitscenes_highres",
  ),
  "scannetpp": (10_000, 10_000, 1_000, 1_500, "processed_scannetpp"),
  "scannet": (10_000, 10_000, 2_000, 3_000, "processed_scannet"),
  "hypersim": (5_000, 5_000, 500, 800, "hypersim"),
  "blendedmvs": (10_000, 10_000, 1_000, 1_500, "processed_blendedmvs"),
  "megadepth": (10_000, 10_000, 1_000, 1_500, "processed_megadepth"),
  "waymo": (10_000, 10_000, 1_000, 1_500, "waymo"),
  "vkitti2": (5_000, 3_000, 800, 1_500, "processed_vkitti"),
  "omniobject3d": (0, 5_000, 800, 1_200, "omniobject3d"),
  "spring": (0, 6_000, 800, 1_200, "spring"),
  "mvs_synth": (0, 1_000, 100, 300, "mvs_synth"),
  "point_odyssey": (0, 8_000, 900, 1_500, "point_odyssey"),
}
# As (width, height), the way they were published; the first five are drawn
# twice as often.
SIZES_512 = (
  *((512, 384), (512, 336), (512, 288), (512, 256), (512, 208)),
  *((512, 144), (384, 512), (336, 512), (288, 512), (256, 512)),
)


def load(name: str, *arguments: str) -> ConfigDict:
  """Returns a config as the command line makes it."""
  values, path = flags.FlagValues(), str(FOLDER / f"{name}.py")
  line = ["train.py", *(f"--config.{argument}" for argument in arguments)]
  config_flags.DEFINE_config_file(
    "config", path, flag_values=values, sys_argv=line
  )
  values(line)
  return values.config


@pytest.mark.parametrize("name", STAGES)
def test_stages_have_the_published_numbers(name):
  stage, config = STAGES[name], load(name)
  assert config.views == stage.views
  assert config.batch_size == 8 * stage.sequences
  assert config.epochs == stage.epochs and config.seed == 0
  sizes = ((224, 224),) if name == "stage1_224" else SIZES_512
  assert config.image_sizes == tuple((height, width) for width, height in sizes)

  column = list(STAGES).index(name)
  options = {"allow_repeat": stage.repeat, "aug_crop": 16, "color_jitter": True}
  assert [
    (dataset, fields.to_dict()) for dataset, fields in config.datasets.items()
  ] == [
    (dataset, {"samples": row[column], "folder": row[-1], **options})
    for dataset, row in DATASETS.items()
    if row[column]
  ]
  assert sum(x.samples for x in config.datasets.values()) == stage.samples

  # The published run keeps the parameters of each epoch.
  assert config.checkpoint.every_epochs == stage.checkpoint
  assert config.checkpoint.keep_every_epochs == 1
  assert config.log.every == 20
  assert config.loader.workers == stage.workers


@pytest.mark.parametrize("name", STAGES)
def test_steps_of_the_stages_have_the_published_function(name):
  stage, step = STAGES[name], make_step_config(load(name))
  assert step.steps_per_epoch == stage.steps
  optimizer = step.optimizer
  assert (optimizer.lr, optimizer.min_lr) == stage.rates
  assert (optimizer.epochs, optimizer.warmup_epochs) == (
    stage.epochs,
    stage.warmup,
  )
  assert (optimizer.b1, optimizer.b2, optimizer.eps) == (0.9, 0.95, 1e-8)
  assert (optimizer.weight_decay, optimizer.clip_norm) == (0.05, 1.0)
  assert (optimizer.accumulate, optimizer.ema_decay) == (1, 0.0)
  frozen = ("encoder/",) if name in ("stage3_long", "finetune") else ()
  assert optimizer.freeze == frozen

  assert step.model.image_size == (512 if name in LATER else 224)
  assert step.model.encoder_depth == 24 and step.model.scan_layers
  rollout = step.rollout
  assert rollout.step.fusion == (name in LATER)
  assert rollout.step.precision.name == "mixed"
  assert rollout.step.rotary and rollout.step.heads == "both"
  # No pointer is lost, and gradients go through the whole sequence.
  assert rollout.capacity is None and rollout.truncate == 0
  loss = step.loss
  assert loss.per_sample == (name in LATER)
  assert (loss.alpha, loss.points_weight, loss.sky_loss) == (0.2, 2.0, 2.0)
  assert (loss.pose_weight, loss.pose_clip) == (5.0, 0.3)


@pytest.mark.parametrize("name", STAGES)
def test_all_datasets_that_are_missing_are_named_at_once(name):
  config = load(name)
  with pytest.raises(InputError) as error:
    make_mixture(config)
  count = len(config.datasets)
  assert f"{count} of {count} datasets cannot be opened" in str(error.value)
  names = ", ".join(config.datasets)
  assert str(error.value).endswith(f": {names}: no reader in this version")


def test_the_synthetic_config_needs_nothing():
  config = load("synthetic_tiny", "seed=7", "views=3")
  mixture, step = make_mixture(config), make_step_config(config)
  assert mixture.steps_per_epoch == step.steps_per_epoch == 100
  assert (mixture.seed, mixture.views) == (7, 3)
  assert mixture.image_sizes == ((96, 128),)
  assert len(mixture.parts[0][0]) == 1_000_000

  with config.ignore_type():
    config.views = (2, 4)
  mixture = make_mixture(config)
  assert {mixture.views_of(step) for step in range(50)} == {2, 3, 4}


def test_stages_of_the_synthetic_config():
  views = {stage: synthetic_tiny.get_config(stage).views for stage in TINY}
  assert views == TINY
  with pytest.raises(ValueError, match=r"unknown stage .short.*pairs"):
    synthetic_tiny.get_config("short")


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("optimizer.lrr=1e-5", "lrr"),
    ("batch=8", "batch"),
    ("optimizer.lr=fast", "fast"),
    ("views=(4, 10)", "views"),
  ],
)
def test_what_is_not_in_the_config_is_an_error(argument, message):
  with pytest.raises((AttributeError, TypeError, flags.Error), match=message):
    load("stage2_512", argument)


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("image_sizes=((97, 128),)", "97x128"),
    ("rollout.precision=float16", "unknown precision 'float16'.*bfloat16"),
    ("rollout.attention=flash", "unknown attention 'flash'"),
    ("rollout.remat=all", "unknown remat 'all'"),
    ("model.preset=large", "unknown preset 'large'.*small"),
    ("optimizer.warmup_epochs=11.0", "warmup_epochs is 11.0.*epochs = 10.0"),
    ("optimizer.lr=-1.0", "optimizer.lr is -1.0; it must be above 0"),
    ("rollout.capacity=47", "capacity is 47; one frame of 96x128 leaves 48"),
    ("datasets.synthetic.samples=0", "datasets.synthetic.samples is 0"),
    ("batch_size=25601", "25600 samples has no full batch of 25601"),
  ],
)
def test_values_without_meaning_are_named(argument, message):
  with pytest.raises(ConfigError, match=message):
    make_step_config(load("synthetic_tiny", argument))


@pytest.mark.parametrize("name", ["bach_size", "log.panels", "model.scan"])
def test_a_file_cannot_set_what_is_no_field(name):
  *outer, field = name.split(".")
  config = synthetic_tiny.get_config()
  for part in outer:
    config = config[part]
  with pytest.raises(AttributeError, match=f'"{field}" does not exist'):
    setattr(config, field, 2)


def test_a_dataset_without_samples_is_named():
  config = synthetic_tiny.get_config()
  config.datasets.rooms = ConfigDict({"folder": "rooms"})
  with pytest.raises(ConfigError, match=r"datasets\.rooms\.samples is None"):
    make_step_config(config)


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("batch_size=12", "12 does not divide over 8 devices; 8 or 16 would"),
    ("batch_size=4", "4 does not divide over 8 devices; 8 would"),
    ("image_sizes=((96.0, 128),)", "pairs of height and width, whole numbers"),
    ("image_sizes=(96, 128)", "pairs of height and width"),
    ("image_sizes=()", "pairs of height and width"),
    ("optimizer.freeze=('.*',)", "freeze leaves nothing to train"),
    ("mesh.fsdp=3", "fsdp=3 does not use 8 devices"),
    ("cuda_graphs=loops", "cuda_graphs is 'loops'.*none, bodies, all"),
    ("unroll_layers=yes", "unroll_layers is 'yes'.*never, gpu, always"),
    ("views=0", "views is 0; it must be 1 or more"),
    ("loader.workers=-1", "loader.workers is -1; it must be 0 or more"),
    (
      "checkpoint.every_epochs=nan",
      "checkpoint.every_epochs is nan; it must be 0 or more",
    ),
    ("model.rotary_bases=()", "rotary_bases must hold a base"),
  ],
)
def test_runs_that_cannot_be_are_refused(argument, message):
  with pytest.raises(ConfigError, match=message):
    open_experiment(load("synthetic_tiny", argument))


@pytest.mark.parametrize(
  ("where", "written_out"), [("never", False), ("gpu", False), ("always", True)]
)
def test_layers_are_written_out_where_asked(where, written_out):
  experiment = open_experiment(load("stage3_long", f"unroll_layers={where}"))
  assert experiment.step.unroll_layers == written_out


def test_epochs_become_steps():
  experiment = open_experiment(load("stage3_long"))
  assert experiment.total_steps == 21_120
  assert experiment.steps_of(0.1) == 211
  assert experiment.steps_of(1e-9) == 1 and experiment.steps_of(0) == 0
