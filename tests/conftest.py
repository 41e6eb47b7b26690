"""Test-wide settings, made before JAX starts."""

import os

# Compile time is most of the suite's time: spend less on optimising programs
# that run a few times.
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "")
  + " --xla_backend_optimization_level=0"
  + " --xla_llvm_disable_expensive_passes=true"
)
