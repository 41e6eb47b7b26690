"""How arrays lie in memory, where the compiler would choose worse."""

from __future__ import annotations

import jax
from jax.experimental.layout import Layout, with_layout_constraint


def row_major(x: jax.Array) -> jax.Array:
  """Has the compiler lay an array out with its last axis innermost."""
  return with_layout_constraint(x, Layout(tuple(range(x.ndim))))
