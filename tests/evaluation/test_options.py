"""Tests of point3r_jax.evaluation.options."""

from __future__ import annotations

import dataclasses
import json
from typing import Literal

import pytest

from point3r_jax.errors import InputError
from point3r_jax.evaluation.options import options_dict, parse_options


@dataclasses.dataclass(frozen=True)
class Options:
  count: int = 3
  limit: float = 2.5
  strict: bool = False
  title: str = "a"
  kind: Literal["sparse", "long"] = "sparse"
  names: tuple[str, ...] = ("x", "y")
  centre: tuple[float, float] = (1.0, 2.0)
  stride: int | None = None
  subset: tuple[str, ...] | None = None


class TestParseOptions:
  def test_defaults(self):
    assert parse_options(Options) == Options()
    assert parse_options(Options, {}) == Options()

  @pytest.mark.parametrize(
    "name, text, value",
    [
      ("count", "7", 7),
      ("count", " -1 ", -1),
      ("limit", "1e-3", 1e-3),
      ("limit", "inf", float("inf")),
      ("strict", "true", True),
      ("strict", "No", False),
      ("title", "7", "7"),
      ("kind", "long", "long"),
      ("names", "a, b,", ("a", "b")),
      ("names", "", ()),
      ("centre", "3,4.5", (3.0, 4.5)),
      ("stride", "5", 5),
      ("stride", "None", None),
      ("subset", "none", None),
      ("subset", "a", ("a",)),
    ],
  )
  def test_text(self, name, text, value):
    assert parse_options(Options, {name: text}) == Options(**{name: value})

  @pytest.mark.parametrize(
    "name, value, expected",
    [
      ("count", 7, 7),
      ("limit", 7, 7.0),
      ("strict", True, True),
      ("names", ["a", "b"], ("a", "b")),
      ("centre", (1, 2), (1.0, 2.0)),
      ("stride", None, None),
      ("subset", ["a"], ("a",)),
    ],
  )
  def test_values(self, name, value, expected):
    got = getattr(parse_options(Options, {name: value}), name)
    assert got == expected and type(got) is type(expected)

  @pytest.mark.parametrize(
    "name, value, message",
    [
      ("count", "2.5", "option count: '2.5' is not of type int"),
      ("count", True, "option count: True is not of type int"),
      ("count", "none", "not of type int"),
      ("count", None, "None is not of type int"),
      ("limit", "nan", "option limit: NaN"),
      ("strict", "maybe", "option strict: 'maybe' is not of type bool"),
      ("strict", 1, "1 is not of type bool"),
      ("title", 1, "1 is not of type str"),
      ("kind", "dense", "option kind: 'dense' is none of: sparse, long"),
      ("names", 3, "3 is not a list"),
      ("names", [1], "1 is not of type str"),
      ("centre", "1", "option centre: 2 values are needed, not 1"),
      ("stride", "x", "option stride: 'x' is not of type int"),
    ],
  )
  def test_bad_values(self, name, value, message):
    with pytest.raises(InputError, match=message):
      parse_options(Options, {name: value})

  def test_unknown_names(self):
    with pytest.raises(InputError, match=r"no option 'cuont'.* count, limit,"):
      parse_options(Options, {"cuont": "1", "limit": "2"})


def test_options_dict_is_json():
  options = parse_options(Options, {"stride": 4})
  as_dict = options_dict(options)
  assert as_dict["names"] == ["x", "y"] and as_dict["subset"] is None
  again = parse_options(Options, json.loads(json.dumps(as_dict)))
  assert again == options
