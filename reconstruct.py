"""Reconstructs a scene from a video or images.

python reconstruct.py --input walk.mp4 --checkpoint point3r_512 --output walk
"""

from point3r_jax.cli.reconstruct import script

if __name__ == "__main__":
  script()
