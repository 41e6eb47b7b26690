"""Lowered programs, kept on disk beside the compiled ones of JAX.

JAX's persistent cache spares a process what another one has compiled, but is
asked with the lowered program: to trace and lower a step of the full size takes
Python longer than reading it takes.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import logging
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax import export

from point3r_jax.files import atomic_file
from point3r_jax.kernels_ahead import compile_kernels
from point3r_jax.versions import installed_versions

# What JAX does not promise to know in another version. None is asked.
_CUSTOM_CALLS = (
  "__cudnn$fmhaSoftmax",
  "__cudnn$fmhaSoftmaxBackward",
  "LayoutConstraint",
)

_log = logging.getLogger(__name__)


def lower_once(
  program: Callable[..., Any],
  operands: Sequence[Any],
  *,
  name: str | None,
  result: Any,
  donate: Sequence[int] = (),
  out_shardings: Any = None,
) -> jax.stages.Lowered:
  """Lowers a program, or reads what an earlier process made of it.

  It is kept where `jax_compilation_cache_dir` is, if that is a local folder. A
  file that is damaged, or cannot be made, is warned about and done without.
  Files are StableHLO as `jax.export` writes it.

  Args:
    program: (*operands) → result; determined by its name, this package's files,
      JAX's settings and versions, and the kind of device.
    operands: trees of arrays, or their shapes.
    name: which program of this package it is, with all that it was made for.
      None: it is not kept.
    result: a tree of the result's structure. A leaf may stand for a tree of
      lists, tuples and dictionaries.
    donate: which operands' buffers the result may take.
    out_shardings: of the result; None: as the compiler likes.

  Returns:
    What `jax.jit(program).lower(*operands)` does, to be compiled; it keeps
    unused operands. Unless it was read, its kernels are being compiled.
    Where this package's files changed since the process read them, nothing is
    kept: what it lowers is not what they say.
  """
  jit = functools.partial(
    jax.jit,
    donate_argnums=donate,
    keep_unused=True,
    out_shardings=out_shardings,
  )
  folder = _folder()
  if name is None or folder is None or _digest_sources() != _SOURCES:
    return _with_kernels(jit(program).lower(*operands))
  path = folder / f"point3r-{_fingerprint(name, operands)}.lowered"
  structure = jax.tree.structure(result)
  read = exported = _read(path)
  if not read:
    try:
      exported = _export(program, operands, structure)
      data = exported.serialize()
    except (ValueError, NotImplementedError) as error:
      # If the program itself is at fault, this raises it again.
      lowered = jit(program).lower(*operands)
      _warn("make", path, textwrap.shorten(str(error), 300))
      return _with_kernels(lowered)
    _write(path, data)

  # All processes compile this form, so that JAX's cache knows it.
  def run(*operands):
    leaves = exported.call(*jax.tree.leaves(operands))
    return jax.tree.unflatten(structure, leaves)

  lowered = jit(run).lower(*operands)
  # What another process lowered it has most likely compiled, too.
  return lowered if read else _with_kernels(lowered)


def _with_kernels(lowered: jax.stages.Lowered) -> jax.stages.Lowered:
  """Has a program's kernels compiled in the background, if that is possible."""
  try:
    compile_kernels(lowered)
  except Exception as error:  # JAX does not promise what a call looks like.
    _log.warning(
      "kernels are not compiled ahead, so that this takes longer: %r", error
    )
  return lowered


def _folder() -> Path | None:
  """Returns where programs are kept, or None where they are not."""
  folder = jax.config.jax_compilation_cache_dir
  if not (folder and jax.config.jax_enable_compilation_cache):
    return None
  return None if "://" in folder else Path(folder)


def _digest_sources() -> bytes:
  """Returns a digest of this package's source files."""
  digest = hashlib.sha256()
  for path in sorted(Path(__file__).parent.rglob("*.py")):
    digest.update(path.read_bytes())
  return digest.digest()


# As this process imports them.
_SOURCES = _digest_sources()


def _fingerprint(name: str, operands: Sequence[Any]) -> str:
  """Returns a name for all that a lowered program depends on."""
  leaves, structure = jax.tree.flatten(operands)
  device = jax.devices()[0]
  settings = dict(jax.config.values, jax_compilation_cache_dir=None)
  parts = (
    name,
    installed_versions("jax", "jaxlib", "flax", "optax"),
    sorted(settings.items()),
    (device.platform, device.device_kind, getattr(device, "core_count", None)),
    structure,
    [(x.shape, x.dtype.name, _sharding(x)) for x in leaves],
  )
  return hashlib.sha256(_SOURCES + repr(parts).encode()).hexdigest()[:32]


def _export(
  program: Callable[..., Any],
  operands: Sequence[Any],
  result: jax.tree_util.PyTreeDef,
) -> export.Exported:
  """Exports a program of lists: trees of other kinds are not written."""
  leaves, structure = jax.tree.flatten(operands)

  def run(*leaves):
    operands = jax.tree.unflatten(structure, leaves)
    return result.flatten_up_to(program(*operands))

  unchecked = [
    export.DisabledSafetyCheck.custom_call(call) for call in _CUSTOM_CALLS
  ]
  jitted = jax.jit(run, keep_unused=True)
  # Not the arrays: how these are laid out is up to the program around.
  shapes = [
    jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_sharding(x))
    for x in leaves
  ]
  return export.export(jitted, disabled_checks=unchecked)(*shapes)


def _sharding(x: Any) -> jax.sharding.Sharding | None:
  """Returns over which devices an operand is split, if it says that."""
  sharding = getattr(x, "sharding", None)
  return sharding if isinstance(sharding, jax.sharding.NamedSharding) else None


def _read(path: Path) -> export.Exported | None:
  """Reads a program; None if there is none, or not as it was written."""
  try:
    data = path.read_bytes()
  except FileNotFoundError:
    return None
  except OSError as error:
    _warn("read", path, error)
    return None
  digest, program = data[:32], data[32:]
  if hashlib.sha256(program).digest() != digest:
    _warn("read", path, "it is damaged")
    return None
  # Where the library is that these kernels are compiled with, XLA learns when
  # this is imported, as it is where a program is traced.
  if b"mosaic_gpu" in program:
    importlib.import_module("jax.experimental.mosaic.gpu")
  return export.deserialize(bytearray(program))


def _write(path: Path, program: bytes) -> None:
  """Writes a program with its digest in front, if that is possible."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
      file.write(hashlib.sha256(program).digest() + program)
  except OSError as error:
    _warn("write", path, error)


def _warn(what: str, path: Path, reason: object) -> None:
  _log.warning(
    "could not %s the lowered program %s, without which starting takes longer: "
    "%s",
    what,
    path,
    reason,
  )
