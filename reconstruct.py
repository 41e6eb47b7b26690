"""Reconstructs a scene from a video or images.

python reconstruct.py --input walk.mp4 --checkpoint point3r_512 --output walk
"""

import sys

from point3r_jax.cli.reconstruct import main

if __name__ == "__main__":
  sys.exit(main())
