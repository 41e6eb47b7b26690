"""How two JSON-like values differ, in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def differences(there: Any, here: Any, name: str = "") -> Iterator[str]:
  """Yields how JSON values differ, as deep down as can be said.

  Args:
    there: what was saved.
    here: what is now.
    name: what to call the whole.
  """
  if isinstance(there, dict) and isinstance(here, dict):
    for key in sorted(there.keys() | here.keys()):
      path = f"{name}.{key}" if name else key
      yield from differences(there.get(key), here.get(key), path)
  elif _is_list(there) and _is_list(here) and len(there) == len(here):
    for i, pair in enumerate(zip(there, here, strict=True)):
      yield from differences(*pair, f"{name}[{i}]")
  elif there != here:
    yield f"{name} was {there} and is {here}"


def _is_list(value: Any) -> bool:
  return isinstance(value, list | tuple)
