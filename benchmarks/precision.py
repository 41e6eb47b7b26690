"""Measures what rounding does to a trained model's predictions, frame by frame.

  python -m benchmarks.precision --checkpoint tiny --sequences 16

Follows float32 through synthetic sequences of the test split. Every frame is
also predicted from the same memory in other precisions: so errors do not add
up, and the comparison is of one step. Prints a line of JSON for each precision:
mean relative difference of depth and of world points' distances from the
camera, and the angle and relative distance between poses; medians over frames
and the largest.
"""

from __future__ import annotations

import argparse
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from point3r_jax.checkpoints import load_checkpoint
from point3r_jax.data.synthetic.source import SyntheticSource
from point3r_jax.geometry import pose_to_matrix
from point3r_jax.memory import init_memory
from point3r_jax.params import prepare_params
from point3r_jax.precision import POLICIES
from point3r_jax.streaming import Prediction, step

_REFERENCE = "float32"


def differences(found: Prediction, want: Prediction) -> dict[str, jax.Array]:
  """Says how far predictions of the same B frames are from one another.

  Returns:
    (B,) each: mean relative difference of depth and of world points, as shares;
    the angle between rotations in degrees; the distance between positions as a
    share of the frame's median depth.
  """
  depth = want.points_camera[..., 2]
  error = jnp.abs(found.points_camera[..., 2] - depth) / jnp.abs(depth)
  poses = pose_to_matrix(jnp.stack([found.pose, want.pose]))
  position = poses[1, :, :3, 3]
  distance = jnp.linalg.norm(
    want.points_world - position[:, None, None], axis=-1
  )
  moved = jnp.linalg.norm(found.points_world - want.points_world, axis=-1)
  rotations = poses[..., :3, :3]
  # By the chord: the arc cosine is blind to small angles.
  chord = jnp.linalg.norm(rotations[0] - rotations[1], axis=(-2, -1))
  angle = 2 * jnp.arcsin(jnp.minimum(chord / 8**0.5, 1.0))
  shift = jnp.linalg.norm(poses[0, :, :3, 3] - position, axis=-1)
  return {
    "depth": error.mean((1, 2)),
    "points_world": (moved / distance).mean((1, 2)),
    "rotation_deg": jnp.degrees(angle),
    "translation": shift / jnp.median(depth, axis=(1, 2)),
  }


def measure(
  checkpoint: str,
  precisions: list[str],
  sequences: int,
  views: int,
  image_size: tuple[int, int],
) -> dict[str, dict[str, np.ndarray]]:
  """Returns every frame's differences, (views · sequences,), by precision."""
  config, params = load_checkpoint(checkpoint)
  source = SyntheticSource(split="test")
  images = np.stack(
    [
      source.sequence(i, views, image_size, np.random.default_rng(i))["image"]
      for i in range(sequences)
    ],
    axis=1,
  )
  steps = {
    name: (functools.partial(step, config, prepare_params(params, name)), name)
    for name in (_REFERENCE, *precisions)
  }
  tokens = int(np.prod(config.grid(image_size)))
  memory = init_memory(config, sequences, image_size, views * tokens)
  compare = jax.jit(differences)
  found = {name: [] for name in precisions}
  for frame in images:
    predicted = {
      name: run(memory, frame, precision=precision)
      for name, (run, precision) in steps.items()
    }
    memory, want = predicted[_REFERENCE]
    for name in precisions:
      found[name].append(jax.device_get(compare(predicted[name][1], want)))
  return {
    name: {
      key: np.concatenate([frame[key] for frame in frames]) for key in frames[0]
    }
    for name, frames in found.items()
  }


def main() -> None:
  """Measures, and prints what was found."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--checkpoint", default="tiny", help="default: %(default)s")
  add(
    "--precision",
    nargs="+",
    default=["bfloat16"],
    choices=[name for name in POLICIES if name != _REFERENCE],
  )
  add("--sequences", type=int, default=16, help="default: %(default)s")
  add("--views", type=int, default=24, help="default: %(default)s")
  add("--size", type=int, nargs=2, default=(96, 128), metavar=("H", "W"))
  flags = parser.parse_args()
  found = measure(
    flags.checkpoint,
    flags.precision,
    flags.sequences,
    flags.views,
    tuple(flags.size),
  )
  for name, values in found.items():
    result = {
      key: {
        "mean": float(f"{x.mean():.3g}"),
        "median": float(f"{np.median(x):.3g}"),
        "max": float(f"{x.max():.3g}"),
      }
      for key, x in values.items()
    }
    setting = {
      "checkpoint": flags.checkpoint,
      "precision": name,
      "frames": flags.sequences * flags.views,
      "device": jax.devices()[0].device_kind,
    }
    print(json.dumps({**setting, **result}), flush=True)


if __name__ == "__main__":
  main()
