"""Devices that need not exist, and what is said of those that cannot be had."""

import jax
import pytest

from point3r_jax.errors import InputError
from point3r_jax.training import devices
from point3r_jax.training.devices import fake_devices, topology_devices


def test_fake_devices_that_are_there_or_cannot_be():
  fake_devices(8)  # These are there.
  with pytest.raises(InputError, match="JAX has started with 8 of cpu"):
    fake_devices(5)
  with pytest.raises(InputError, match="at least 1 device"):
    fake_devices(0)


def test_a_tpu_topology_that_cannot_be():
  # Without the compiler, or with it but without such a thing.
  with pytest.raises(InputError, match=r"point3r-jax\[tpu\]|no TPU topology"):
    topology_devices("v9:4x4")


@pytest.mark.parametrize("name", ["v5p-127", "v5p-2", "v9-8", "v5p", "2x", ""])
def test_a_tpu_slice_without_a_known_shape(name):
  with pytest.raises(InputError, match="v5p:4x4x4 for v5p-128"):
    topology_devices(name)


@pytest.mark.parametrize(
  ("name", "topology", "slices"),
  [
    ("v5p:4x4x4", "v5p:4x4x4", {}),
    ("v5p-128", "v5p:4x4x4", {}),  # Cores, two a chip.
    ("v5p-8", "v5p:2x2x1", {}),
    ("v6e-32", "v6e:4x8", {}),  # Chips.
    ("v5litepod-256", "v5e:16x16", {}),
    ("2xv5p-16", "v5p:2x2x2", {"num_slices": 2}),
    ("12xv6e:4x4", "v6e:4x4", {"num_slices": 12}),
  ],
)
def test_slices_are_named_to_their_compiler(
  monkeypatch, name, topology, slices
):
  asked = []

  def describe(*arguments, **options):
    asked.append((*arguments, options))
    raise jax.errors.JaxRuntimeError("asked")

  monkeypatch.setattr(devices.importlib.util, "find_spec", lambda _: True)
  monkeypatch.setattr(devices.topologies, "get_topology_desc", describe)
  with pytest.raises(InputError, match=f"no TPU topology '{name}': asked"):
    topology_devices(name)
  assert asked == [(topology, "tpu", slices)]


@pytest.mark.parametrize(
  "name", ["h200", "h200:", "h200:x8", "h200:0", "h200:8x", "2xh200:2x8"]
)
def test_a_gpu_topology_that_cannot_be(name):
  with pytest.raises(InputError, match="h200:2x8 for 2 hosts"):
    topology_devices(name)


@pytest.mark.parametrize(
  ("name", "topology"),
  [("a100:4", "1x1x4"), ("b200:2x8", "1x2x8"), ("2xh200:8", "1x2x8")],
)
def test_gpus_are_described_to_their_compiler(monkeypatch, name, topology):
  asked = {}

  def describe(kind, platform, **options):
    asked.update(options, kind=kind, platform=platform)
    raise NotImplementedError

  monkeypatch.setattr(devices.topologies, "get_topology_desc", describe)
  with pytest.raises(InputError, match=r"point3r-jax\[cuda\]"):
    topology_devices(name)
  assert (asked["platform"], asked["topology"]) == ("cuda", topology)
  assert asked["kind"].upper() in asked["target_config"]
  assert asked["target_config"].count("{") == asked["target_config"].count("}")


def test_gpus_without_a_gpu():
  """With their compiler, on a machine that need not have one."""
  pytest.importorskip("jax_cuda13_plugin")
  gpus = topology_devices("h200:2x8")
  assert len(gpus) == 16 and {gpu.process_index for gpu in gpus} == {0, 1}
  sharding = jax.sharding.SingleDeviceSharding(gpus[0])
  x = jax.ShapeDtypeStruct((64, 64), "float32", sharding=sharding)
  options = {"xla_gpu_enable_triton_gemm": False}
  compiled = jax.jit(lambda x: x @ x).lower(x).compile(options)
  assert "cublas" in compiled.as_text()
