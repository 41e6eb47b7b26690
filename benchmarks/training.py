"""Times training steps of the published stages on random data.

  python -m benchmarks.training --case stage1 stage2 stage3
  python -m benchmarks.training --case stage1 --fsdp 2 --profile

Prints a line of JSON for each case: median milliseconds of steps that are
waited for, with frames a second, arithmetic and its share of the device's peak;
the mean of as many steps that are not waited for, as in training; peak memory.
Arithmetic is that of the loss and its gradient at the memory's static sizes,
without what is computed again. `--case tiny` runs on a CPU in minutes.

`--xla NAME=VALUE` sets an option of the compiler, for this step alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks.profiling import profile
from configs import stage1_224, stage2_512, stage3_long, synthetic_tiny
from point3r_jax.gpu_options import load_kernels_at_the_start
from point3r_jax.params import init_params, param_shapes
from point3r_jax.training.experiment import Experiment, open_experiment
from point3r_jax.training.plan import step_flops
from point3r_jax.training.programs import Metrics, compile_step
from point3r_jax.training.sharding import batch_sharding
from point3r_jax.training.step import FLAGS

# Config, sequences a device, image size (H, W).
CASES = {
  "stage1": (stage1_224, 16, (224, 224)),
  "stage2": (stage2_512, 3, (384, 512)),
  "stage3": (stage3_long, 1, (384, 512)),
  "tiny": (synthetic_tiny, 2, (32, 48)),
}
# Dense bfloat16 operations a second, by the vendor's datasheet.
PEAKS = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12}

# Fields of a config's `rollout` that flags change.
_ROLLOUT = ("precision", "remat", "sizes", "unroll", "fusion_divisor")
_WARMUP = 2


def random_batch(
  size: int, views: int, image_size: tuple[int, int]
) -> dict[str, np.ndarray]:
  """Draws a batch of sequences: noise, depths of metres, cameras close by."""
  rng = np.random.default_rng(0)
  height, width = image_size
  poses = np.tile(np.eye(4, dtype=np.float32), (size, views, 1, 1))
  poses[..., :3, 3] = rng.normal(0, 0.3, (size, views, 3))
  camera = [[width, 0, width / 2], [0, width, height / 2], [0, 0, 1]]
  depth = rng.uniform(0.5, 5, (size, views, height, width))
  return {
    "image": rng.integers(
      0, 256, (size, views, height, width, 3), dtype=np.uint8
    ),
    "depth": depth.astype(np.float32),
    "intrinsics": np.tile(np.float32(camera), (size, views, 1, 1)),
    "camera_to_world": poses,
    **{flag: np.zeros(size, bool) for flag in FLAGS},
    "is_metric": np.arange(size) % 2 == 0,
  }


def compiler_option(word: str) -> tuple[str, bool | str]:
  """Reads NAME=VALUE."""
  name, equals, value = word.partition("=")
  if not (name and equals):
    raise argparse.ArgumentTypeError(f"{word!r} is not of the form NAME=VALUE")
  return name, {"true": True, "false": False}.get(value.lower(), value)


def add_step_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags that say which steps, for `make_config` and the compiler."""
  add = parser.add_argument
  add("--case", nargs="+", choices=CASES, default=["tiny"])
  add("--precision", help="default: the stage's")
  add("--remat", help="default: the stage's")
  add("--sizes", type=int, help="default: the stage's")
  add("--unroll", type=int, help="default: the stage's")
  add(
    "--fusion_divisor",
    type=float,
    help="default: the stage's; with 1e6 nothing is fused: no arithmetic is "
    "passed over",
  )
  add("--cuda_graphs", help="default: the stage's")
  add("--unroll_layers", help="default: the stage's")
  add(
    "--xla",
    nargs="+",
    type=compiler_option,
    default=[],
    metavar="NAME=VALUE",
    help="options of the compiler",
  )
  add("--batch", type=int, help="sequences a device")
  add("--fsdp", type=int, default=1)


