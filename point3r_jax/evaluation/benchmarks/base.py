"""What a dataset tells of itself, and what becomes of it: a benchmark."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from point3r_jax.errors import InputError
from point3r_jax.evaluation.sequences import LeftOut, Sequence

_MOST_LISTED = 10


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """A dataset, ready to be evaluated.

  Attributes:
    task: "mv_recon", "monodepth", "video_depth", "relpose", …
    dataset: its name.
    sequences: to predict and to score, in the dataset's order.
    left_out: sequences that should be there and cannot be used.
    options: the dataset's options dataclass, as it was used.
    root: the folder that was read; None for data that are made up.
    expected_sequences: of the published evaluation; None if it fixes none.
    expected_frames: likewise, of all sequences together.
  """

  task: str
  dataset: str
  sequences: list[Sequence]
  left_out: list[LeftOut]
  options: Any = None
  root: Path | None = None
  expected_sequences: int | None = None
  expected_frames: int | None = None


@dataclasses.dataclass(frozen=True)
class Layout:
  """What a dataset consists of, before any sequence has been looked at.

  Attributes:
    builders: by name, in order: what opens the sequence and checks all that
      can be checked without decoding frames. Raises `InputError`.
    root: see `Benchmark`.
    expected_sequences: see `Benchmark`.
    expected_frames: see `Benchmark`.
  """

  builders: Mapping[str, Callable[[], Sequence]]
  root: Path | None = None
  expected_sequences: int | None = None
  expected_frames: int | None = None


class Dataset(NamedTuple):
  """An entry of the registry.

  Attributes:
    options: a frozen dataclass with a default for every field.
    layout: (root, options) → what there is. The root is None if the user gave
      none; data that need no folder ignore it.
  """

  options: type
  layout: Callable[[Path | None, Any], Layout]


def build_sequences(
  layout: Layout, allow_missing: bool
) -> tuple[list[Sequence], list[LeftOut]]:
  """Opens all sequences.

  Returns:
    Those that can be used, and the others with the reason.

  Raises:
    InputError: some cannot be used and that is not allowed, or none can.
  """
  sequences, left_out = [], []
  for name, build in layout.builders.items():
    try:
      sequences.append(build())
    except InputError as error:
      left_out.append(LeftOut(name, str(error)))
  if not layout.builders:
    where = f"{layout.root}: " if layout.root else ""
    raise InputError(f"{where}there are no sequences to evaluate")
  if left_out and not (allow_missing and sequences):
    raise InputError(_broken(left_out, len(layout.builders)))
  return sequences, left_out


def _broken(left_out: list[LeftOut], total: int) -> str:
  """Says on one line what is wrong with which sequence."""
  listed = [f"{name}: {reason}" for name, reason in left_out[:_MOST_LISTED]]
  if len(left_out) > _MOST_LISTED:
    listed.append(f"and {len(left_out) - _MOST_LISTED} more")
  return (
    f"{len(left_out)} of {total} sequences cannot be used: "
    f"{'; '.join(listed)}. Repair them, or leave them out (--allow_missing)"
  )
