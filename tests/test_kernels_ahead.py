"""Tests of point3r_jax.kernels_ahead; test_gpu.py compiles what it finds."""

import jax
import jax.numpy as jnp
import pytest

from point3r_jax import kernels_ahead
from point3r_jax.kernels_ahead import compile_kernels, find_kernels, has_kernels
from point3r_jax.models.hopper_attention import hopper_attention


def half(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def lower(program, *operands):
  traced = jax.jit(program).trace(*operands)
  return traced.lower(lowering_platforms=("cuda",))


@pytest.fixture(scope="module")
def lowered():
  """Attention to two sets of keys, to one of them twice, within a branch."""

  def program(query, some, more, length):
    def attend(query, keys):
      return hopper_attention(query, keys, keys, length, length)

    def branch(query):
      return attend(attend(query, some), some) + attend(query, more)

    return jax.lax.cond(length[0] > 1, branch, lambda query: query, query)

  query, some, more = (half(1, tokens, 2, 16) for tokens in (64, 128, 256))
  return lower(
    program, query, some, more, jax.ShapeDtypeStruct((1,), jnp.int32)
  )


def test_each_kernel_is_found_once(lowered):
  assert has_kernels(lowered)
  kernels = find_kernels(lowered)
  lengths = 2 * [jax.ShapeDtypeStruct((1,), jnp.int32)]
  assert sorted(kernel.operands[3].shape[1] for kernel in kernels) == [128, 256]
  for kernel in kernels:
    keys = kernel.operands[3]
    assert kernel.operands == (*lengths, half(1, 64, 2, 16), keys, keys)


def test_kernel_is_alone_what_it_is_in_the_program(lowered):
  def calls(lowered):
    return [
      kernels_ahead._value(setting.attr)
      for operation in kernels_ahead._operations(
        lowered.compiler_ir("stablehlo").operation
      )
      if operation.name == "stablehlo.custom_call"
      for setting in operation.attributes["mhlo.backend_config"]
    ]

  alone = [
    calls(lower(kernel.run, *kernel.operands))
    for kernel in find_kernels(lowered)
  ]
  assert len(alone) == 2
  in_program = calls(lowered)
  for settings in alone:
    # The kernel's code and its digest, by which XLA knows it.
    assert any(isinstance(x, bytes) and len(x) > 1000 for x in settings)
    assert all(x in in_program for x in settings)


def test_all_of_them_are_compiled(lowered, monkeypatch):
  compiled = []

  class Jitted:
    def __init__(self, run):
      self.run = run

    def lower(self, *operands):
      self.operands = operands
      return self

    def compile(self):
      compiled.append(self.operands)
      raise RuntimeError("left for the program itself to say")

  kernels = find_kernels(lowered)
  monkeypatch.setattr(kernels_ahead, "find_kernels", lambda _: kernels)
  monkeypatch.setattr(jax, "jit", Jitted)
  futures = compile_kernels(lowered)
  assert all(isinstance(x.exception(), RuntimeError) for x in futures)
  assert sorted(compiled, key=str) == sorted(
    (kernel.operands for kernel in kernels), key=str
  )


def test_programs_without_any():
  lowered = jax.jit(jnp.sin).lower(1.0)
  assert find_kernels(lowered) == compile_kernels(lowered) == []
  assert not has_kernels(lowered)
