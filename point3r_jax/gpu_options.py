"""XLA's options for the model's programs on GPUs, and what CUDA graphs need."""

from __future__ import annotations

import logging
import os

import jax
import jax.numpy as jnp

# cuBLAS adds bias and residual within a product, which XLA's own kernels do
# not; to tune those takes half of the compilation or more. Merged products
# would have their other operands joined every time.
GPU_OPTIONS = {
  "xla_gpu_enable_triton_gemm": False,
  "xla_gpu_dot_merger_threshold_mb": 0,
}

# XLA's option of what CUDA graphs may hold of such a program, and its value:
# all but loops, conditionals and what devices send each other.
GRAPHS = "xla_gpu_enable_command_buffer"
_CONVOLUTION = "CONVOLUTION"
GRAPH_COMMANDS = (
  "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,"
  f"{_CONVOLUTION}"
)

# When CUDA loads kernels: a variable of the environment that it reads once.
_LOADING = "CUDA_MODULE_LOADING"
_AT_THE_START = "EAGER"


def load_kernels_at_the_start() -> None:
  """Has CUDA load all kernels before any runs, unless told otherwise.

  To be called before JAX is used. See `suit_devices`.
  """
  os.environ.setdefault(_LOADING, _AT_THE_START)


def kernels_load_at_the_start() -> bool:
  """Returns whether CUDA loads all kernels before any runs."""
  return os.environ.get(_LOADING) == _AT_THE_START


def load_convolutions() -> None:
  """Has this process's GPUs load the kernels of convolutions, all at once.

  cuDNN brings them with the first convolution, when none may be recorded in a
  CUDA graph. A compiler that tries kernels runs many; of a program that comes
  out of JAX's persistent cache none has run. It needs
  `load_kernels_at_the_start`.
  """
  image = jnp.ones((1, 8, 8, 8), jnp.bfloat16)
  kernel = jnp.ones((8, 8, 3, 3), jnp.bfloat16)
  for device in jax.local_devices():
    if device.platform == "gpu":
      operands = jax.device_put((image, kernel), device)
      jax.block_until_ready(jax.lax.conv(*operands, (1, 1), "SAME"))


def leave_out_convolutions(
  options: dict[str, bool | int | str],
) -> dict[str, bool | int | str]:
  """Returns XLA's options with convolutions outside of CUDA graphs.

  For programs of which JAX's persistent cache may spare us the compilation, if
  nothing else has loaded their kernels; see `load_convolutions`. XLA runs what
  holds kernels of ours once before it records them.
  """
  commands = options[GRAPHS].split(",")
  kept = (command for command in commands if command != _CONVOLUTION)
  return {**options, GRAPHS: ",".join(kept)}


def suit_devices(
  options: dict[str, bool | int | str], devices: int
) -> dict[str, bool | int | str]:
  """Returns XLA's options for a program that so many GPUs run together.

  CUDA loads a kernel when it first runs on a device, and records it in a graph
  only once it is loaded. XLA tries kernels on one device before it records
  them on all. So several devices have no graphs, with a warning, unless all
  kernels are loaded at the start.
  """
  if devices == 1 or not options.get(GRAPHS) or kernels_load_at_the_start():
    return options
  logging.getLogger(__name__).warning(
    "no CUDA graphs, which several devices record only if %s=%s is in the "
    "environment before JAX starts: this will be slow",
    _LOADING,
    _AT_THE_START,
  )
  return {**options, GRAPHS: ""}
