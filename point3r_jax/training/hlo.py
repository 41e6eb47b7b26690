"""The text of a compiled program: its instructions, and how often they run."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

# "%body (x: f32[2]) -> f32[2] {" opens a computation; "%y = f32[2]{0} op(%x)"
# is an instruction. Types may be tuples, with spaces.
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)")
_ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_CALLED = re.compile(
  r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{(.*?)\}")
_CONDITION = re.compile(r"\bcondition=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def type_bytes(text: str) -> int:
  """Returns the bytes of a type: an array or a tuple of arrays."""
  total = 0
  for bits, sizes in _ARRAY.findall(text):
    elements = math.prod(int(size) for size in sizes.split(",") if size)
    total += -(-elements * int(bits or 8) // 8)
  return total


def type_shape(text: str) -> tuple[int, ...]:
  """Returns the shape of a type, of a tuple that of its first array."""
  sizes = _ARRAY.search(text)[2]
  return tuple(int(size) for size in sizes.split(",") if size)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """An instruction of a computation.

  Attributes:
    name: what other instructions call its result.
    type: of its result, as text.
    operation: such as "fusion".
    rest: what follows the operation's opening bracket: operands, attributes.
    root: whether its result is the computation's.
  """

  name: str
  type: str
  operation: str
  rest: str
  root: bool

  @property
  def operands(self) -> list[str]:
    """Names of the instructions whose results it takes."""
    depth, end = 1, 0
    while depth and end < len(self.rest):
      depth += {"(": 1, ")": -1}.get(self.rest[end], 0)
      end += 1
    return re.findall(r"%([\w.-]+)", self.rest[: end - 1])

  @property
  def called(self) -> Iterator[str]:
    """Names of the computations that it runs, all branches of a conditional."""
    yield from _CALLED.findall(self.rest)
    for branches in _BRANCHES.findall(self.rest):
      yield from (name.strip(" %") for name in branches.split(","))


class Program:
  """A module.

  Attributes:
    computations: name → instructions, in their order.
    entry: name of the computation that the program is.
  """

  computations: dict[str, list[Instruction]]
  entry: str

  def __init__(self, text: str):
    """Reads `compiled.as_text()`."""
    self.computations, self.entry, instructions = {}, "", []
    for line in text.splitlines():
      if found := _COMPUTATION.match(line):
        instructions = self.computations.setdefault(found[2], [])
        self.entry = found[2] if found[1] else self.entry
      elif found := _INSTRUCTION.match(line):
        root, *parts = found.groups()
        instructions.append(Instruction(*parts, root=bool(root)))

  def rounds(self, loop: Instruction) -> int | None:
    """Returns how often a "while" runs; None if the program does not tell."""
    if found := _TRIPS.search(loop.rest):
      return int(found[1])
    # XLA for TPU drops its note. JAX's scans count from 0 up to a constant.
    condition = self.computations[_CONDITION.search(loop.rest)[1]]
    bounds = [
      int(x.rest.partition(")")[0])
      for x in condition
      if x.operation == "constant" and x.type.startswith("s32[]")
    ]
    ordered = any(
      x.operation == "compare" and "direction=LT" in x.rest for x in condition
    )
    return bounds[0] if ordered and len(bounds) == 1 else None
