"""Batches on the devices: read by a loader, or rendered where they are used.

A feed is an iterator of `Batch`, from the step on that a run has reached. Both
feeds take the samples that a mixture puts at a step's positions; a loader reads
any other dataset as well.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from point3r_jax.data.loader import Loader, open_loader
from point3r_jax.data.mixture import Mixture
from point3r_jax.data.record import Record
from point3r_jax.data.synthetic.render import Options
from point3r_jax.data.synthetic.source import Recipe, SyntheticSource, render
from point3r_jax.errors import InputError, UserError
from point3r_jax.training.experiment import Experiment
from point3r_jax.training.sharding import AXES, batch_sharding
from point3r_jax.training.step import FLAGS

# Fields of a record that say which one it is; the step has no use for them.
_IDENTITY = ("source", "index")
# In what grain raises when a process of its was killed.
_WORKER_DIED = "Worker process was terminated"


class Batch(NamedTuple):
  """One step's sequences.

  Attributes:
    arrays: (B, …) of all processes, split over the devices; the fields of
      `data.record` without the identity.
    samples: names the records of this process.
  """

  arrays: dict[str, jax.Array]
  samples: str


def _name(samples: Mixture | grain.MapDataset, sources, indices) -> str:
  """Says which records a process's batch is made of."""

  def name(source):
    if isinstance(samples, Mixture):
      return samples.parts[source][0].name
    return f"dataset {source} record"

  return ", ".join(
    f"{name(source)} {index}"
    for source, index in zip(sources, indices, strict=True)
  )


def _upload(experiment: Experiment, tree):
  """Joins the processes' arrays (B / P, …) to those of all, on the devices."""
  sharding = batch_sharding(experiment.mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), tree
  )


def _read_records(loader: Loader) -> Iterator[Record]:
  """Yields a loader's batches.

  Raises:
    UserError: one of its processes was killed.
  """
  try:
    yield from loader
  except RuntimeError as error:
    if _WORKER_DIED not in str(error):
      raise
    raise UserError(
      "a process of the loader was killed, perhaps for lack of memory or of "
      "room in /dev/shm; lower config.loader.workers or config.loader.prefetch"
    ) from error


@contextlib.contextmanager
def _read(
  experiment: Experiment, samples: Mixture | grain.MapDataset, first: int
) -> Iterator[Iterator[Batch]]:
  """Yields the feed of what a loader reads."""
  config = experiment.config
  if isinstance(samples, Mixture):
    dataset = grain.MapDataset.source(samples)
  else:
    dataset = samples

  def batches(loader):
    for record in _read_records(loader):
      names = _name(samples, record["source"], record["index"])
      arrays = {k: x for k, x in record.items() if k not in _IDENTITY}
      yield Batch(_upload(experiment, arrays), names)

  with (
    open_loader(
      dataset,
      batch_size=config.batch_size,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      start_step=first,
      **config.loader.to_dict(),
    ) as loader,
    # It holds a batch, whose shared memory the loader's end is to free.
    contextlib.closing(batches(loader)) as feed,
  ):
    yield feed


@functools.partial(jax.jit, static_argnames=("views", "image_size", "options"))
def render_batch(
  recipes: Recipe, *, views: int, image_size: tuple[int, int], options: Options
) -> dict[str, jax.Array]:
  """Renders sequences, each device of the mesh in use its own.

  Args:
    recipes: of B sequences, split over the devices.
    views: T.
    image_size: (H, W).
    options: what is made up.

  Returns:
    Arrays (B, …), split likewise; the fields of `data.record` without the
    identity.
  """

  def one(recipe):
    flags = dict.fromkeys(FLAGS, jnp.array(False))
    return flags | render(
      recipe, views=views, image_size=image_size, options=options
    )

  split = PartitionSpec(AXES)
  every = jax.shard_map(
    jax.vmap(one), in_specs=split, out_specs=split, check_vma=False
  )
  return every(recipes)


def _render(
  experiment: Experiment, mixture: Mixture | grain.MapDataset, first: int
) -> Iterator[Batch]:
  """Yields batches that the devices render.

  Raises:
    InputError: the samples are not of synthetic scenes alone.
  """
  if not isinstance(mixture, Mixture):
    raise InputError(
      "config.render_on_devices is for the dataset `synthetic`; set it to "
      "False for one of your own"
    )
  sources = [source for source, _ in mixture.parts]
  if len(sources) != 1 or not isinstance(sources[0], SyntheticSource):
    raise InputError(
      "config.render_on_devices needs `synthetic` as the only dataset, got "
      f"{', '.join(source.name for source in sources)}"
    )
  (source,), size = sources, mixture.batch_size
  for step in range(first, len(mixture) // size):
    mine = range(jax.process_index(), size, jax.process_count())
    draws = [mixture.draw(step * size + place) for place in mine]
    recipes = [source.recipe(draw.index, draw.rng) for draw in draws]
    recipes = jax.tree.map(lambda *x: np.stack(x), *recipes)
    yield Batch(
      render_batch(
        _upload(experiment, recipes),
        views=draws[0].views,
        image_size=draws[0].image_size,
        options=source.options,
      ),
      _name(mixture, *zip(*(draw[:2] for draw in draws), strict=True)),
    )


def open_feed(
  experiment: Experiment, samples: Mixture | grain.MapDataset, first: int
) -> contextlib.AbstractContextManager[Iterator[Batch]]:
  """Opens the feed that the config asks for.

  Iterate under the experiment's mesh (`jax.set_mesh`).

  Args:
    experiment: the run.
    samples: its samples, in order.
    first: the step to begin with, from 0.

  Returns:
    A context manager of an iterator of batches, one a step.
  """
  if experiment.config.render_on_devices:
    return contextlib.nullcontext(_render(experiment, samples, first))
  return _read(experiment, samples, first)
