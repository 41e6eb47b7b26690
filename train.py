"""Trains Point3R; see `python train.py --help` and docs/training.md."""

from point3r_jax.cli.train import main

if __name__ == "__main__":
  main()
