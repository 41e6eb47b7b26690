"""XLA's options for the model's programs on GPUs, and what CUDA graphs need."""

from __future__ import annotations

import logging
import os

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
GRAPH_COMMANDS = (
  "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONVOLUTION,DYNAMIC_SLICE_FUSION"
)

# When CUDA loads kernels: a variable of the environment that it reads once.
_LOADING = "CUDA_MODULE_LOADING"
_AT_THE_START = "EAGER"


def load_kernels_at_the_start() -> None:
  """Has CUDA load all kernels before any runs, unless told otherwise.

  To be called before JAX is used. See `suit_devices`.
  """
  os.environ.setdefault(_LOADING, _AT_THE_START)


def suit_devices(
  options: dict[str, bool | int | str], devices: int
) -> dict[str, bool | int | str]:
  """Returns XLA's options for a program that so many GPUs run together.

  CUDA loads a kernel when it first runs on a device, and records it in a graph
  only once it is loaded. XLA tries kernels on one device before it records
  them on all. So several devices have no graphs, with a warning, unless all
  kernels are loaded at the start.
  """
  if (
    devices == 1
    or not options.get(GRAPHS)
    or os.environ.get(_LOADING) == _AT_THE_START
  ):
    return options
  logging.getLogger(__name__).warning(
    "no CUDA graphs, which several devices record only if %s=%s is in the "
    "environment before JAX starts: this will be slow",
    _LOADING,
    _AT_THE_START,
  )
  return {**options, GRAPHS: ""}
