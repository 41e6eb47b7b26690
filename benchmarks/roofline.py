"""Says what a training step's kernels cost a GPU at least, without one.

  python -m benchmarks.roofline --case stage1 --topology h200:1

The step is compiled for a GPU that need not be there (extra "cuda"). For each
kernel of the program the bytes that it moves and, of products, convolutions and
attention, the operations are counted; the larger of both times at the rates
below, and a launch, is what it takes at least. So a change can be judged before
it is measured; what a kernel loses to its own imperfection is not in it.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import math
import re
from collections.abc import Iterator

from benchmarks.profiling import part
from benchmarks.training import add_step_flags, make_config
from point3r_jax.gpu_options import load_kernels_at_the_start
from point3r_jax.training.devices import topology_devices
from point3r_jax.training.experiment import open_experiment
from point3r_jax.training.hlo import (
  Instruction,
  Program,
  type_bytes,
  type_shape,
)
from point3r_jax.training.plan import for_devices, step_flops
from point3r_jax.training.programs import (
  abstract_state,
  batch_shapes,
  compiler_options,
  lower_step,
)

# What large kernels reach on an H200, and what one costs within a CUDA graph.
_BYTES_PER_SECOND = 3.9e12
_OPERATIONS_PER_SECOND = 680e12
_LAUNCH = 2e-6

# What is no kernel: names for results, and the ends of what has begun.
_FREE = {
  *("parameter", "get-tuple-element", "tuple", "bitcast", "constant"),
  *("after-all", "optimization-barrier", "fusion-done", "copy-done"),
  *("async-done", "async-update", "partition-id", "replica-id"),
}
_SCRATCH = re.compile(r"[su]8\[\d+\]")
_LABELS = re.compile(r"dim_labels=\w+?_(\w+?)->")
_CONTRACTED = re.compile(r'"lhs_contracting_dimensions":\["(\d+)"\]')


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A kernel of a program.

  Attributes:
    kind: of instruction.
    scope: where in the model it comes from.
    runs: how often the program runs it.
    bytes: that a run reads and writes.
    operations: that a run multiplies and adds.
  """

  kind: str
  scope: str
  runs: int
  bytes: int
  operations: float

  @property
  def seconds(self) -> float:
    """Least time of all runs."""
    busy = max(
      self.bytes / _BYTES_PER_SECOND, self.operations / _OPERATIONS_PER_SECOND
    )
    return self.runs * (busy + _LAUNCH)


def _operations(call: Instruction, shapes: dict[str, str]) -> float:
  """Returns the operations of a library's kernel."""
  operands = [type_shape(shapes[x]) for x in call.operands[:2]]
  result = type_shape(call.type)
  if found := _CONTRACTED.search(call.rest):
    return 2 * math.prod(result) * operands[0][int(found[1])]
  if "fmha" in call.rest or "mosaic_gpu" in call.rest:
    # (B, N, heads, d): queries, keys, values, and more for a backward pass.
    arrays = [type_shape(shapes[x]) for x in call.operands]
    if len(arrays[0]) == 2:  # A product of rows, with a matrix's.
      return 2 * arrays[0][0] * math.prod(arrays[1])
    arrays = [shape for shape in arrays if len(shape) == 4]
    backward = 2.5 if len(arrays) > 3 else 1
    return 4 * backward * math.prod(arrays[0]) * arrays[1][1]
  if labels := _LABELS.search(call.rest):
    if "BackwardFilter" in call.rest:
      maps, kernel = operands[1], result
    elif "BackwardInput" in call.rest:
      maps, kernel = operands
    else:
      maps, kernel = result, operands[1]
    features = kernel[labels[1].index("o")]
    return 2 * math.prod(maps) * math.prod(kernel) / features
  return 0


def _users(
  name: str, instructions: list[Instruction]
) -> Iterator[tuple[Instruction, int]]:
  """Yields who takes a result, as which operand; looks through bitcasts."""
  for user in instructions:
    if name in user.operands:
      if user.operation == "bitcast":
        yield from _users(user.name, instructions)
      else:
        yield user, user.operands.index(name)


