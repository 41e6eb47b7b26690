"""The datasets of the published evaluation: from disk to sequences.

  benchmark = open_benchmark("video_depth", "bonn", "/data/bonn")
  for sequence in benchmark.sequences:
    image = sequence.load_image(0)

Each dataset is a module that describes the layout on disk; its options are a
frozen dataclass whose defaults are those of the published numbers. Some of
these need prepared data: frames that scripts of others select and copy.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from point3r_jax.errors import InputError
from point3r_jax.evaluation.benchmarks import (
  bonn,
  kitti,
  nrgbd,
  nyu,
  scannet,
  seven_scenes,
  sintel,
  synthetic,
  tum,
)
from point3r_jax.evaluation.benchmarks.base import (
  Benchmark,
  Dataset,
  Layout,
  build_sequences,
)
from point3r_jax.evaluation.benchmarks.builders import DepthOptions
from point3r_jax.evaluation.options import parse_options

__all__ = [
  "DATASETS",
  "Benchmark",
  "Dataset",
  "Layout",
  "default_task",
  "find_dataset",
  "open_benchmark",
]


def _depth_datasets(independent: bool) -> dict[str, Dataset]:
  """The sets that are scored image by image or as videos."""
  layouts = {
    "sintel": (sintel.SintelDepthOptions, sintel.depth_layout),
    "bonn": (bonn.BonnOptions, bonn.layout),
    "kitti": (kitti.KittiOptions, kitti.layout),
  }
  return {
    name: Dataset(options, functools.partial(layout, independent=independent))
    for name, (options, layout) in layouts.items()
  }


# By task and name. Add to it to make a dataset known.
DATASETS: dict[str, dict[str, Dataset]] = {
  "mv_recon": {
    "7scenes": Dataset(seven_scenes.SevenScenesOptions, seven_scenes.layout),
    "nrgbd": Dataset(nrgbd.NrgbdOptions, nrgbd.layout),
  },
  "monodepth": {
    "nyu": Dataset(DepthOptions, nyu.layout),
    **_depth_datasets(independent=True),
  },
  "video_depth": _depth_datasets(independent=False),
  "relpose": {
    "scannet": Dataset(scannet.ScanNetOptions, scannet.layout),
    "tum": Dataset(tum.TumOptions, tum.layout),
    "sintel": Dataset(sintel.SintelPoseOptions, sintel.pose_layout),
  },
  "synthetic": {
    "synthetic": Dataset(synthetic.SyntheticOptions, synthetic.layout),
  },
}


def default_task(dataset: str) -> str:
  """Returns the only task that a dataset is for.

  Raises:
    InputError: it is for several tasks or none.
  """
  tasks = [task for task in DATASETS if dataset in DATASETS[task]]
  if not tasks:
    raise InputError(f"no dataset {dataset!r}; there are {_list_datasets()}")
  if len(tasks) > 1:
    raise InputError(
      f"--task is missing: {dataset} is in {', '.join(tasks)}; name one of them"
    )
  return tasks[0]


def find_dataset(task: str, dataset: str) -> Dataset:
  """Returns a dataset.

  Raises:
    InputError: there is none of this name for the task.
  """
  found = DATASETS.get(task, {}).get(dataset)
  if found is None:
    raise InputError(
      f"no dataset {dataset!r} for {task!r}; there are {_list_datasets()}"
    )
  return found


def _list_datasets() -> str:
  """Returns the names of all tasks and datasets."""
  return "; ".join(f"{task}: {', '.join(DATASETS[task])}" for task in DATASETS)


def open_benchmark(
  task: str,
  dataset: str,
  root: str | os.PathLike[str] | None,
  options: Mapping[str, Any] | None = None,
  allow_missing: bool = False,
) -> Benchmark:
  """Opens a dataset: finds its sequences and checks them.

  Args:
    task: a key of `DATASETS`.
    dataset: a key of `DATASETS[task]`.
    root: the folder with the data, or one that holds it.
    options: overrides of the dataset's options; text or values.
    allow_missing: whether sequences that are missing or broken may be left out.

  Returns:
    The benchmark. No frame has been decoded yet.

  Raises:
    InputError: there is no such dataset or option, or some of the sequences
      are missing or broken, which are listed with the reasons.
  """
  entry = find_dataset(task, dataset)
  parsed = parse_options(entry.options, options)
  layout = entry.layout(None if root is None else Path(root), parsed)
  sequences, left_out = build_sequences(layout, allow_missing)
  return Benchmark(
    task=task,
    dataset=dataset,
    sequences=sequences,
    left_out=left_out,
    options=parsed,
    root=layout.root,
    expected_sequences=layout.expected_sequences,
    expected_frames=layout.expected_frames,
  )
