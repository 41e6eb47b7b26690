"""Which GPU the default device is."""

from __future__ import annotations

import jax

# The compute capability of Hopper GPUs.
HOPPER = "9.0"


def compute_capability() -> str:
  """Returns that of the default device; "" if it is no GPU."""
  if jax.default_backend() != "gpu":
    return ""
  return getattr(jax.devices()[0], "compute_capability", "")
