"""Times training steps of the full-size model on random data.

  python benchmarks/training.py --case stage1
  python benchmarks/training.py --case stage1 stage2 stage3 --precision mixed

Prints a line of JSON for each case: median milliseconds a step, frames a
second, arithmetic a step and the share of the device's peak that it makes, peak
memory. Arithmetic is that of the forward and backward pass, without what is
computed again, at the memory's static size.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.profile_report import report
from point3r_jax.config import preset
from point3r_jax.losses import LossOptions
from point3r_jax.params import param_shapes
from point3r_jax.streaming import StepOptions
from point3r_jax.training.flops import count_flops
from point3r_jax.training.optimizer import (
  OptimizerOptions,
  make_optimizer,
  merge,
  split_frozen,
)
from point3r_jax.training.rollout import RolloutOptions
from point3r_jax.training.sharding import batch_sharding, make_mesh
from point3r_jax.training.state import StateMaker
from point3r_jax.training.step import StepConfig, sequence_loss, train_step

# Views, batch a device, image size (H, W), fusion, frozen parameters.
CASES = {
  "stage1": (5, 16, (224, 224), False, ()),
  "stage2": (5, 3, (384, 512), True, ()),
  "stage3": (8, 1, (384, 512), True, ("encoder/",)),
  "tiny": (3, 2, (32, 48), True, ()),
}
# Dense bfloat16 operations a second, by the vendor's datasheet.
PEAKS = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12}


def random_params(config):
  """Draws parameters on the device; the values only have to be finite."""
  shapes = param_shapes(config)

  def draw(path, x):
    if path[-1].key == "scale":
      return np.ones(x.shape, np.float32)
    rng = np.random.default_rng(len(str(path)))
    size = min(int(np.prod(x.shape)), 1 << 16)
    noise = np.resize(rng.standard_normal(size, np.float32), x.shape)
    return noise * np.float32(0.3 / max(np.prod(x.shape[:-1]), 1) ** 0.5)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def random_batch(views, batch, image_size):
  """Draws a batch of sequences with random images, depths and near poses."""
  rng = np.random.default_rng(0)
  height, width = image_size
  pose = np.tile(np.eye(4, dtype=np.float32), (batch, views, 1, 1))
  pose[..., :3, 3] = rng.normal(0, 0.3, (batch, views, 3))
  focal = np.float32(width)
  camera = [[focal, 0, width // 2], [0, focal, height // 2], [0, 0, 1]]
  flag = np.zeros(batch, bool)
  return {
    "image": rng.integers(
      0, 256, (batch, views, *image_size, 3), dtype=np.uint8
    ),
    "depth": rng.uniform(0.5, 5, (batch, views, *image_size)).astype("f4"),
    "intrinsics": np.tile(np.float32(camera), (batch, views, 1, 1)),
    "camera_to_world": pose,
    "is_metric": np.arange(batch) % 2 == 0,
    "camera_only": flag,
    "depth_only": flag,
    "single_view": flag,
  }


def arithmetic(config, params, batch):
  """Counts a step's forward and backward operations, without remat."""
  options = dataclasses.replace(
    config.rollout.step, attention="xla", remat="none"
  )
  rollout = dataclasses.replace(
    config.rollout, step=options, remat_frames=False
  )
  config = dataclasses.replace(config, rollout=rollout)
  trained, frozen = split_frozen(params, config.optimizer.freeze)

  def gradient(trained, frozen, batch):
    return jax.grad(
      lambda t: sequence_loss(config, merge(t, frozen), batch)[0]
    )(trained)

  return count_flops(gradient, trained, frozen, batch)


def compiler_options(flags):
  """Returns XLA's options by flags."""
  options = dict(option.split("=") for option in flags.xla)
  return options or None


