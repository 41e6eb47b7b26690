"""From a dataset of records to the batches of one process, read ahead.

  dataset = grain.MapDataset.source(mixture)
  with open_loader(
    dataset,
    batch_size=mixture.batch_size,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    start_step=step,
    workers=8,
  ) as loader:
    for batch in loader:
      ...

Batch s is a pure function of s. So a run may be resumed with another number of
processes, workers or threads and still sees the same data.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence

import grain
import jax
import numpy as np
from absl import flags

from point3r_jax.data.record import Record, check_record, record_error
from point3r_jax.errors import InputError


class Loader(Iterator[Record]):
  """An iterator over batches that owns threads and worker processes.

  Close it, or use it in a `with` statement; an error closes it, too.

  Attributes:
    steps: batches from the start of the run to its end.
  """

  steps: int

  def __init__(self, batches: grain.DatasetIterator, steps: int):
    """Takes what `open_loader` has built."""
    self._batches = batches
    self.steps = steps

  def __next__(self) -> Record:
    """Returns the next batch: a record whose arrays have a leading axis."""
    try:
      return next(self._batches)
    except StopIteration:
      raise
    except BaseException:
      self.close()  # The next call would go on behind what failed.
      raise

  def close(self) -> None:
    """Ends the worker processes; returns once they are gone."""
    self._batches.close()
    # What ended the iteration is in a reference cycle with the last batch,
    # whose shared memory Python would else report as leaked.
    gc.collect()

  def __enter__(self) -> Loader:
    """Returns itself."""
    return self

  def __exit__(self, *_) -> None:
    """Closes."""
    self.close()


class _Batches:
  """The batches of one process, a random-access source of its own."""

  def __init__(
    self,
    dataset: grain.MapDataset,
    batch_size: int,
    process_index: int,
    process_count: int,
    steps: range,
  ):
    self._dataset = dataset
    self._batch_size = batch_size
    self._process_index = process_index
    self._process_count = process_count
    self._steps = steps

  def __len__(self) -> int:
    return len(self._steps)

  def __getitem__(self, item: int) -> Record:
    start = self._steps[item] * self._batch_size
    positions = range(
      start + self._process_index, start + self._batch_size, self._process_count
    )
    return _stack([self._record(i) for i in positions], positions)

  def _record(self, position: int) -> Record:
    where = f"sample {position}"
    try:
      record = self._dataset[position]
    except Exception as error:
      raise record_error(where, error) from None
    if record is None:
      raise InputError(
        f"{where} was filtered out; filter before the samples are put in order"
      )
    if "source" in record and "index" in record:
      where += f" (dataset {record['source']}, record {record['index']})"
    check_record(record, where)
    return record


def _stack(records: Sequence[Record], positions: Sequence[int]) -> Record:
  """Puts records side by side along a new first axis."""
  want = records[0]["image"].shape
  for position, record in zip(positions, records, strict=True):
    if (got := record["image"].shape) != want:
      raise InputError(
        f"sample {position}: image has shape {got}, but that of sample "
        f"{positions[0]} in the same batch {want}; a batch needs one image "
        "size and one number of views"
      )
  return {key: np.stack([r[key] for r in records]) for key in records[0]}


def _start_worker(index: int, count: int) -> None:
  """Prepares a worker process."""
  del index, count
  # Readers may use JAX, but the accelerators belong to the main process.
  jax.config.update("jax_platforms", "cpu")
  # Ctrl-C, and SIGTERM from a scheduler, go to all processes; the main one
  # decides what follows, and may need more batches until then.
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
  """Ends this process when its parent has been killed."""
  multiprocessing.parent_process().join()
  os._exit(1)


def open_loader(
  dataset: grain.MapDataset,
  *,
  batch_size: int,
  process_index: int,
  process_count: int,
  start_step: int = 0,
  workers: int = 0,
  threads: int = 4,
  prefetch: int = 2,
) -> Loader:
  """Starts to read batches.

  Batch s of all processes is the records from s·G to (s + 1)·G of the dataset;
  process p of P takes every P-th of them, from the p-th. An incomplete last
  batch is dropped.

  Worker processes import the main module anew, so a script needs the usual `if
  __name__ == "__main__"`. They hand over batches in shared memory: a container
  needs a /dev/shm with room for `workers * prefetch` of them.

  Args:
    dataset: of records in the order of the run, such as
      `grain.MapDataset.source(mixture)`. Any pipeline of random access does, as
      long as each sample depends on its position alone.
    batch_size: G, over all processes.
    process_index: p, this process.
    process_count: P.
    start_step: the first batch to give; 0 at the start of the run.
    workers: worker processes; 0: read in threads of this process.
    threads: reading threads, in each worker. Each makes a batch of its own.
    prefetch: batches to have ready, of each worker.

  Returns:
    The batches: records whose arrays have a leading axis of G / P.

  Raises:
    InputError: the dataset gives no random access or not one batch, or a value
      makes no sense. Iterating raises it for a record that is not to be had or
      not valid; the message names it.
  """
  if not isinstance(dataset, grain.MapDataset):
    raise InputError(
      f"the loader takes a grain.MapDataset, got {type(dataset).__name__}: "
      "only random access can be resumed exactly; wrap a mixture in "
      "grain.MapDataset.source(mixture), and leave `to_iter_dataset` out"
    )
  if not 0 <= process_index < process_count:
    raise InputError(f"there is no process {process_index} of {process_count}")
  if batch_size < 1 or batch_size % process_count:
    raise InputError(
      f"a batch of {batch_size} cannot be shared evenly by {process_count} "
      "processes"
    )
  if workers < 0 or threads < 1 or prefetch < 1:
    raise InputError(
      f"workers {workers} must be 0 or more, threads {threads} and prefetch "
      f"{prefetch} 1 or more"
    )
  steps = len(dataset) // batch_size
  if not steps:
    raise InputError(
      f"a dataset of {len(dataset)} samples has no full batch of {batch_size}"
    )
  if not 0 <= start_step <= steps:
    raise InputError(f"cannot start at step {start_step} of {steps}")

  batches = _Batches(
    dataset, batch_size, process_index, process_count, range(start_step, steps)
  )
  # With workers, the queue between processes is what holds finished batches.
  ahead = threads if workers else max(threads, prefetch)
  iterable = grain.MapDataset.source(batches).to_iter_dataset(
    grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
  )
  if workers:
    if not flags.FLAGS.is_parsed():  # grain reads flags; not all use absl.app.
      flags.FLAGS.mark_as_parsed()
    iterable = iterable.mp_prefetch(
      grain.MultiprocessingOptions(workers, per_worker_buffer_size=prefetch),
      worker_init_fn=_start_worker,
    )
  return Loader(iter(iterable), steps)