def make_config(
  case: str, flags: argparse.Namespace, devices: int
) -> ConfigDict:
  """Returns a stage's config with the flags' changes."""
  module, sequences, image_size = CASES[case]
  config = module.get_config()
  config.batch_size = (flags.batch or sequences) * devices
  config.image_sizes = (image_size,)
  config.mesh.fsdp = flags.fsdp
  for field in ("cuda_graphs", "unroll_layers"):
    if getattr(flags, field) is not None:
      config[field] = getattr(flags, field)
  for field in _ROLLOUT:
    if getattr(flags, field) is not None:
      config.rollout[field] = getattr(flags, field)
  return config


def measure(experiment: Experiment, flags: argparse.Namespace) -> dict:
  """Compiles and times the step; returns what to print."""
  config, mesh = experiment.config, experiment.mesh
  (image_size,) = config.image_sizes
  started = time.perf_counter()
  compiled = compile_step(
    experiment, (config.views, *image_size), options=dict(flags.xla)
  )
  compile_seconds = time.perf_counter() - started

  step = functools.partial(Metrics(experiment).step, compiled)
  state = experiment.maker.init(init_params(experiment.step.model))
  batch = random_batch(config.batch_size, config.views, image_size)
  flops = step_flops(
    experiment.step, param_shapes(experiment.step.model), batch
  )
  batch = jax.device_put(batch, batch_sharding(mesh))
  times, losses = [], []
  for _ in range(_WARMUP + flags.steps):
    started = time.perf_counter()
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss"]))
    times.append(time.perf_counter() - started)
  times = times[_WARMUP:]
  seconds = statistics.median(times)
  started = time.perf_counter()
  for _ in range(flags.steps):
    state, metrics = step(state, batch)
  jax.block_until_ready(metrics)
  in_flight = (time.perf_counter() - started) / flags.steps
  if flags.profile:
    print(profile(step, compiled.as_text(), state, batch), flush=True)

  device = jax.devices()[0]
  rate = flops / seconds / mesh.size
  rate_in_flight = flops / in_flight / mesh.size
  peak = PEAKS.get(device.device_kind)
  memory = device.memory_stats() or {}
  return {
    "device": f"{mesh.size} x {device.device_kind}",
    "mesh": dict(mesh.shape),
    "batch": config.batch_size,
    "views": config.views,
    "image_size": image_size,
    **{x: config.rollout[x] for x in _ROLLOUT},
    "cuda_graphs": config.cuda_graphs,
    "xla": dict(flags.xla),
    "unroll_layers": experiment.step.unroll_layers,
    "ms_per_step": round(1e3 * seconds, 1),
    "ms_min_max": [round(1e3 * t, 1) for t in (min(times), max(times))],
    "ms_not_waited_for": round(1e3 * in_flight, 1),
    "frames_per_s": round(config.batch_size * config.views / seconds, 1),
    "tflop_per_step": round(flops / 1e12, 2),
    "tflop_per_s_and_device": round(rate / 1e12, 1),
    "mfu": peak and round(rate / peak, 3),
    "mfu_not_waited_for": peak and round(rate_in_flight / peak, 3),
    "peak_gib": round(memory.get("peak_bytes_in_use", 0) / 2**30, 1),
    "compile_s": round(compile_seconds, 1),
    "losses": [losses[0], losses[-1]],
    "pointers": float(metrics["pointers"]),
  }


def main() -> None:
  """Measures the cases asked for."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add_step_flags(parser)
  parser.add_argument("--steps", type=int, default=20)
  parser.add_argument(
    "--profile", action="store_true", help="also say where the time goes (GPU)"
  )
  flags = parser.parse_args()
  load_kernels_at_the_start()
  for case in flags.case:
    config = make_config(case, flags, jax.device_count())
    result = measure(open_experiment(config), flags)
    print(json.dumps({"case": case, **result}), flush=True)


if __name__ == "__main__":
  main()
