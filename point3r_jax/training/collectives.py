"""What a compiled program sends between devices, read off its text."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re

from point3r_jax.training.hlo import Program, type_bytes

KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)

_ALONE = re.compile(r"\breplica_groups=(?:\{\{\d+\}|\[\d+,1\])")


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


def count_collectives(hlo: str) -> Collectives:
  """Counts collectives, those inside loops as often as the loops run.

  Of a conditional all branches count; groups of one device do not.

  Args:
    hlo: text of an optimised module: `compiled.as_text()`.
  """
  program = Program(hlo)
  unbounded = []

  @functools.cache
  def count(name: str) -> collections.Counter:
    total = collections.Counter()
    for instruction in program.computations[name]:
      operation = instruction.operation
      # An asynchronous one is counted where it ends, with the type it gives.
      kind = operation.removesuffix("-done")
      called = list(instruction.called)
      if any(x.startswith("all-reduce-scatter") for x in called):
        kind, called = "reduce-scatter", []  # A fusion on TPUs.
      if kind in KINDS and _ALONE.search(instruction.rest):
        continue  # Each device by itself: nothing is sent.
      if kind in KINDS:
        total[kind, "runs"] += 1
        total[kind, "bytes"] += type_bytes(instruction.type)
        continue
      if operation in ("async-update", "async-done"):
        continue  # These may name what "async-start" began.
      inner = sum((count(x) for x in called), collections.Counter())
      rounds = 1
      if operation == "while" and inner:
        rounds = program.rounds(instruction)
        if rounds is None:
          rounds = 1
          unbounded.append(instruction)
      for key, value in inner.items():
        total[key] += rounds * value
    return total

  total = count(program.entry)
  traffic = {
    kind: Traffic(total[kind, "runs"], total[kind, "bytes"])
    for kind in KINDS
    if total[kind, "runs"]
  }
  return Collectives(traffic, len(unbounded))