def _fusion_bytes(instructions: list[Instruction]) -> int:
  """Returns what a fusion moves: of arrays that it slices the slices only."""
  named = {x.name: x for x in instructions}
  total = 0
  for x in instructions:
    if x.operation == "parameter":
      users = list(_users(x.name, instructions))
      sliced = [
        type_bytes(user.type) * (user.operation != "dynamic-update-slice")
        for user, position in users
        if position == 0
        and user.operation
        in ("dynamic-slice", "slice", "gather", "dynamic-update-slice")
      ]
      whole = type_bytes(x.type)
      partly = users and len(sliced) == len(users)
      total += min(sum(sliced), whole) if partly else whole
  root = next(x for x in instructions if x.root)
  results = [root]
  if root.operation == "tuple":
    results = [named[x] for x in root.operands]
  for x in results:
    while x.operation == "bitcast":
      x = named[x.operands[0]]
    if x.operation == "dynamic-update-slice":
      x = named[x.operands[1]]
    total += type_bytes(_SCRATCH.sub("", x.type))
  return total


def kernels(hlo: str) -> Iterator[Kernel]:
  """Yields the kernels of a program for GPUs.

  Args:
    hlo: text of an optimised module: `compiled.as_text()`.
  """
  program = Program(hlo)

  def visit(name: str, runs: int) -> Iterator[Kernel]:
    instructions = program.computations[name]
    shapes = {x.name: x.type for x in instructions}
    for x in instructions:
      if x.operation in _FREE:
        continue
      if x.operation in ("while", "conditional", "call"):
        rounds = program.rounds(x) or 1 if x.operation == "while" else 1
        for called in x.called:
          yield from visit(called, runs * rounds)
        continue
      kind, work, where, calls = x.operation, 0, shapes, [x]
      if x.operation.startswith("fusion"):
        calls = program.computations[next(x.called)]
        where = {y.name: y.type for y in calls}
        moved = _fusion_bytes(calls)
        if any(y.operation == "reduce" for y in calls):
          kind += ", with sums"
      else:
        moved = type_bytes(_SCRATCH.sub("", x.type)) + sum(
          type_bytes(shapes[y]) for y in x.operands if y in shapes
        )
      for y in calls:
        if target := re.search(r'custom_call_target="([^"]*)"', y.rest):
          kind = target[1].strip("_")
          work += _operations(y, where)
      scope = re.search(r'op_name="([^"]*)"', " ".join(y.rest for y in calls))
      yield Kernel(kind, scope[1] if scope else "", runs, moved, work)

  yield from visit(program.entry, 1)


def format_kernels(found: list[Kernel]) -> str:
  """Returns a table of least times, by part of the model and by kind."""
  lines = []

  def add(name: str, some: list[Kernel]) -> None:
    moved = sum(x.runs * x.bytes for x in some) / 1e9
    work = sum(x.runs * x.operations for x in some) / 1e12
    lines.append(
      f"{1e3 * sum(x.seconds for x in some):8.1f} ms {moved:7.1f} GB "
      f"{work:6.2f} TFLOP {sum(x.runs for x in some):7,} kernels  {name}"
    )

  add("all", found)
  for key in (lambda x: part(x.scope), lambda x: x.kind):
    lines.append("")
    groups = collections.defaultdict(list)
    for x in found:
      groups[key(x)].append(x)
    for name, some in sorted(
      groups.items(), key=lambda item: -sum(x.seconds for x in item[1])
    ):
      add(name, some)
  return "\n".join(lines)


def main() -> None:
  """Compiles the cases asked for and prints their tables."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add_step_flags(parser)
  parser.add_argument("--topology", default="h200:1")
  flags = parser.parse_args()
  load_kernels_at_the_start()
  for case in flags.case:
    devices = topology_devices(flags.topology)
    config = make_config(case, flags, len(devices))
    experiment = for_devices(open_experiment(config, devices))
    shape = (config.views, *config.image_sizes[0])
    compiled = lower_step(experiment, shape).compile(
      {
        **compiler_options(config.cuda_graphs, len(devices), "gpu"),
        **dict(flags.xla),
      }
    )
    needed = step_flops(
      experiment.step,
      abstract_state(experiment).params,
      batch_shapes(experiment, shape),
    )
    print(
      f"{case}: {needed / 1e12 / len(devices):.2f} TFLOP needed\n"
      f"{format_kernels(list(kernels(compiled.as_text())))}\n",
      flush=True,
    )


if __name__ == "__main__":
  main()
