"""Devices that need not exist, to compile programs for.

| call | devices | needs |
| --- | --- | --- |
| `fake_devices(64)` | this machine's CPU, many times | nothing |
| `topology_devices("h200:2x8")` | two hosts of eight GPUs | extra "cuda" |
| `topology_devices("v5p:4x4x4")` | a slice of a TPU pod | extra "tpu" |
| `topology_devices("v5p-128")` | the same, 64 chips | extra "tpu" |
| `topology_devices("2xv5p:4x4x4")` | two such slices | extra "tpu" |
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.experimental import topologies

from point3r_jax.errors import InputError, one_line


class _Gpu(NamedTuple):
  """What XLA's compiler asks of a GPU; rates and sizes are the vendor's."""

  name: str
  capability: int
  multiprocessors: int
  float32_units: int  # Of a multiprocessor.
  clock_ghz: float
  memory: int  # Bytes, as all below.
  memory_per_second: float
  l2_cache: int
  shared_memory: int  # Of a multiprocessor; a block can have 1 KiB less.


_GB, _MB, _KB = 1 << 30, 1 << 20, 1 << 10
_GPUS = {
  "a100": _Gpu(
    *("NVIDIA A100 80GB", 8, 108, 64, 1.41),
    *(80 * _GB, 2.04e12, 40 * _MB, 164 * _KB),
  ),
  "h100": _Gpu(
    *("NVIDIA H100 80GB", 9, 132, 128, 1.98),
    *(80 * _GB, 3.35e12, 50 * _MB, 228 * _KB),
  ),
  "h200": _Gpu(
    *("NVIDIA H200", 9, 132, 128, 1.98),
    *(141 * _GB, 4.8e12, 50 * _MB, 228 * _KB),
  ),
  "b200": _Gpu(
    *("NVIDIA B200", 10, 148, 128, 1.96),
    *(178 * _GB, 7.7e12, 126 * _MB, 228 * _KB),
  ),
}
# The same for all of them. XLA's parser wants a text of its GpuTargetConfig.
_TARGET = """
gpu_device_info {{
  name: "{name}"
  cuda_compute_capability {{ major: {capability} }}
  core_count: {multiprocessors}
  fpus_per_core: {float32_units}
  clock_rate_ghz: {clock_ghz}
  device_memory_size: {memory}
  memory_bandwidth: {memory_per_second:.0f}
  l2_cache_size: {l2_cache}
  shared_memory_per_core: {shared_memory}
  shared_memory_per_block_optin: {shared_memory_of_block}
  shared_memory_per_block: 49152
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""

# The usual shapes of slices, in chips, of pods with two axes and with three.
_SQUARES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
  *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
  *("8x8x16", "8x16x16", "16x16x16"),
)
# Google Cloud's name of a pod, its compiler's, what the former counts a chip.
_PODS = (
  ("v5p", "v5p", 2, _CUBES),
  ("v5e", "v5e", 1, _SQUARES),
  ("v5litepod", "v5e", 1, _SQUARES),
  ("v6e", "v6e", 1, _SQUARES),
)
_TPU_SLICES = {
  f"{pod}-{count * math.prod(map(int, shape.split('x')))}": f"{kind}:{shape}"
  for pod, kind, count, shapes in _PODS
  for shape in shapes
}


def fake_devices(count: int) -> None:
  """Lets JAX have so many devices, all of them this machine's CPU.

  Call it before anything else asks JAX for its devices.

  Raises:
    InputError: if there cannot be so many, or JAX has started with others.
  """
  if count < 1:
    raise InputError(f"there must be at least 1 device, not {count}")
  try:
    jax.config.update("jax_num_cpu_devices", count)
    jax.config.update("jax_platforms", "cpu")
  except RuntimeError:
    pass  # JAX has started: what counts is with which devices.
  if jax.default_backend() != "cpu" or jax.device_count() != count:
    raise InputError(
      f"cannot make {count} CPU devices: JAX has started with "
      f"{jax.device_count()} of {jax.default_backend()}; call fake_devices "
      "before anything that uses devices"
    )


def _gpu_devices(kind: str, hosts: str) -> Sequence[jax.Device]:
  """Returns GPUs of a kind: as many hosts × GPUs of each, such as "2x8"."""
  if not re.fullmatch(r"([1-9]\d*x)?[1-9]\d*", hosts):
    raise InputError(
      f"no GPU topology '{kind}:{hosts}'; say {kind}:8 for a host of 8, or "
      f"{kind}:2x8 for 2 hosts of 8 each"
    )
  gpu = _GPUS[kind]
  target = _TARGET.format(
    **gpu._asdict(), shared_memory_of_block=gpu.shared_memory - 1024
  )
  hosts = hosts if "x" in hosts else f"1x{hosts}"
  # Without this the compiler is not loaded where there is no GPU's driver.
  os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
  try:
    return topologies.get_topology_desc(
      kind, "cuda", target_config=target, topology=f"1x{hosts}"
    ).devices
  except NotImplementedError as error:
    raise InputError(
      "planning for GPUs needs their compiler: pip install 'point3r-jax[cuda]'"
    ) from error


def _tpu_topology(name: str) -> str:
  """Returns the compiler's name of a slice: "v5p-128" is "v5p:4x4x4"."""
  if ":" not in name and name not in _TPU_SLICES:
    raise InputError(
      f"{name!r} is no slice of TPUs known by name: v5p-N counts cores, two a "
      "chip, v5e-N, v5litepod-N and v6e-N count chips; or say its shape "
      f"in chips, such as v5p:4x4x4 for v5p-128. GPUs are {', '.join(_GPUS)}, "
      "such as h200:8"
    )
  return _TPU_SLICES.get(name, name)


def topology_devices(name: str) -> Sequence[jax.Device]:
  """Returns devices to compile for only.

  Args:
    name: of GPUs, the kind and how many, such as "h200:8", or "h200:2x8" for
      two hosts with eight each; of a slice of a TPU pod, generation and shape
      in chips, such as "v5p:2x2x4" or "v6e:4x4", or Google Cloud's name for it,
      such as "v5p-32" or "v6e-16"; of several slices, "2xv5p:2x2x4".

  Raises:
    InputError: without the packages that it needs, or for an unknown name.
  """
  times = re.match(r"([1-9]\d*)x|", name)
  slices, one = times[1], name[times.end() :]
  kind, _, size = one.partition(":")
  if kind in _GPUS:
    return _gpu_devices(kind, f"{slices}x{size}" if slices else size)
  topology = _tpu_topology(one)
  if importlib.util.find_spec("libtpu") is None:
    raise InputError(
      f"{name!r} is none of the GPUs {', '.join(_GPUS)}; planning for TPUs "
      "needs their compiler: pip install 'point3r-jax[tpu]'"
    )
  # Without this it looks for a TPU's host on the network.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  several = {"num_slices": int(slices)} if slices else {}
  try:
    return topologies.get_topology_desc(topology, "tpu", **several).devices
  except jax.errors.JaxRuntimeError as error:
    raise InputError(f"no TPU topology {name!r}: {one_line(error)}") from error
