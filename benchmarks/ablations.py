"""Trains without parts of the model and measures what they are worth.

  python -m benchmarks.ablations --start tiny --steps 400 --seeds 0 1 2 \\
    --output output/ablations
  python -m benchmarks.ablations ... -- --config.batch_size=24

Each variant trains with each seed from the same start for as many steps on
synthetic scenes (`train.py`, configs/synthetic_tiny.py) and is measured on
others (`evaluate.py`), as it was trained. Words after `--` go to every
training. OUTPUT/table.md and ablations.json hold what is there so far.

The same command goes on where it was ended. Several GPUs share the work, each
with its own CUDA_VISIBLE_DEVICES and `--only VARIANT:SEED`; the command without
`--only` then adds what is missing and writes the whole table.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags as absl_flags
from ml_collections import ConfigDict, config_flags

from point3r_jax.files import atomic_file

ROOT = pathlib.Path(__file__).parents[1]


class Variant(NamedTuple):
  """Its name in the table, and what train.py and evaluate.py are told."""

  title: str
  train: tuple[str, ...] = ()
  evaluate: tuple[str, ...] = ()


VARIANTS = {
  "full": Variant("full"),
  "no_rotary": Variant(
    "without 3D rotary embedding",
    ("--config.rollout.rotary=False",),
    ("--no_rotary",),
  ),
  "no_fusion": Variant(
    "without fusion", ("--config.rollout.fusion=False",), ("--no_fusion",)
  ),
  "single_base": Variant(
    "one rotary base, 100", ("--config.model.rotary_bases=(100.0,)",)
  ),
}
POINTERS = "pointers_at_the_end"
# Metric → heading and decimals.
COLUMNS = {
  "abs_rel": ("Abs Rel ↓", 4),
  "delta_1_25": ("δ < 1.25 ↑", 4),
  "ate_over_path": ("ATE / path ↓", 4),
  "rpe_rot_deg": ("RPE rot. (°) ↓", 3),
  "accuracy_over_scene": ("accuracy / scene ↓", 4),
  "completeness_over_scene": ("completeness / scene ↓", 4),
  POINTERS: ("pointers at the end", 0),
}
# Lines of a failed program's output that are shown.
_LAST_LINES = 20


def read_config(stage: str, words: Sequence[str]) -> ConfigDict:
  """Returns a stage's config with overrides, as train.py reads them."""
  values = absl_flags.FlagValues()
  arguments = [f"--config={ROOT}/configs/synthetic_tiny.py:{stage}", *words]
  config_flags.DEFINE_config_file(
    "config", flag_values=values, sys_argv=["", *arguments]
  )
  values(["", *arguments])
  return values.config


def train_words(
  variant: str, seed: int, args: argparse.Namespace
) -> tuple[list[str], ConfigDict]:
  """Returns the arguments of train.py but for its workdir, and its config.

  Raises:
    ValueError: if the epochs do not divide the steps.
  """
  words = [f"--config.init_from={args.start}", f"--config.seed={seed}"]
  words += [*args.extra, *VARIANTS[variant].train]
  config = read_config(args.stage, words)
  if args.steps % config.epochs:
    raise ValueError(
      f"--steps {args.steps} is no multiple of {config.epochs} epochs; change "
      "it, or the epochs: -- --config.epochs=N"
    )
  samples = config.batch_size * args.steps // config.epochs
  words.append(f"--config.datasets.synthetic.samples={samples}")
  source = f"{ROOT}/configs/synthetic_tiny.py:{args.stage}"
  return ["--config", source, *words], config


def _run(program: str, words: Sequence[str], log: pathlib.Path) -> None:
  """Runs a program of this repository; ends this one if that fails."""
  with log.open("a") as file:
    code = subprocess.run(
      [sys.executable, str(ROOT / program), *words],
      stdout=file,
      stderr=subprocess.STDOUT,
      check=False,
    ).returncode
  if code:
    last = log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
    sys.exit("\n".join([*last, f"{program} ended with {code}; see {log}"]))


def run_variant(variant: str, seed: int, args: argparse.Namespace) -> None:
  """Trains and evaluates one variant with one seed, as far as it is not."""
  folder = run_folder(args.output, variant, seed)
  train, config = train_words(variant, seed, args)
  height, width = config.image_sizes[0]
  evaluate = ["--dataset", "synthetic", *VARIANTS[variant].evaluate]
  evaluate += ["--options", f"height={height}", f"width={width}"]
  evaluate += [f"sequences={args.sequences}", f"frames={args.frames}"]
  settings = {"train": train, "evaluate": evaluate}
  noted = folder / "settings.json"
  if noted.exists() and json.loads(noted.read_text()) != settings:
    sys.exit(f"{noted} is of other settings; choose another --output")
  if (folder / "evaluation/metrics.json").exists():
    print(f"{variant}, seed {seed}: is done", flush=True)
    return
  folder.mkdir(parents=True, exist_ok=True)
  noted.write_text(json.dumps(settings, indent=2) + "\n")
  workdir, output = folder / "train", folder / "evaluation"
  for program, words in {
    "train.py": ["--workdir", str(workdir), *train],
    "evaluate.py": [
      *("--checkpoint", str(workdir), "--output", str(output)),
      *evaluate,
    ],
  }.items():
    log = folder / f"{program.removesuffix('.py')}.log"
    print(f"{variant}, seed {seed}: {program}, see {log}", flush=True)
    _run(program, words, log)


