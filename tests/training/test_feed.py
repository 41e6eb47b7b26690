"""Batches that devices render are those that the loader reads."""

import multiprocessing

import chex
import jax
import numpy as np
import pytest

from point3r_jax.config import PRESETS
from point3r_jax.data.mixture import Mixture
from point3r_jax.errors import InputError, UserError
from point3r_jax.training.experiment import make_mixture, open_experiment
from point3r_jax.training.feed import open_feed
from point3r_jax.training.programs import batch_shapes
from tests import micro
from tests.data.tiny_source import TinySource
from tests.training import micro_run

SIZE = (16, 32)


@pytest.fixture(autouse=True)
def presets(monkeypatch):
  monkeypatch.setitem(PRESETS, "micro", micro.CONFIG)


def experiment(**changes):
  config = micro_run.get_config()
  config.image_sizes = (SIZE,)
  config.batch_size = 4
  config.datasets.synthetic.samples = 12
  config.datasets.synthetic.metric = 0.5
  config.update_from_flattened_dict(changes)
  return open_experiment(config, jax.devices()[:2])


@pytest.mark.slow
def test_devices_render_what_the_loader_reads():
  read, rendered = (
    experiment(render_on_devices=on_devices) for on_devices in (False, True)
  )
  mixture, first = make_mixture(read.config), 1  # As if resumed.
  flags = []
  with (
    jax.set_mesh(read.mesh),
    open_feed(read, mixture, first) as expected,
    open_feed(rendered, mixture, first) as feed,
  ):
    for want, got in zip(expected, feed, strict=True):
      assert got.samples == want.samples
      shapes = batch_shapes(rendered, (2, *SIZE))
      chex.assert_trees_all_equal_shapes_and_dtypes(got.arrays, shapes)
      for name, x in got.arrays.items():
        wanted = shapes[name].sharding
        assert x.sharding.is_equivalent_to(wanted, x.ndim), name
      flags += list(np.asarray(got.arrays["is_metric"]))
      image, other = (
        np.asarray(batch.arrays.pop("image"), int) for batch in (want, got)
      )
      assert image.std() > 10
      # Programs may round to either side of an edge.
      assert np.mean(np.abs(image - other) > 1) < 0.01
      depth, other = (
        np.asarray(batch.arrays.pop("depth")) for batch in (want, got)
      )
      assert np.mean(~np.isclose(depth, other, rtol=1e-4)) < 0.01
      chex.assert_trees_all_close(want.arrays, got.arrays, atol=1e-4)
  assert len(flags) == 2 * 4 and 0 < np.sum(flags) < len(flags)


def test_only_made_up_scenes_are_rendered():
  run = experiment(render_on_devices=True)
  mixture = Mixture(
    [(TinySource("photos"), 4)], (SIZE,), views=2, batch_size=4, epochs=1
  )
  with (
    pytest.raises(InputError, match="only dataset, got photos"),
    open_feed(run, mixture, 0) as feed,
  ):
    next(feed)


@pytest.mark.slow
def test_a_killed_process_of_the_loader_is_one_line():
  run = experiment(
    **{"loader.workers": 1, "loader.prefetch": 1, "epochs": 1_000}
  )
  before = set(multiprocessing.active_children())
  with (
    jax.set_mesh(run.mesh),
    open_feed(run, make_mixture(run.config), 0) as feed,
  ):
    next(feed)
    for process in set(multiprocessing.active_children()) - before:
      process.kill()
    with pytest.raises(UserError, match="loader was killed"):
      for _ in feed:
        pass
