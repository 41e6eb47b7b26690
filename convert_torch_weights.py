"""Converts PyTorch weights to a checkpoint directory, and back.

python convert_torch_weights.py --input point3r_512.pth --output point3r_512
"""

import sys

from point3r_jax.cli.convert import main

if __name__ == "__main__":
  sys.exit(main())
