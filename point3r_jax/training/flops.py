"""Arithmetic of a function, counted in its trace.

XLA's own count takes a scan's body once and cannot see into kernels. Here
matrix products and convolutions are counted, scans as often as they run; the
rest is little beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax


def _dot(equation) -> int:
  """Two operations for each product: contracted sizes times the output's."""
  (contract, _), _ = equation.params["dimension_numbers"]
  shape = equation.invars[0].aval.shape
  depth = math.prod(shape[i] for i in contract)
  return 2 * depth * math.prod(equation.outvars[0].aval.shape)


def _convolution(equation) -> int:
  """Products of each output with a kernel, less those with padding zeros."""
  numbers = equation.params["dimension_numbers"]
  kernel = equation.invars[1].aval.shape
  inputs = equation.invars[0].aval.shape
  output = equation.outvars[0].aval.shape
  channels = kernel[numbers.rhs_spec[1]]
  taps = math.prod(kernel[i] for i in numbers.rhs_spec[2:])
  if any(d > 1 for d in equation.params["lhs_dilation"]):
    # Zeros between the inputs (the gradient of a strided convolution) are free.
    spatial = math.prod(inputs[i] for i in numbers.lhs_spec[2:])
    spatial *= inputs[numbers.lhs_spec[0]] * kernel[numbers.rhs_spec[0]]
    return 2 * channels * taps * spatial
  return 2 * channels * taps * math.prod(output)


def _jaxprs(value: Any):
  """Yields the jaxprs among an equation's parameters."""
  for leaf in jax.tree.leaves(
    value, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
  ):
    if hasattr(leaf, "jaxpr"):
      yield leaf.jaxpr
    elif hasattr(leaf, "eqns"):
      yield leaf


def _count(jaxpr) -> int:
  total = 0
  for equation in jaxpr.eqns:
    name = equation.primitive.name
    if name == "dot_general":
      total += _dot(equation)
    elif name == "conv_general_dilated":
      total += _convolution(equation)
    else:
      inner = sum(_count(j) for j in _jaxprs(list(equation.params.values())))
      total += inner * equation.params.get("length", 1) if inner else 0
  return total


def count_flops(function: Callable[..., Any], *arguments: Any) -> int:
  """Returns the operations of matrix products and convolutions in a function.

  Trace it with attention "xla": kernels hide what they do.

  Args:
    function: to trace.
    *arguments: arrays or shapes.
  """
  return _count(jax.make_jaxpr(function)(*arguments).jaxpr)
