"""The checkpoint `tiny` of the package: small, whole, and alive."""

import csv
import json

import jax
import numpy as np

import point3r_jax as p3r
from point3r_jax import pretrained
from point3r_jax.checkpoints import load_metadata
from point3r_jax.data.synthetic.source import SyntheticSource
from point3r_jax.evaluation import depth
from point3r_jax.evaluation.runner import params_digest


def test_tiny():
  folder = pretrained.find("tiny")
  assert (folder / "params.safetensors").stat().st_size <= 16_000_000
  config, params = p3r.load_checkpoint("tiny")
  assert config == p3r.preset("tiny") and config.image_size == 128
  assert sum(x.size for x in jax.tree.leaves(params)) <= 8_100_000
  assert "synthetic" in load_metadata("tiny")["notice"]

  stages = json.loads((folder / "training.json").read_text())
  rows = list(csv.DictReader((folder / "curve.csv").read_text().splitlines()))
  assert {row["stage"] for row in rows} == {
    str(stage) for stage in range(1, len(stages) + 1)
  }
  metrics = json.loads((folder / "metrics.json").read_text())
  assert metrics["run"]["checkpoint_sha256"] == params_digest(params)
  assert np.isfinite(metrics["abs_rel"])


def depth_error(predicted, truth):
  fit = depth.align_depth(predicted, truth, "scale")
  return depth.depth_metrics(predicted, truth, fit)["abs_rel"]


def test_tiny_predicts():
  config, params = p3r.load_checkpoint("tiny")
  scene = SyntheticSource(split="test").sequence(
    0, 3, (96, 128), np.random.default_rng(0)
  )
  memory = p3r.init_memory(config, 1, (96, 128), 192)
  _, prediction = p3r.scan(config, params, memory, scene["image"][:, None])
  leaves = jax.tree.leaves(prediction)
  assert all(np.isfinite(np.asarray(x)).all() for x in leaves)
  predicted = np.asarray(prediction.points_camera)[:, 0, ..., 2]
  flat = np.ones_like(predicted)
  errors = [depth_error(guess, scene["depth"]) for guess in (predicted, flat)]
  assert errors[0] < 0.8 * errors[1]
