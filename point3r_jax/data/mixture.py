"""A mixture of datasets: which sample stands at which place of the training.

  mixture = Mixture(
    parts=[(co3d, 10_000), (scannet, 5_000)],
    image_sizes=[(384, 512), (512, 384)],
    views=5,
    batch_size=128,
    epochs=10,
  )
  dataset = grain.MapDataset.source(mixture)

Sample i is a pure function of i: however many hosts, processes or threads read
it, and wherever a run was interrupted, it is the same.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from point3r_jax.data.record import (
  Record,
  SequenceSource,
  check_record,
  complete_record,
  record_error,
)
from point3r_jax.errors import InputError

# Generators of epoch e are seeded with e plus one of these, and this stride for
# each unit of the seed: seed 0 gives the published order.
_SUBSET_SEED = 777
_BATCH_SEED = 788
_SEED_STRIDE = 1_000_003

_log = logging.getLogger(__name__)


class _Rules(NamedTuple):
  """All that decides the order of an epoch, hashable.

  Attributes:
    lengths: of each dataset.
    samples: how many an epoch takes of each.
    sizes: P, image sizes to choose from.
    views: the fewest and the most.
    batch_size: G, samples in a batch.
    seed: of the run.
  """

  lengths: tuple[int, ...]
  samples: tuple[int, ...]
  sizes: int
  views: tuple[int, int]
  batch_size: int
  seed: int

  @property
  def steps(self) -> int:
    """S, batches in an epoch; an incomplete last one is dropped."""
    return sum(self.samples) // self.batch_size


class _Epoch(NamedTuple):
  """The order of an epoch.

  Attributes:
    source: (S·G,) int32, the dataset that a sample comes from.
    index: (S·G,) int32, its index there.
    size: (S,) int32, which image size a batch has.
    views: (S,) int32, how many views its samples have.
  """

  source: np.ndarray
  index: np.ndarray
  size: np.ndarray
  views: np.ndarray


class Draw(NamedTuple):
  """A sample of a run, before it is read.

  Attributes:
    source: the dataset's place in the mixture.
    index: the record in the dataset.
    views: T.
    image_size: (H, W).
    rng: the only source of randomness in reading it.
  """

  source: int
  index: int
  views: int
  image_size: tuple[int, int]
  rng: np.random.Generator


@functools.lru_cache(maxsize=4)
def _order_epoch(rules: _Rules, epoch: int) -> _Epoch:
  """Draws the order of an epoch."""
  base = epoch + _SEED_STRIDE * rules.seed
  # A dataset with more records than samples shows others in each epoch; one
  # with fewer repeats them.
  index = np.concatenate(
    [
      np.resize(
        np.random.default_rng(base + _SUBSET_SEED).permutation(length), samples
      )
      for length, samples in zip(rules.lengths, rules.samples, strict=True)
    ]
  )
  source = np.repeat(np.arange(len(rules.samples)), rules.samples)

  rng = np.random.default_rng(base + _BATCH_SEED)
  order = np.arange(len(index))
  rng.shuffle(order)
  order = order[: rules.steps * rules.batch_size]
  batches = -(-len(index) // rules.batch_size)
  size = np.zeros(batches)
  if rules.sizes > 1:
    weight = np.where(np.arange(rules.sizes) < rules.sizes // 2, 2.0, 1.0)
    size = rng.choice(rules.sizes, batches, p=weight / weight.sum())
  views = rng.integers(*rules.views, size=batches, endpoint=True)
  return _Epoch(
    *(x.astype(np.int32) for x in (source[order], index[order])),
    *(x[: rules.steps].astype(np.int32) for x in (size, views)),
  )


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
  """The samples of a training run, in order: a grain random-access source.

  An epoch takes a random subset of each dataset, shuffled together. All samples
  of a batch have one image size and one number of views, drawn for the batch;
  the first half of the sizes is twice as likely as the rest.

  Attributes:
    parts: (dataset, samples in an epoch).
    image_sizes: (H, W) to choose from.
    views: T, or (fewest, most), both included.
    batch_size: G, samples in a step over all processes.
    epochs: length of the run.
    seed: other seeds, other orders, subsets and samples.
    replace_unreadable: how many records, the next ones of the same dataset, may
      be tried in the place of one that is not to be had or not valid. 0: that
      is an error.
  """

  parts: Sequence[tuple[SequenceSource, int]]
  image_sizes: Sequence[tuple[int, int]]
  views: int | tuple[int, int]
  batch_size: int
  epochs: int
  seed: int = 0
  replace_unreadable: int = 0

  def __post_init__(self):
    """Checks what was given.

    Raises:
      InputError: a dataset is empty, or a value makes no sense.
    """
    if not self.parts or not self.image_sizes:
      raise InputError("a mixture needs a dataset and an image size at least")
    for source, samples in self.parts:
      if not len(source):
        raise InputError(f"dataset {source.name!r} is empty")
      if samples < 1:
        raise InputError(
          f"dataset {source.name!r}: {samples} samples in an epoch; it must be "
          "1 or more, or the dataset left out"
        )
    views = self._rules.views
    if len(views) != 2 or not 1 <= views[0] <= views[1]:
      raise InputError(
        f"views is {self.views}: it must be 1 or more, or (fewest, most)"
      )
    for size in self.image_sizes:
      if len(size) != 2 or min(size) < 1:
        raise InputError(f"image size {size} is not (height, width)")
    if self.batch_size < 1 or self.epochs < 1:
      raise InputError(
        f"batch size {self.batch_size} and epochs {self.epochs} must be 1 or "
        "more"
      )
    if self.seed < 0 or self.replace_unreadable < 0:
      raise InputError(
        f"seed {self.seed} and replace_unreadable {self.replace_unreadable} "
        "must be 0 or more"
      )
    if not self.steps_per_epoch:
      raise InputError(
        f"an epoch of {sum(self._rules.samples)} samples has no full batch of "
        f"{self.batch_size}"
      )

  @functools.cached_property
  def _rules(self) -> _Rules:
    views = (self.views,) * 2 if isinstance(self.views, int) else self.views
    return _Rules(
      lengths=tuple(len(source) for source, _ in self.parts),
      samples=tuple(samples for _, samples in self.parts),
      sizes=len(self.image_sizes),
      views=tuple(views),
      batch_size=self.batch_size,
      seed=self.seed,
    )

  @property
  def steps_per_epoch(self) -> int:
    """Batches in an epoch; an incomplete last one is dropped."""
    return self._rules.steps

  def __len__(self) -> int:
    """Samples in all epochs."""
    return self.epochs * self.steps_per_epoch * self.batch_size

  def image_size_of(self, step: int) -> tuple[int, int]:
    """Returns the (H, W) of a batch, counted from the start of the run.

    Raises:
      IndexError: there is no such step.
    """
    order, batch = self._batch(step)
    return tuple(self.image_sizes[order.size[batch]])

  def views_of(self, step: int) -> int:
    """Returns the T of a batch, counted from the start of the run.

    Raises:
      IndexError: there is no such step.
    """
    order, batch = self._batch(step)
    return int(order.views[batch])

  def _batch(self, step: int) -> tuple[_Epoch, int]:
    """Returns the epoch's order that a step is in, and where in it."""
    if not 0 <= step < self.epochs * self.steps_per_epoch:
      raise IndexError(
        f"step {step} is not in a mixture of {self.epochs} epochs of "
        f"{self.steps_per_epoch} steps"
      )
    epoch, batch = divmod(step, self.steps_per_epoch)
    return _order_epoch(self._rules, epoch), batch

  def draw(self, position: int, replaced: int = 0) -> Draw:
    """Says which sample is at a position.

    Args:
      position: in the run; batch s is the positions from s·G to (s + 1)·G.
      replaced: so many records there could not be read; the sample is of the
        one so many further on in its dataset.

    Raises:
      IndexError: there is no such position.
    """
    position = operator.index(position)
    if not 0 <= position < len(self):
      raise IndexError(
        f"position {position} is not in a mixture of {len(self)} samples"
      )
    epoch, place = divmod(position, self.steps_per_epoch * self.batch_size)
    order = _order_epoch(self._rules, epoch)
    batch, source = place // self.batch_size, int(order.source[place])
    index = int(order.index[place]) + replaced
    seed = (self.seed, epoch, place, replaced)[: 4 if replaced else 3]
    return Draw(
      source=source,
      index=index % self._rules.lengths[source],
      views=int(order.views[batch]),
      image_size=tuple(self.image_sizes[order.size[batch]]),
      rng=np.random.default_rng(seed),
    )

  def __getitem__(self, position: int) -> Record:
    """Reads the sample at a position; see `draw`.

    Raises:
      IndexError: there is no such position.
      InputError: the dataset cannot give the record, or gives no valid one, and
        none of those that may replace it; names the dataset and the first.
    """
    first = None
    for replaced in range(self.replace_unreadable + 1):
      draw = self.draw(position, replaced)
      try:
        record = self._read(draw)
      except InputError as error:
        first = first or error
        continue
      if replaced:
        _log.warning("record %d is read instead: %s", draw.index, first)
      return record
    raise first

  def _read(self, draw: Draw) -> Record:
    """Reads a sample; raises InputError, which names it, if it cannot."""
    source = self.parts[draw.source][0]
    where = f"dataset {source.name!r}, record {draw.index}"
    try:
      record = source.sequence(
        draw.index, draw.views, draw.image_size, draw.rng
      )
    except Exception as error:
      raise record_error(where, error) from None
    record = complete_record(record, draw.source, draw.index)
    check_record(record, where, draw.views, draw.image_size)
    return record

  def fingerprint(self) -> dict[str, Any]:
    """Returns all that decides the order, for checkpoints; survives JSON.

    A run that is resumed goes on with the same data if this is equal.
    """
    return {
      "datasets": [
        {"name": source.name, "length": len(source), "samples": samples}
        for source, samples in self.parts
      ],
      "image_sizes": [list(size) for size in self.image_sizes],
      "views": list(self._rules.views),
      "batch_size": self.batch_size,
      "epochs": self.epochs,
      "seed": self.seed,
    }
