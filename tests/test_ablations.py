"""The ablations' arguments and table; nothing is trained."""

import json

import pytest

from benchmarks import ablations


def parse(tmp_path, *words):
  return ablations.parse(["--output", str(tmp_path), *words])


@pytest.mark.parametrize(
  ("variant", "rotary", "fusion", "bases"),
  [
    ("full", True, True, 4),
    ("no_rotary", False, True, 4),
    ("no_fusion", True, False, 4),
    ("single_base", True, True, 1),
  ],
)
def test_a_variant_changes_its_part_alone(
  tmp_path, variant, rotary, fusion, bases
):
  args = parse(tmp_path, "--steps", "20", "--", "--config.batch_size=4")
  words, _ = ablations.train_words(variant, 5, args)
  config = ablations.read_config("long", words[2:])
  assert config.rollout.rotary == rotary
  assert config.rollout.fusion == fusion
  assert len(config.model.rotary_bases) == bases
  assert (config.seed, config.init_from) == (5, "tiny")
  samples = config.datasets.synthetic.samples
  assert samples // config.batch_size * config.epochs == 20
  full, _ = ablations.train_words("full", 5, args)
  changed = set(words) - set(full)
  assert changed == set(ablations.VARIANTS[variant].train)


def test_steps_must_be_whole_epochs(tmp_path):
  args = parse(tmp_path, "--steps", "3")
  with pytest.raises(ValueError, match="no multiple of 10 epochs"):
    ablations.train_words("full", 0, args)


def test_only_what_is_there(tmp_path, capsys):
  args = parse(tmp_path, "--seeds", "1", "2", "--only", "no_fusion:2")
  assert args.only == ["no_fusion:2"]
  with pytest.raises(SystemExit):
    parse(tmp_path, "--only", "no_fusion:7")
  assert "no_fusion:7" in capsys.readouterr().err


def test_other_settings_are_refused(tmp_path):
  folder = ablations.run_folder(tmp_path, "full", 0)
  folder.mkdir()
  (folder / "settings.json").write_text("{}")
  with pytest.raises(SystemExit, match="other settings"):
    ablations.run_variant("full", 0, parse(tmp_path))


def write_evaluation(folder, pointers, **metrics):
  for index, count in enumerate(pointers):
    scene = folder / f"predictions/scene_{index}"
    scene.mkdir(parents=True)
    facts = {"pointers": [1, count]}
    (scene / "prediction.json").write_text(json.dumps(facts))
  values = dict.fromkeys(ablations.COLUMNS, 0.5) | metrics
  (folder / "metrics.json").write_text(json.dumps(values))


def test_table_holds_what_is_complete(tmp_path):
  for seed, depth in ((0, 0.1), (1, 0.2)):
    folder = ablations.run_folder(tmp_path, "full", seed) / "evaluation"
    write_evaluation(folder, [10, 20], abs_rel=depth, rpe_rot_deg=None)
  ablations.write_results(
    parse(tmp_path, "--variants", "full", "no_rotary", "--seeds", "0", "1")
  )
  lines = (tmp_path / "table.md").read_text().splitlines()
  full, other = (line.split(" | ") for line in lines[-2:])
  assert full[:3] == ["| full", "0, 1", "0.1500 ± 0.0500"]
  assert full[5] == "not finite" and full[-1] == "15 ± 0 |"
  assert other[1] == "none yet" and len(full) == len(other)
  content = json.loads((tmp_path / "ablations.json").read_text())
  assert content["results"]["full"]["1"]["abs_rel"] == 0.2
  assert content["settings"]["steps"] == 400
