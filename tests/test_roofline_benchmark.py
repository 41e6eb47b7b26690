"""What the roofline counts of a program for GPUs."""

import pytest

from benchmarks.roofline import format_kernels, kernels

# A loop of three rounds around a product that reads a slice of stacked weights,
# and a sum whose result is written into a slice; then a convolution, with what
# its derivatives are.
PROGRAM = """HloModule jit_step

%sliced (p: bf16[3,64,16], i: s32[], x: bf16[8,64]) -> (bf16[8,16], s8[999]) {
  %p = bf16[3,64,16]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = bf16[8,64]{1,0} parameter(2)
  %s = bf16[1,64,16]{2,1,0} dynamic-slice(%p, %i, %z, %z), metadata={}
  %w = bf16[64,16]{1,0} bitcast(%s)
  ROOT %c = (bf16[8,16]{1,0}, s8[999]{0}) custom-call(%x, %w), \
custom_call_target="__cublas$lt$matmul", \
metadata={op_name="step/image_block/dot"}, \
backend_config={"lhs_contracting_dimensions":["1"]}
}

%written (a: f32[3,8], y: bf16[8,16], i: s32[]) -> f32[3,8] {
  %a = f32[3,8]{1,0} parameter(0)
  %y = bf16[8,16]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %r = f32[8]{0} reduce(%y, %z), to_apply=%add
  %b = f32[1,8]{1,0} bitcast(%r)
  ROOT %u = f32[3,8]{1,0} dynamic-update-slice(%a, %b, %i, %z)
}

%body (t: (s32[], f32[3,8])) -> (s32[], f32[3,8]) {
  %t = (s32[], f32[3,8]) parameter(0)
  %f = (bf16[8,16]{1,0}, s8[999]{0}) fusion(%p, %i, %x), kind=kCustom, \
calls=%sliced
  %g = f32[3,8]{1,0} fusion(%a, %y, %i), kind=kInput, calls=%written
  ROOT %o = (s32[], f32[3,8]) tuple(%i, %g)
}

ENTRY %main (x: bf16[1,4,4,8]) -> f32[] {
  %x = bf16[1,4,4,8]{3,2,1,0} parameter(0)
  %k = bf16[2,3,3,8]{3,2,1,0} parameter(1)
  %d = bf16[1,4,4,2]{3,2,1,0} parameter(2)
  %w = (s32[], f32[3,8]) while(%t), condition=%c, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %y = (bf16[1,4,4,2]{3,2,1,0}, u8[77]{0}) custom-call(%x, %k), \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
  %dx = (bf16[1,4,4,8]{3,2,1,0}, u8[77]{0}) custom-call(%d, %k), \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardInput"
  %dk = (bf16[2,3,3,8]{3,2,1,0}, u8[77]{0}) custom-call(%x, %d), \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"
  %q = bf16[1,6,2,16]{3,2,1,0} parameter(3)
  %m = bf16[1,9,2,16]{3,2,1,0} parameter(4)
  %l = (bf16[1,6,2,16]{3,2,1,0}, u8[77]{0}) custom-call(%q, %m, %m), \
custom_call_target="__cudnn$fmhaSoftmax"
  %n = s32[1]{0} parameter(5)
  %v = f32[1,2,64]{2,1,0} parameter(6)
  %b = (bf16[1,1,6,2,16]{4,3,2,1,0}, bf16[1,9,2,16]{3,2,1,0}, \
bf16[1,9,2,16]{3,2,1,0}) custom-call(%n, %q, %m, %m, %v, %v, %q), \
custom_call_target="mosaic_gpu_v2"
  %rows = bf16[8,64]{1,0} parameter(7)
  %matrix = bf16[128,64]{1,0} parameter(8)
  %of = bf16[8,128]{1,0} parameter(9)
  %product = (bf16[8,128]{1,0}, f32[2,128]{1,0}) custom-call(%rows, %matrix, \
%of), custom_call_target="mosaic_gpu_v2"
  ROOT %e = f32[] constant(0)
}
"""


def test_kernels_count_slices_and_rounds():
  product, total, *convolutions, attention, gradient, fused = kernels(PROGRAM)
  assert (product.kind, product.runs) == ("cublas$lt$matmul", 3)
  assert product.scope == "step/image_block/dot"
  assert product.operations == 2 * 8 * 64 * 16
  # A slice of the weights, an index, the other operand and the result.
  assert product.bytes == 2 * 64 * 16 + 4 + 2 * 8 * 64 + 2 * 8 * 16
  assert (total.kind, total.runs) == ("fusion, with sums", 3)
  assert total.bytes == 2 * 8 * 16 + 4 + 4 * 8
  assert [x.operations for x in convolutions] == 3 * [2 * 4 * 4 * 2 * 9 * 8]
  assert attention.operations == 4 * 6 * 9 * 2 * 16
  assert (gradient.kind, gradient.operations) == (
    "mosaic_gpu_v2",
    2.5 * attention.operations,
  )
  assert fused.operations == 2 * 8 * 64 * 128
  least = sum(x.seconds for x in kernels(PROGRAM))
  assert least == pytest.approx(12 * 2e-6, rel=0.01)


def test_the_table_names_parts_and_kinds():
  table = format_kernels(list(kernels(PROGRAM)))
  assert "12 kernels  all" in table.splitlines()[0]
  assert "3 kernels  image blocks, forward" in table
  assert "cudnn$convBackwardFilter" in table
