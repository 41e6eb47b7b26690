"""Test-wide settings, made before JAX starts."""

import functools
import gc
import importlib.metadata
import logging
import multiprocessing
import os
import pathlib
import sys
import typing

import pytest

# Eight CPU devices are for meshes; all else runs on the first one.
# Compile time is most of the suite's time, and most programs run a few times:
# optimise little, and share compiled programs between workers and runs.
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_llvm_disable_expensive_passes=true",
  ]
)
# These take twice as long to compile; later versions have nothing else.
_JAXLIB = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))
if _JAXLIB < (0, 11):
  os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
_CACHE = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

# Tracing makes many objects and hardly any garbage: a twentieth of the time.
gc.set_threshold(100_000)

# Orbax asks of each array whether it follows a protocol. Python 3.12 remembers
# what that takes.
if sys.version_info < (3, 12):
  typing._get_protocol_attrs = functools.cache(typing._get_protocol_attrs)

# What tests run in processes of their own: importing JAX takes seconds.
multiprocessing.set_forkserver_preload(
  ["point3r_jax.export.scene_process", "point3r_jax.cli.train"]
)


@pytest.fixture(autouse=True, scope="module")
def what_is_there_is_no_garbage():
  """Loaders that close collect garbage: not among what modules before left."""
  gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def forked_writers():
  """Forks processes that write scenes from one that imports JAX only once."""
  from point3r_jax.export import scene_process

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(scene_process, "_START_METHOD", "forkserver")
    yield


@pytest.fixture(autouse=True, scope="session")
def lowered_anew():
  """Keeps no lowered programs: tests replace what is traced for them."""
  from point3r_jax import lowered_programs

  find_folder = lowered_programs._folder
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(lowered_programs, "_folder", lambda: None)
    yield find_folder


@pytest.fixture
def folder(tmp_path, monkeypatch, lowered_anew):
  """Where JAX keeps compiled programs during a test, lowered ones too."""
  import jax
  from jax.experimental.compilation_cache import compilation_cache

  from point3r_jax import lowered_programs

  monkeypatch.setattr(lowered_programs, "_folder", lowered_anew)
  path = tmp_path / "cache" / "jax"
  before = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", str(path))
  yield path
  jax.config.update("jax_enable_compilation_cache", True)
  jax.config.update("jax_compilation_cache_dir", before)
  compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def gpus_for_their_tests(request):
  """Skips tests that are marked for GPUs where there is none."""
  if request.node.get_closest_marker("gpu") is None:
    return
  import jax

  if jax.default_backend() != "gpu":
    pytest.skip("no GPU")


@pytest.fixture(autouse=True)
def own_logging():
  """Takes away what a program logs to: the test's stderr, which is closed."""
  root = logging.getLogger()
  before = set(root.handlers)
  yield
  for handler in set(root.handlers) - before:
    root.removeHandler(handler)


_PROGRAMS = {}


@pytest.fixture
def shared_programs(monkeypatch):
  """Streams of one kind take the programs of those before, in all tests."""
  from point3r_jax import stream, stream_programs

  def share(config, options, image_size, batch_size, look_ahead, devices=None):
    kind = (config, options, tuple(image_size), batch_size, look_ahead)
    key = (*kind, tuple(devices or ()))
    if key not in _PROGRAMS:
      _PROGRAMS[key] = stream_programs.StreamPrograms(*kind, devices)
    return _PROGRAMS[key]

  monkeypatch.setattr(stream, "StreamPrograms", share)


@pytest.fixture
def own_programs(monkeypatch, shared_programs):
  """For tests of what is compiled."""
  from point3r_jax import stream, stream_programs

  monkeypatch.setattr(stream, "StreamPrograms", stream_programs.StreamPrograms)


@pytest.fixture
def finished_streams():
  """No test counts what another one's streams compile in the background."""
  from tests.streams import OPEN

  yield
  while OPEN:
    OPEN.pop().wait_for_compiles()


@pytest.fixture(scope="module")
def checkpoints_read_once():
  """Reading one takes as long as a small run, and is tested elsewhere."""
  from point3r_jax.cli import reconstruct
  from point3r_jax.evaluation import runner

  with pytest.MonkeyPatch.context() as patch:
    for module in (reconstruct, runner):
      cached = functools.cache(module.load_checkpoint)
      patch.setattr(module, "load_checkpoint", cached)
    yield
