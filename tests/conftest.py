"""Test-wide settings, made before JAX starts."""

import os

# Compile time is most of the suite's time, and most programs run a few times.
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_backend_optimization_level=1",
    "--xla_llvm_disable_expensive_passes=true",
  ]
)
