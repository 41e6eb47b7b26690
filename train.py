"""Trains Point3R; see docs/training.md.

python train.py --config configs/synthetic_tiny.py --workdir runs/tiny
"""

from absl import flags

from point3r_jax.cli import train

if __name__ == "__main__":
  flags.adopt_module_key_flags(train)  # Else --help would not list them.
  train.main()
