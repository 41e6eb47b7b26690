"""What an evaluation found: plain data, as it goes into the reports."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from point3r_jax.evaluation.sequences import LeftOut


@dataclasses.dataclass(frozen=True)
class SequenceResult:
  """What was measured on one sequence.

  Attributes:
    name: of the sequence.
    frames: how many it has.
    metrics: by name; `ALIGNMENT/NAME` where several alignments are scored.
    weight: of the sequence in averages that weigh pixels (valid pixels).
    per_frame: by metric, one value a frame, for plots; may be empty.
    pointers: pointers in memory after each frame.
    seconds: time that each frame took, shared among the streams of a batch;
      compilation is not in it.
    overflow: pointers that found no room and were merged into their nearest.
    excluded: why it does not enter the averages; None if it does.
  """

  name: str
  frames: int
  metrics: Mapping[str, float]
  weight: float = 1.0
  per_frame: Mapping[str, list[float]] = dataclasses.field(default_factory=dict)
  pointers: list[int] = dataclasses.field(default_factory=list)
  seconds: list[float] = dataclasses.field(default_factory=list)
  overflow: int = 0
  excluded: str | None = None


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What was measured on a dataset.

  Attributes:
    task: "mv_recon", "monodepth", "video_depth", "relpose" or "synthetic".
    dataset: its name.
    metrics: averages over the sequences, named as theirs.
    sequences: one result each, in the dataset's order.
    left_out: sequences that could not be evaluated (with --allow_missing).
    run: JSON-friendly facts: model config, checkpoint and its hash, protocol
      options, versions, device, precision.
  """

  task: str
  dataset: str
  metrics: Mapping[str, float]
  sequences: list[SequenceResult]
  left_out: list[LeftOut] = dataclasses.field(default_factory=list)
  run: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def partial(self) -> bool:
    """Whether something that belongs to the dataset is missing."""
    return bool(self.left_out)
