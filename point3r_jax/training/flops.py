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
import numpy as np
from jax.interpreters import partial_eval


def _dot(equation) -> int:
  """Two operations for each product: contracted sizes times the output's."""
  (contract, _), _ = equation.params["dimension_numbers"]
  shape = equation.invars[0].aval.shape
  depth = math.prod(shape[i] for i in contract)
  return 2 * depth * math.prod(equation.outvars[0].aval.shape)


def _convolution(equation) -> int:
  """Two operations for each product that has no padding or dilation in it.

  So the gradients of a convolution count as much as the convolution itself.
  """
  params = equation.params
  numbers = params["dimension_numbers"]
  inputs, kernel = (x.aval.shape for x in equation.invars)
  output = equation.outvars[0].aval.shape
  batch, features, *_ = numbers.out_spec
  total = 2 * output[batch] * output[features] * kernel[numbers.rhs_spec[1]]
  for i, (low, _) in enumerate(params["padding"]):
    stride, dilation, kernel_dilation = (
      params[name][i]
      for name in ("window_strides", "lhs_dilation", "rhs_dilation")
    )
    size = inputs[numbers.lhs_spec[2 + i]]
    starts = stride * np.arange(output[numbers.out_spec[2 + i]]) - low
    taps = kernel_dilation * np.arange(kernel[numbers.rhs_spec[2 + i]])
    read, hole = np.divmod(starts[:, None] + taps, dilation)
    total *= int(np.sum((hole == 0) & (read >= 0) & (read < size)))
  return total


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
      if name == "scan":
        inner *= equation.params["length"]
      elif name == "shard_map":  # What each device of the mesh does.
        inner *= equation.params["mesh"].size
      total += inner
  return total


def count_flops(function: Callable[..., Any], *arguments: Any) -> int:
  """Returns the operations of matrix products and convolutions in a function.

  Only those that its result needs.

  Trace it with attention "xla": kernels hide what they do.

  Args:
    function: to trace.
    *arguments: arrays or shapes.
  """
  jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
  jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return _count(jaxpr)
