"""Grow from a published model: `python benchmarks/published.py --out runs/published --json OUT`.

A small BERT is trained, written as a Hugging Face folder and read again, so that nothing but weights is left of it, as
of a model that somebody has published. Then runs that begin with it (`start:`), each grown by another recipe, are
compared with training from scratch on the same text: the model, text and schedule of suite S. What the small model has
cost is not counted, as nobody who downloads one has paid for it; `--json` has it as `flops_of_the_small_model`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import about, write_json
from growth_ds.config_file import dump_run, read_yaml, shipped
from growth_ds.engine.signals import StopFlag
from growth_ds.launch import train_ranks
from growth_ds.offline import export_checkpoint, find_checkpoint, import_checkpoint
from growth_ds.planning import flops_at
from growth_ds.suite.compare import DONE, Comparison, known_baselines, open_suite, read_rows, run_suite
from growth_ds.suite.tables import print_table

SMALL, RECIPES = "small", ("stack", "interleave", "lemon", "insert-gated")


def suite_of(given: Path, out: Path, layers: int, budget: float) -> Path:
    """OUT/suite.yaml: the given suite's from-scratch run, and methods that begin with OUT/small/checkpoint."""
    tree: dict[str, Any] = read_yaml(given)
    start = str(out / SMALL / "checkpoint")
    tree |= {"name": "grow from a published model", "budget": budget}
    tree["methods"] = {
        recipe: {"summary": f"a trained model of {layers} layers, grown", "start": start, "stages": [_stage(recipe)]}
        for recipe in RECIPES
    }
    path = out / "suite.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree, sort_keys=False), "utf-8")
    return path


def _stage(recipe: str) -> dict[str, Any]:
    ramp = {"ramp": 200} if recipe == "insert-gated" else {}
    return {"share": 1.0, "grow": {"recipe": recipe, **ramp}}


def publish(comparison: Comparison, layers: int) -> tuple[int, float]:
    """Train the small model as long as from-scratch, and take its weights through a folder of Hugging Face's.

    Returns the exit code of the training and the useful FLOPs. What is done is left as it is.
    """
    home = comparison.out / SMALL
    scratch = comparison.entries[0].seeded(comparison.seeds[0], comparison.store)
    stage = scratch.stages[0]
    model = stage.model.model_copy(update={"layers": layers, "stored_layers": layers})
    run = scratch.model_copy(update={"name": SMALL, "stages": (stage.model_copy(update={"model": model}),)})
    home.mkdir(parents=True, exist_ok=True)
    (home / "run.yaml").write_text(dump_run(run), "utf-8")
    with StopFlag() as stop:
        code = train_ranks(home / "run.yaml", home / "run", 1, "auto", [], stop)
    if code == DONE and not (home / "checkpoint").is_dir():
        export_checkpoint(find_checkpoint(home / "run"), home / "huggingface", force=True)
        import_checkpoint(home / "huggingface", home / "checkpoint", force=True)
    return code, float(flops_at(run, run.total_steps))


def main() -> int:
    """Returns the exit code of the runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", type=Path, default=shipped("suite/s.yaml"))
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=2, help="of the small model")
    parser.add_argument("--budget", type=float, default=0.6, help="FLOPs of what begins with it, of from-scratch's")
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    path = suite_of(args.suite, args.out, args.layers, args.budget)
    code, flops = publish(open_suite(args.suite, args.out, 1, None, print), args.layers)
    if code != DONE:
        return code
    comparison = open_suite(path, args.out, args.seeds, None, print)
    code = run_suite(comparison, 1, print)
    if code in (DONE, 1):
        rows, nats = read_rows(comparison), known_baselines(comparison)
        own = {"flops_of_the_small_model": flops, "layers_of_the_small_model": args.layers, "baselines": nats}
        write_json(args.json, {**about(), **own, "records": rows})
        print_table(rows, nats)
    return code


if __name__ == "__main__":
    sys.exit(main())
