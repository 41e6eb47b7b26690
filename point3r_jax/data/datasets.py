"""Datasets by name.

parts = open_sources([("synthetic", 1000, {"scenes": 100})])
mixture = Mixture(parts, ...)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from point3r_jax.data.record import SequenceSource
from point3r_jax.errors import InputError, one_line


def _open_synthetic(**options) -> SequenceSource:
  # A reader is imported when it is asked for: each may need its own libraries.
  from point3r_jax.data.synthetic.source import SyntheticSource

  return SyntheticSource(**options)


# Those without a factory trained the published model; their readers are yet to
# come.
_FACTORIES: dict[str, Callable[..., SequenceSource] | None] = {
  "synthetic": _open_synthetic,
  "arkitscenes": None,
  "arkitscenes_highres": None,
  "blendedmvs": None,
  "co3d": None,
  "hypersim": None,
  "megadepth": None,
  "mvs_synth": None,
  "omniobject3d": None,
  "point_odyssey": None,
  "scannet": None,
  "scannetpp": None,
  "spring": None,
  "vkitti2": None,
  "waymo": None,
  "wildrgbd": None,
}


def register_dataset(name: str, factory: Callable[..., SequenceSource]) -> None:
  """Lets configs ask for a dataset by name.

  Args:
    name: to use in configs.
    factory: takes the config's fields as arguments and opens the dataset.
      Registered again, the later one counts.
  """
  _FACTORIES[name] = factory


def _open_source(name: str, options: Mapping[str, Any]) -> SequenceSource:
  """Opens one dataset; raises an `InputError` or what its reader raises."""
  if name not in _FACTORIES:
    raise InputError(f"unknown name; known are {', '.join(_FACTORIES)}")
  factory = _FACTORIES[name]
  if factory is None:
    raise InputError("no reader in this version")
  root = options.get("root")
  if root is not None and not os.path.isdir(root):
    raise InputError(f"there is no folder {root}")
  return factory(**options)


def open_sources(
  specs: Sequence[tuple[str, int, Mapping[str, Any]]],
) -> list[tuple[SequenceSource, int]]:
  """Opens datasets for a `Mixture`.

  Args:
    specs: (name, samples in an epoch, options of the reader); the option `root`
      is a folder.

  Returns:
    The mixture's parts: (dataset, samples in an epoch).

  Raises:
    InputError: names every dataset that cannot be opened, by the reason.
  """
  parts, problems, first = [], {}, None
  for name, samples, options in specs:
    try:
      parts.append((_open_source(name, options), samples))
    except (InputError, OSError, TypeError) as error:
      problems.setdefault(one_line(error), []).append(name)
      first = first or error
  if problems:
    listed = "; ".join(
      f"{', '.join(names)}: {reason}" for reason, names in problems.items()
    )
    raise InputError(
      f"{len(specs) - len(parts)} of {len(specs)} datasets cannot be opened: "
      f"{listed}"
    ) from first
  return parts
