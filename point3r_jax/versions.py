"""Which versions of which packages a result was made with."""

from __future__ import annotations

import importlib.metadata
import platform


def installed_versions(*packages: str) -> dict[str, str]:
  """Returns the versions of Python and of packages, by name."""
  versions = {"python": platform.python_version()}
  for name in packages:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = "not installed"  # Such as this one, run from a clone.
  return versions
