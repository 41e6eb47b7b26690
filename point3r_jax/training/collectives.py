"""What a compiled program sends between devices, read off its text."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)

# "%body (x: f32[2]) -> f32[2] {" opens a computation; "%y = f32[2]{0} op(%x)"
# is an instruction. Types may be tuples, with spaces.
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][\w-]*)\((.*)")
_ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_CALLED = re.compile(
  r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{(.*?)\}")
_CONDITION = re.compile(r"\bcondition=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ALONE = re.compile(r"\breplica_groups=(?:\{\{\d+\}|\[\d+,1\])")
_BOUND = re.compile(r" = s32\[\].* constant\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Collectives of one kind.

  Attributes:
    runs: how often a step runs one.
    bytes: of their results on a device, in a step.
  """

  runs: int
  bytes: int


@dataclasses.dataclass(frozen=True)
class Collectives:
  """All collectives of a program.

  Attributes:
    traffic: by kind, only what there is.
    unbounded: loops with collectives whose number of rounds the program does
      not tell; they were counted as one.
  """

  traffic: dict[str, Traffic]
  unbounded: int


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
  """Splits a module's text into the lines of each computation; names ENTRY."""
  computations, entry, lines = {}, "", []
  for line in hlo.splitlines():
    if found := _COMPUTATION.match(line):
      lines = computations.setdefault(found[2], [])
      entry = found[2] if found[1] else entry
    else:
      lines.append(line)
  return computations, entry


def _size(text: str) -> int:
  """Returns the bytes of a type: an array or a tuple of arrays."""
  total = 0
  for bits, sizes in _ARRAY.findall(text):
    elements = math.prod(int(size) for size in sizes.split(",") if size)
    total += -(-elements * int(bits or 8) // 8)
  return total


def _rounds(line: str, computations: dict[str, list[str]]) -> int | None:
  """Returns how often a loop runs, or None if the program does not tell."""
  if found := _TRIPS.search(line):
    return int(found[1])
  # XLA for TPU drops its note. JAX's scans count from 0 up to a constant.
  condition = computations[_CONDITION.search(line)[1]]
  bounds = [_BOUND.search(x)[1] for x in condition if _BOUND.search(x)]
  ordered = any("compare(" in x and "direction=LT" in x for x in condition)
  return int(bounds[0]) if ordered and len(bounds) == 1 else None


def _called(line: str) -> Iterator[str]:
  """Yields the computations that an instruction runs."""
  yield from _CALLED.findall(line)
  for branches in _BRANCHES.findall(line):
    yield from (name.strip(" %") for name in branches.split(","))


def count_collectives(hlo: str) -> Collectives:
  """Counts collectives, those inside loops as often as the loops run.

  Of a conditional all branches count; groups of one device do not.

  Args:
    hlo: text of an optimised module: `compiled.as_text()`.
  """
  computations, entry = _computations(hlo)
  unbounded = []

  @functools.cache
  def count(name: str) -> collections.Counter:
    total = collections.Counter()
    for line in computations[name]:
      found = _INSTRUCTION.match(line)
      if not found:
        continue
      result, operation, rest = found.groups()
      # An asynchronous one is counted where it ends, with the type it gives.
      kind = operation.removesuffix("-done")
      called = list(_called(rest))
      if any(x.startswith("all-reduce-scatter") for x in called):
        kind, called = "reduce-scatter", []  # A fusion on TPUs.
      if kind in KINDS and _ALONE.search(rest):
        continue  # Each device by itself: nothing is sent.
      if kind in KINDS:
        total[kind, "runs"] += 1
        total[kind, "bytes"] += _size(result)
        continue
      if operation in ("async-update", "async-done"):
        continue  # These may name what "async-start" began.
      inner = sum((count(x) for x in called), collections.Counter())
      rounds = 1
      if operation == "while" and inner:
        rounds = _rounds(line, computations)
        if rounds is None:
          rounds = 1
          unbounded.append(line)
      for key, value in inner.items():
        total[key] += rounds * value
    return total

  total = count(entry)
  traffic = {
    kind: Traffic(total[kind, "runs"], total[kind, "bytes"])
    for kind in KINDS
    if total[kind, "runs"]
  }
  return Collectives(traffic, len(unbounded))