def measure(case, flags):
  """Compiles and times one case; returns the line to print."""
  views, per_device, image_size, fusion, freeze = CASES[case]
  mesh = make_mesh(-1, flags.fsdp)
  batch_size = (flags.batch or per_device) * mesh.size
  if case == "tiny":
    model = preset("small").replace(scan_layers=True)
  else:
    model = preset("point3r_512").replace(scan_layers=not flags.unroll)
  config = StepConfig(
    model=model,
    rollout=RolloutOptions(
      StepOptions(
        precision=flags.precision, fusion=fusion, remat=flags.remat
      ),
      remat_frames=flags.remat_frames,
      sizes=flags.sizes,
    ),
    loss=LossOptions(per_sample=case != "stage1"),
    optimizer=OptimizerOptions(freeze=freeze),
    steps_per_epoch=1000,
  )
  optimizer = make_optimizer(config.optimizer, config.steps_per_epoch)
  params = random_params(model)
  maker = StateMaker(optimizer, config.optimizer, mesh)
  batch = random_batch(views, batch_size, image_size)
  flops = arithmetic(
    config, jax.eval_shape(lambda: jax.tree.map(jnp.asarray, params)), batch
  )
  sharding = batch_sharding(mesh)
  step = jax.jit(
    functools.partial(train_step, config, optimizer),
    in_shardings=(maker.shardings(params), sharding),
    out_shardings=(maker.shardings(params), None),
    donate_argnums=0,
  )
  started = time.perf_counter()
  compiled = step.lower(maker.abstract(params), batch).compile(compiler_options(flags))
  compile_s = time.perf_counter() - started
  if flags.wait:
    print("compiled", round(compile_s), flush=True)
    input()
  state = maker.init(params)
  del params
  batch = jax.device_put(batch, sharding)
  times, losses = [], []
  for _ in range(flags.steps + 2):
    started = time.perf_counter()
    state, metrics = compiled(state, batch)
    losses.append(float(metrics["loss"]))
    times.append(time.perf_counter() - started)
  if flags.profile:
    holder = [state]

    def run():
      holder[0], metrics = compiled(holder[0], batch)
      jax.block_until_ready(metrics)

    print(report(compiled, run, top=flags.profile))
  seconds = statistics.median(times[2:])
  device = jax.devices()[0]
  peak = PEAKS.get(device.device_kind)
  memory = device.memory_stats() or {}
  analysis = compiled.memory_analysis()
  return {
    "case": case,
    "device": f"{mesh.size} x {device.device_kind}",
    "mesh": dict(mesh.shape),
    "batch": batch_size,
    "views": views,
    "size": image_size,
    "precision": flags.precision,
    "remat": flags.remat,
    "ms_per_step": round(1e3 * seconds, 1),
    "spread_ms": [round(1e3 * t, 1) for t in (min(times[2:]), max(times[2:]))],
    "frames_per_s": round(batch_size * views / seconds, 1),
    "tflop_per_step": round(flops / 1e12, 2),
    "tflop_per_s": round(flops / seconds / mesh.size / 1e12, 1),
    "mfu": peak and round(flops / seconds / mesh.size / peak, 3),
    "peak_gib": round(memory.get("peak_bytes_in_use", 0) / 2**30, 1),
    "temp_gib": round(analysis.temp_size_in_bytes / 2**30, 1),
    "compile_s": round(compile_s, 1),
    "loss": losses[0],
    "loss_last": losses[-1],
    "pointers": float(metrics["pointers"]),
    "skipped": int(metrics["skipped"]),
  }


def main():
  """Measures the cases asked for."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--case", nargs="+", choices=CASES, default=["tiny"])
  parser.add_argument("--precision", default="bfloat16")
  parser.add_argument("--remat", default="elementwise")
  parser.add_argument("--remat_frames", action="store_true")
  parser.add_argument("--unroll", action="store_true")
  parser.add_argument("--sizes", type=int, default=8)
  parser.add_argument("--batch", type=int, default=0, help="a device")
  parser.add_argument("--fsdp", type=int, default=1)
  parser.add_argument("--xla", nargs="*", default=[], help="NAME=VALUE")
  parser.add_argument("--wait", action="store_true")
  parser.add_argument("--profile", type=int, default=0, help="lines")
  parser.add_argument("--steps", type=int, default=20)
  flags = parser.parse_args()
  for case in flags.case:
    print(json.dumps(measure(case, flags)), flush=True)


if __name__ == "__main__":
  main()
