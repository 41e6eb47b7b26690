"""Batches: the same whoever reads them, and clear errors."""

import multiprocessing

import chex
import grain
import numpy as np
import pytest

from point3r_jax.data.loader import open_loader
from point3r_jax.data.mixture import Mixture
from point3r_jax.errors import InputError
from tests.data.tiny_source import TinySource

BATCH = 4


def make_dataset(source=None, sizes=((4, 6), (6, 4))):
  """Six batches."""
  parts = [(source or TinySource(), 12)]
  mixture = Mixture(parts, sizes, views=2, batch_size=BATCH, epochs=2)
  return grain.MapDataset.source(mixture)


def read(dataset, **options):
  options = {"process_index": 0, "process_count": 1, **options}
  return open_loader(dataset, batch_size=BATCH, **options)


def stack(records):
  return {key: np.stack([x[key] for x in records]) for key in records[0]}


def flip(record, rng):
  image = record["image"]
  return {**record, "image": image[:, ::-1] if rng.random() < 0.5 else image}


def test_batches_are_consecutive_records_however_read():
  dataset = make_dataset()
  want = [
    stack([dataset[BATCH * step + i] for i in range(BATCH)])
    for step in range(6)
  ]
  for threads, prefetch in ((1, 1), (4, 2)):
    with read(dataset, threads=threads, prefetch=prefetch) as loader:
      assert loader.steps == 6
      chex.assert_trees_all_equal(list(loader), want)


def test_processes_share_a_batch():
  whole = list(read(make_dataset()))
  halves = [
    list(read(make_dataset(), process_index=p, process_count=2)) for p in (0, 1)
  ]
  for step, batch in enumerate(whole):
    for p in (0, 1):
      mine = {key: value[p::2] for key, value in batch.items()}
      chex.assert_trees_all_equal(halves[p][step], mine)


def test_resumes_at_any_step():
  """Also with a pipeline of one's own, of random augmentation and mixing."""
  parts = [
    make_dataset(TinySource(length=length), [(4, 6)]).repeat()
    for length in (5, 9)
  ]
  own = grain.MapDataset.mix(parts, weights=[2, 1]).seed(3).random_map(flip)
  for dataset in (make_dataset(), own[: 6 * BATCH]):
    whole = list(read(dataset))
    for step in (1, 5, 6):
      rest = list(read(dataset, start_step=step))
      chex.assert_trees_all_equal(rest, whole[step:])
      assert len(rest) == 6 - step


@pytest.mark.parametrize(
  "workers", [pytest.param(1, marks=pytest.mark.slow), 2]
)
def test_workers_give_the_same_and_end(workers):
  dataset = make_dataset(TinySource(length=50))
  want = list(read(dataset, start_step=1))
  # A record of the last batch fails: those before it come all the same.
  last = int(want[-1]["index"][2])
  broken = TinySource(length=50, broken=[last], error=OSError("torn"))
  with read(make_dataset(broken), start_step=1, workers=workers) as loader:
    batches = [next(loader)]
    assert len(multiprocessing.active_children()) == workers
    batches += [next(loader) for _ in want[1:-1]]
    chex.assert_trees_all_equal(batches, want[:-1])
    with pytest.raises(
      InputError, match=f"sample 22: dataset 'tiny', record {last}: OSError"
    ) as caught:
      next(loader)
    assert "in sequence" in caught.value.__notes__[0]  # Where it was raised.
    assert not multiprocessing.active_children()


def test_nothing_follows_an_error():
  loader = read(make_dataset(TinySource(length=1, broken=[0], error=OSError())))
  with pytest.raises(InputError, match="sample 0: dataset 'tiny', record 0"):
    next(loader)
  with pytest.raises(ValueError, match="closed"):
    next(loader)


def scale_poses(record):
  return {**record, "camera_to_world": record["camera_to_world"] * 2}


def other_size(position, record):
  if position != 5:
    return record
  image, depth = record["image"][:, :2], record["depth"][:, :2]
  return {**record, "image": image, "depth": depth}


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      lambda x: x.map(scale_poses),
      r"sample 0 \(dataset 0, record \d\), view 0",
    ),
    pytest.param(
      lambda x: x.map_with_index(other_size),
      "sample 5: .* sample 4 in the",
      marks=pytest.mark.slow,
    ),
    (lambda x: x.filter(lambda _: False), "sample 0 was filtered out"),
  ],
)
def test_what_a_pipeline_made_of_records_is_checked(change, message):
  dataset = change(make_dataset(sizes=[(4, 6)]))
  with read(dataset) as loader, pytest.raises(InputError, match=message):
    list(loader)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"process_count": 3}, "batch of 4 cannot be shared evenly by 3"),
    ({"process_index": 2, "process_count": 2}, "no process 2 of 2"),
    ({"start_step": 7}, "start at step 7 of 6"),
    ({"threads": 0}, "threads 0"),
  ],
)
def test_refuses_what_makes_no_sense(options, message):
  with pytest.raises(InputError, match=message):
    read(make_dataset(), **options)


def test_refuses_what_has_no_random_access_or_no_batch():
  with pytest.raises(InputError, match="got PrefetchIterDataset: only random"):
    read(make_dataset().to_iter_dataset())
  with pytest.raises(InputError, match="3 samples has no full batch of 4"):
    read(make_dataset()[:3])
