"""Times the rendering of synthetic scenes where a model is trained.

  python -m benchmarks.rendering --size 96 128 --batch 256
  python -m benchmarks.rendering --size 224 224 --batch 64

Prints a line of JSON: median milliseconds for a batch of sequences, frames a
second of all devices together, seconds to compile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import jax

from configs import synthetic_tiny
from point3r_jax.training.experiment import make_mixture, open_experiment
from point3r_jax.training.feed import open_feed

_WARMUP = 2


def main() -> None:
  """Measures what is asked for."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--size", type=int, nargs=2, default=(96, 128))
  parser.add_argument("--batch", type=int, default=256, help="sequences")
  parser.add_argument("--views", type=int, default=5, help="of each")
  parser.add_argument("--repeats", type=int, default=20)
  flags = parser.parse_args()
  config = synthetic_tiny.get_config()
  config.views, config.image_sizes = flags.views, (tuple(flags.size),)
  config.batch_size, config.epochs = flags.batch, 1
  config.optimizer.warmup_epochs = 0.0
  config.datasets.synthetic.samples = flags.batch * (_WARMUP + flags.repeats)
  experiment = open_experiment(config)
  times = []
  with (
    jax.set_mesh(experiment.mesh),
    open_feed(experiment, make_mixture(config), 0) as feed,
  ):
    started = time.perf_counter()
    for batch in feed:
      jax.block_until_ready(batch.arrays)
      times.append(time.perf_counter() - started)
      started = time.perf_counter()
  compilation, times = times[0], times[_WARMUP:]
  seconds = statistics.median(times)
  result = {
    "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "batch": flags.batch,
    "views": flags.views,
    "image_size": list(flags.size),
    "ms_per_batch": round(1e3 * seconds, 1),
    "ms_min_max": [round(1e3 * t, 1) for t in (min(times), max(times))],
    "frames_per_s": round(flags.batch * flags.views / seconds),
    "first_batch_s": round(compilation, 1),
  }
  print(json.dumps(result))


if __name__ == "__main__":
  main()
