"""How modules declare parameters."""

from __future__ import annotations

import flax.linen as nn
import jax
from flax.errors import ScopeParamShapeError


def parameter(
  module: nn.Module, name: str, shape: tuple[int, ...]
) -> jax.Array:
  """Returns a module's parameter, zeros where it has none yet.

  How training starts them is a table of its own, in `point3r_jax.params`.

  `nn.Module.param` would do, but traces the initialiser whenever a parameter is
  read, to compare shapes: a sixth of what tracing the model takes.

  Args:
    module: that has the parameter.
    name: unique within the module.
    shape: of it.

  Raises:
    ScopeParamShapeError: if the module was given one of another shape.
  """
  if not module.has_variable("params", name):
    return module.param(name, nn.initializers.zeros, shape)
  value = module.get_variable("params", name)
  if value.shape != shape:
    path = "/".join(module.path)
    raise ScopeParamShapeError(name, path, value.shape, shape)
  return value