def run_folder(output: pathlib.Path, variant: str, seed: int) -> pathlib.Path:
  """Returns where a variant with a seed is trained and evaluated."""
  return output.absolute() / f"{variant}_{seed}"


def read_metrics(evaluation: pathlib.Path) -> dict[str, float | None] | None:
  """Returns the columns of an evaluation; None if it is not complete."""
  path = evaluation / "metrics.json"
  if not path.exists():
    return None
  found = json.loads(path.read_text())
  found[POINTERS] = statistics.mean(
    json.loads(facts.read_text())["pointers"][-1]
    for facts in evaluation.glob("predictions/*/prediction.json")
  )
  return {name: found[name] for name in COLUMNS}


def cell(values: Sequence[float | None], decimals: int) -> str:
  """Returns the mean and half the range, for a table."""
  if not values:
    return ""
  if None in values:
    return "not finite"
  mean = f"{statistics.mean(values):.{decimals}f}"
  if len(values) == 1:
    return mean  # A spread of 0 would say too much.
  return f"{mean} ± {(max(values) - min(values)) / 2:.{decimals}f}"


def format_table(
  results: Mapping[str, Mapping[int, Mapping[str, Any]]],
  args: argparse.Namespace,
) -> str:
  """Returns the Markdown table of variant → seed → metrics."""
  extra = f" `{' '.join(args.extra)}`" if args.extra else ""
  lines = [
    f"{args.steps} steps of stage `{args.stage}`{extra} from "
    f"`{args.start or 'fresh parameters'}`, then {args.sequences} other "
    f"synthetic scenes of {args.frames} frames. Mean over the seeds ± half the "
    "range from the least to the greatest.",
    "",
    f"| | seeds | {' | '.join(title for title, _ in COLUMNS.values())} |",
    f"| --- | --- |{' --- |' * len(COLUMNS)}",
  ]
  for variant, seeds in results.items():
    cells = [VARIANTS[variant].title, ", ".join(map(str, seeds)) or "none yet"]
    cells += [
      cell([metrics[name] for metrics in seeds.values()], decimals)
      for name, (_, decimals) in COLUMNS.items()
    ]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def write_results(args: argparse.Namespace) -> None:
  """Writes the table and the numbers of all that is complete."""
  results = {}
  for variant in args.variants:
    found = {
      seed: read_metrics(run_folder(args.output, variant, seed) / "evaluation")
      for seed in args.seeds
    }
    results[variant] = {s: metrics for s, metrics in found.items() if metrics}
  settings = {
    k: x for k, x in vars(args).items() if k not in ("output", "only")
  }
  content = {"settings": settings, "results": results}
  table = format_table(results, args)
  for name, text in {
    "ablations.json": json.dumps(content, indent=2) + "\n",
    "table.md": table,
  }.items():
    with atomic_file(args.output / name) as file:
      file.write(text.encode())
  print(table)


def parse(words: Sequence[str]) -> argparse.Namespace:
  """Returns the flags; `extra` is what follows `--`."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--start", default="tiny", help="init_from; '' for fresh parameters")
  add(
    "--stage", default="long", help="of the config; only `long` trains fusion"
  )
  add("--steps", type=int, default=400)
  add("--seeds", type=int, nargs="+", default=[0, 1, 2])
  add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
  add("--only", metavar="VARIANT:SEED", nargs="+", help="of these only some")
  add("--sequences", type=int, default=64, help="to evaluate")
  add("--frames", type=int, default=24, help="of each")
  add("--output", type=pathlib.Path, required=True)
  at = words.index("--") if "--" in words else len(words)
  args = parser.parse_args(words[:at])
  args.extra = list(words[at + 1 :])
  known = [f"{v}:{s}" for v in args.variants for s in args.seeds]
  if unknown := set(args.only or ()) - set(known):
    parser.error(f"--only {' '.join(sorted(unknown))}: there are {known}")
  args.only = args.only or known
  return args


def main() -> None:
  """Runs what is missing and writes the table."""
  args = parse(sys.argv[1:])
  for name in args.only:
    variant, seed = name.split(":")
    try:
      run_variant(variant, int(seed), args)
    except ValueError as error:
      sys.exit(f"error: {error}")
  write_results(args)


if __name__ == "__main__":
  main()
