"""Evaluates a checkpoint by the published protocols.

python evaluate.py --task video_depth --dataset bonn --data /data/bonn \
  --checkpoint point3r_512 --output output/bonn
"""

from point3r_jax.cli.evaluate import script

if __name__ == "__main__":
  script()
