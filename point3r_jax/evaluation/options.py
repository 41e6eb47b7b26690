"""Options of benchmarks and metrics: frozen dataclasses, set by name.

A field may be a bool, int, float or str, a `Literal` of strings, a tuple of
these, or any of them or None. On the command line a tuple is written with
commas (`alley_1,alley_2`) and None as `none`.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from point3r_jax.errors import InputError

T = TypeVar("T")

_BOOLS = {
  **dict.fromkeys(("true", "yes", "on", "1"), True),
  **dict.fromkeys(("false", "no", "off", "0"), False),
}


def parse_options(
  cls: type[T], overrides: Mapping[str, Any] | None = None
) -> T:
  """Makes options, all at their defaults but for the overrides.

  Args:
    cls: a dataclass with a default for every field.
    overrides: by field name; text, as from a command line, or values of the
      field's own type. Lists do for tuples.

  Returns:
    An instance of `cls`.

  Raises:
    InputError: there is no such field, or its value cannot be that.
  """
  overrides = dict(overrides or {})
  fields = [field.name for field in dataclasses.fields(cls) if field.init]
  unknown = sorted(map(str, overrides.keys() - set(fields)))
  if unknown:
    known = ", ".join(fields) or "none"
    raise InputError(
      f"no option {', '.join(map(repr, unknown))}; the options are: {known}"
    )
  hints = typing.get_type_hints(cls)
  values = {}
  for name, value in overrides.items():
    try:
      values[name] = _parse(hints[name], value)
    except ValueError as error:
      raise InputError(f"option {name}: {error}") from None
  return cls(**values)


def options_dict(options: Any) -> dict[str, Any]:
  """The options as JSON has them: tuples are lists."""
  return {
    key: list(value) if isinstance(value, tuple) else value
    for key, value in dataclasses.asdict(options).items()
  }


def _parse(hint: Any, value: Any) -> Any:
  """Turns a value into what the type hint says, or raises ValueError."""
  origin, arguments = typing.get_origin(hint), typing.get_args(hint)
  if origin in (typing.Union, types.UnionType):
    if value is None or (isinstance(value, str) and value.lower() == "none"):
      return None
    (hint,) = (kind for kind in arguments if kind is not types.NoneType)
    return _parse(hint, value)
  if origin is tuple:
    return _parse_tuple(arguments, value)
  if origin is typing.Literal:
    if value not in arguments:
      choices = ", ".join(map(str, arguments))
      raise ValueError(f"{value!r} is none of: {choices}")
    return value
  return _parse_scalar(hint, value)


def _parse_tuple(arguments: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
  """Parses `a,b,c` or a list, of any length or of the hint's."""
  if isinstance(value, str):
    value = [part.strip() for part in value.split(",") if part.strip()]
  if not isinstance(value, (list, tuple)):
    raise ValueError(f"{value!r} is not a list")
  if arguments[-1] is Ellipsis:
    arguments = (arguments[0],) * len(value)
  if len(arguments) != len(value):
    raise ValueError(f"{len(arguments)} values are needed, not {len(value)}")
  return tuple(map(_parse, arguments, value))


def _parse_scalar(kind: type, value: Any) -> Any:
  """Parses one bool, int, float or str."""
  if isinstance(value, str) and kind is not str:
    return _parse_text(kind, value.strip())
  if kind is float and type(value) is int:
    return float(value)
  if type(value) is not kind:  # To Python, True is an integer as well.
    raise ValueError(f"{value!r} is not of type {kind.__name__}")
  return value


def _parse_text(kind: type, text: str) -> bool | int | float:
  try:
    value = _BOOLS[text.lower()] if kind is bool else kind(text)
  except (KeyError, ValueError):
    raise ValueError(f"{text!r} is not of type {kind.__name__}") from None
  if isinstance(value, float) and math.isnan(value):
    raise ValueError("NaN is no value")
  return value
