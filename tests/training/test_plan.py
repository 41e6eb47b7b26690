"""What a step would cost: exact where it can be, by the program where not."""

import re

import jax
import pytest

from point3r_jax.config import PRESETS
from point3r_jax.params import param_shapes
from point3r_jax.training import plan as plan_module
from point3r_jax.training import sharding, step
from point3r_jax.training.collectives import Traffic, count_collectives
from point3r_jax.training.experiment import open_experiment
from point3r_jax.training.plan import format_plan, plan
from point3r_jax.training.step import empty_metrics
from tests import micro
from tests.training import batches, micro_run

TOTAL = sum(x.size for x in jax.tree.leaves(param_shapes(micro.CONFIG)))
HEAD = sum(
  x.size for x in jax.tree.leaves(param_shapes(micro.CONFIG)["pose_head"])
)


@pytest.fixture(autouse=True)
def micro_preset(monkeypatch):
  monkeypatch.setitem(PRESETS, "micro", micro.CONFIG)
  monkeypatch.setattr(sharding, "_MIN_SIZE", 256)


def micro_plan(data, fsdp):
  config = micro_run.get_config()
  config.views = 1
  config.batch_size = data * fsdp
  config.mesh.data, config.mesh.fsdp = data, fsdp
  # A short backward pass, for it takes most of the time to compile.
  config.optimizer.name = "adamw"
  config.optimizer.freeze = ("(?!pose_head)",)
  devices = jax.devices()[: data * fsdp]
  return plan(open_experiment(config, devices), micro.IMAGE_SIZE)


@pytest.mark.slow
def test_one_device(caplog):
  caplog.set_level("INFO")
  cost = micro_plan(1, 1)
  assert "compiling the step for 1 views" in caplog.text
  assert (cost.parameters, cost.trained) == (TOTAL, HEAD)
  assert cost.param_bytes == 4 * TOTAL
  # Two moments, the moving average, and two counts of updates.
  assert cost.optimizer_bytes == 4 * 3 * HEAD + 2 * 4
  pixels = micro.IMAGE_SIZE[0] * micro.IMAGE_SIZE[1]
  assert cost.batch_bytes == pixels * (3 + 4) + 4 * (9 + 16) + 4
  counts = 3 * 4  # Steps, skipped steps, the present streak of them.
  counts += 4 * len(empty_metrics())  # The last step's.
  assert cost.total_bytes - cost.temp_bytes == (
    cost.param_bytes + cost.optimizer_bytes + cost.batch_bytes + counts
  )
  assert cost.temp_bytes > 0
  assert cost.collectives.traffic == {}


def test_data_parallel_reduces_and_fully_sharded_gathers(monkeypatch):
  monkeypatch.setattr(step, "sequence_loss", batches.short_loss)
  monkeypatch.setattr(plan_module, "sequence_loss", batches.short_loss)
  whole, split = micro_plan(8, 1), micro_plan(1, 8)
  assert whole.param_bytes == 4 * TOTAL
  assert set(whole.collectives.traffic) == {"all-reduce"}
  assert TOTAL / 8 < split.param_bytes / 4 < TOTAL / 6
  gathered = split.collectives.traffic["all-gather"].bytes
  assert 0.9 * 4 * TOTAL < gathered <= 4 * TOTAL
  table = format_plan(split)
  assert "8 x cpu" in table
  assert re.search(r"activations .*iB, with gradients and copies", table)


PROGRAM = """HloModule jit_step, entry_computation_layout={()->f32[]}

%body (x: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %x = (s32[], f32[4,8]{1,0:T(8,128)}) parameter(0)
  %r = (f32[4,8]{1,0}, /*index=1*/pred[3]) all-reduce(%y, %z), to_apply=%add
  ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%i, %r)
}

%bounded (x: (s32[], f32[4,8])) -> pred[] {
  %n = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%unbounded (x: (s32[], f32[4,8])) -> pred[] {
  ROOT %p = pred[] get-tuple-element(%x), index=2
}

%all-reduce-scatter.1 (x: bf16[16]) -> bf16[4] {
  %s = bf16[16]{0} all-reduce(%x), to_apply=%add
  ROOT %d = bf16[4]{0} dynamic-slice(%s, %i), dynamic_slice_sizes={4}
}

ENTRY %main (a: f32[4,8]) -> f32[] {
  %g = (f32[4], f32[16]{0}) all-gather-start(%a), replica_groups={{0,1,2,3}}
  %h = f32[16]{0} all-gather-done(%g)
  %w = (s32[], f32[4,8]{1,0}) while(%t), condition=%c, body=%body, \
backend_config={"known_trip_count":{"n":"3"},"x":{"n":"7"}}
  %v = (s32[], f32[4,8]{1,0}) while(%w), condition=%bounded, body=%body
  %u = (s32[], f32[4,8]{1,0}) while(%v), condition=%unbounded, body=%body
  %l = f32[9]{0} all-reduce(%q), replica_groups={{0},{1}}, to_apply=%add
  %f = bf16[4]{0} fusion(%u), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %o = f32[] constant(0)
}
"""


def test_collectives_count_as_often_as_they_run():
  result = count_collectives(PROGRAM)
  assert result.traffic == {
    "all-gather": Traffic(1, 16 * 4),
    "all-reduce": Traffic(3 + 5 + 1, 9 * (4 * 8 * 4 + 3)),
    "reduce-scatter": Traffic(1, 4 * 2),
  }
  assert result.unbounded == 1
