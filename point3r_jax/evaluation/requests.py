"""What is to be evaluated: tasks, options, and what they make of a dataset."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from point3r_jax.errors import InputError
from point3r_jax.evaluation.benchmarks import (
  Benchmark,
  find_dataset,
  open_benchmark,
)
from point3r_jax.evaluation.made_up import SyntheticTask, SyntheticTaskOptions
from point3r_jax.evaluation.options import options_dict, parse_options
from point3r_jax.evaluation.reconstruction import ReconstructionOptions
from point3r_jax.evaluation.tasks import (
  DepthTask,
  DepthTaskOptions,
  PoseTask,
  PoseTaskOptions,
  ReconstructionTask,
  Task,
)

# How the published evaluation runs the model.
PUBLISHED_STREAM = {
  "precision": "float32",
  "fusion": True,
  "fusion_divisor": 20.0,
  "rotary": True,
  "max_capacity": None,
}

# Options of datasets that choose sequences, frames (each prediction knows its
# own) or truth, and change nothing in an image.
_NOT_OF_IMAGES = {
  *("sequences", "scenes", "setting", "stride", "max_frames"),
  *("max_depth", "non_finite_pose"),
}
# Published too, if not all at once.
_PUBLISHED_ALIGNMENTS = {"scale", "scale_shift", "lad", "metric"}
# A thousand whole maps are more than neighbours can be searched in.
_LONG_PIXEL_STRIDE = 8


class _TaskEntry(NamedTuple):
  """How a task is made: its options, and their defaults for a dataset."""

  options: type
  make: Callable[[Any], Task]
  defaults: Mapping[str, Mapping[str, Any]]


_TASKS = {
  "mv_recon": _TaskEntry(ReconstructionOptions, ReconstructionTask, {}),
  "monodepth": _TaskEntry(
    DepthTaskOptions,
    lambda options: DepthTask(options, by_image=True),
    {
      "nyu": {"alignments": ("median",)},
      "sintel": {
        "alignments": ("median",),
        "max_depth": 70.0,
        "post_clip": 70.0,
      },
      "bonn": {"alignments": ("median",), "max_depth": 70.0},
      "kitti": {"alignments": ("median",)},
    },
  ),
  "video_depth": _TaskEntry(
    DepthTaskOptions,
    lambda options: DepthTask(options, by_image=False),
    {
      "sintel": {"max_depth": 70.0, "post_clip": 70.0},
      "bonn": {"max_depth": 70.0},
    },
  ),
  "relpose": _TaskEntry(PoseTaskOptions, PoseTask, {}),
  "synthetic": _TaskEntry(SyntheticTaskOptions, SyntheticTask, {}),
}


def known_options(task: str, dataset: str) -> dict[str, Any]:
  """Returns all options of a task on a dataset with their defaults.

  Raises:
    InputError: there is no such task or dataset.
  """
  benchmark, scoring = _options(task, dataset, {})
  return options_dict(benchmark) | options_dict(scoring)


def _options(
  task: str, dataset: str, overrides: Mapping[str, Any]
) -> tuple[Any, Any]:
  """Divides options among the dataset's and the task's dataclasses."""
  data = find_dataset(task, dataset).options
  entry = _TASKS[task]
  fields = {
    cls: [field.name for field in dataclasses.fields(cls)]
    for cls in (data, entry.options)
  }
  known = set().union(*fields.values())
  unknown = sorted(set(overrides) - known)
  if unknown:
    raise InputError(
      f"{task} on {dataset} has no option {', '.join(unknown)}; the options "
      f"are: {', '.join(sorted(known))}"
    )
  parts = [
    {name: overrides[name] for name in names if name in overrides}
    for names in fields.values()
  ]
  defaults = entry.defaults.get(dataset, {})
  parsed = parse_options(data, parts[0])
  if getattr(parsed, "setting", None) == "long":
    defaults = {"pixel_stride": _LONG_PIXEL_STRIDE}
  return parsed, parse_options(entry.options, defaults | parts[1])


@dataclasses.dataclass(frozen=True)
class Request:
  """What to evaluate.

  Attributes:
    task: "mv_recon", "monodepth", "video_depth", "relpose" or "synthetic".
    dataset: its name; see `benchmarks.DATASETS`.
    output: folder for predictions and reports.
    data: folder of the dataset; None for synthetic ones.
    checkpoint: what to predict with; None: score the predictions in `output`.
    ema: take the checkpoint's moving average.
    options: protocol options by name; text or values. All have the published
      value by default.
    stream: options of `Stream`: precision, fusion, fusion_divisor, rotary,
      capacity, max_capacity; those that are not there are as published.
    batch_size: sequences side by side.
    allow_missing: leave out sequences that are missing or broken, and say so.
    overwrite: replace predictions that were made otherwise.
  """

  task: str
  dataset: str
  output: str
  data: str | None = None
  checkpoint: str | None = None
  ema: bool = False
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  stream: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  batch_size: int = 4
  allow_missing: bool = False
  overwrite: bool = False


def open_evaluation(request: Request) -> tuple[Benchmark, Task]:
  """Opens the dataset and the task of a request.

  Raises:
    InputError: data or options that cannot be used.
  """
  data_options, task_options = _options(
    request.task, request.dataset, request.options
  )
  benchmark = open_benchmark(
    request.task,
    request.dataset,
    request.data,
    options_dict(data_options),
    request.allow_missing,
  )
  return benchmark, _TASKS[request.task].make(task_options)


def prediction_inputs(
  request: Request, benchmark: Benchmark, task: Task
) -> dict[str, Any]:
  """Returns what predictions depend on besides the model."""
  images = options_dict(benchmark.options)
  return {
    "task": request.task,
    "dataset": request.dataset,
    "images": {k: x for k, x in images.items() if k not in _NOT_OF_IMAGES},
    "keep": options_dict(task.keep),
  }


def deviations(
  benchmark: Benchmark, used: Mapping[str, Any], overflow: int
) -> list[str]:
  """Says in what an evaluation is not the published one."""
  setting = {"setting": used["setting"]} if "setting" in used else {}
  published = PUBLISHED_STREAM
  for options in _options(benchmark.task, benchmark.dataset, setting):
    published = published | options_dict(options)
  changed = [
    f"{name}={value}"
    for name, value in used.items()
    if name in published and value != published[name]
  ]
  video = benchmark.task == "video_depth"
  if video and set(used["alignments"]) <= _PUBLISHED_ALIGNMENTS:
    changed = [x for x in changed if not x.startswith("alignments=")]
  sequences = [*benchmark.sequences, *benchmark.left_out]
  frames = sum(map(len, benchmark.sequences))
  for what, found, expected in (
    ("sequences", len(sequences), benchmark.expected_sequences),
    ("frames", frames, benchmark.expected_frames),
  ):
    if expected is not None and found != expected:
      changed.append(f"{what}: {found} of {expected}")
  if overflow:
    changed.append(f"{overflow} pointers merged for lack of room")
  return changed
