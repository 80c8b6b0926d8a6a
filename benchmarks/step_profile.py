"""Where the time of one training step goes: `python benchmarks/step_profile.py --json RECORD --png PICTURE`.

Parts of the forward (embeddings, attention, feed-forward, norms, head and loss), backward, optimizer, waiting for data
and communication, on one rank, on the GPU where there is one (see `parts`: borders wait there, so the sum is given
beside the step without hooks). `--ops` lists the operators that take most of the time, by torch's profiler.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.common import RESULTS, about, median_and_spread, synchronize, table, write_json  # noqa: E402
from benchmarks.parts import Parts, measured_steps  # noqa: E402
from benchmarks.training import LENGTH, MODELS, ROWS, Training, corpus_files, small_store, the_run, training  # noqa: E402
from growth_ds.engine import distributed  # noqa: E402

ORDER = (
    "data", "embeddings", "attention", "ffn", "norms", "head and loss", "rest of forward", "backward", "optimizer",
    "communication",
)  # fmt: skip
"""Of the bar, in the order of a step."""


def plain_steps(made: Training, steps: int, skipped: int) -> list[float]:
    """Seconds of steps without hooks, the wait for the batch included."""
    seconds, batches = [], made.batches(steps + skipped)
    for _ in range(steps + skipped):
        started = time.perf_counter()
        made.step(next(batches))
        synchronize()
        seconds.append(time.perf_counter() - started)
    batches.close()
    return seconds[skipped:]


def operators(made: Training, count: int) -> list[dict[str, Any]]:
    """The operators with the most time of their own in one step, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    batches = made.batches(2)
    made.step(next(batches))
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        made.step(next(batches))
    batches.close()
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    found = sorted(profiler.key_averages(), key=lambda each: -getattr(each, key))[:count]
    return [
        {"operator": each.key, "calls": each.count, "self_ms": round(getattr(each, key) / 1e3, 3)} for each in found
    ]


def measure(store: Path, model: str, precision: str, steps: int, skipped: int, ops: int) -> dict[str, Any]:
    """One model: seconds without hooks, then by part."""
    run = the_run(store, model, 2 * (steps + skipped), precision=precision)
    parts = Parts()
    parts.communication()
    with training(run) as made:
        whole = plain_steps(made, steps, skipped)
        listed = operators(made, ops) if ops else []
        parts.engine(made.engine)
        parts.model(made.module)
        records = measured_steps(parts, made, steps, skipped, "rest of forward")
    middles = {name: statistics.median(each.get(name, 0.0) for each in records) for name in ORDER}
    total = sum(middles.values())
    rows = [{"part": n, "ms": round(1e3 * s, 4), "percent": round(100 * s / total, 2)} for n, s in middles.items()]
    return {
        "model": model,
        "length": LENGTH,
        "rows": ROWS,
        "precision": precision,
        "steps": len(records),
        "parts": rows,
        "sum_of_parts_ms": median_and_spread([1e3 * sum(each.values()) for each in records]),
        "step_without_hooks_ms": median_and_spread([1e3 * seconds for seconds in whole]),
        **({"operators": listed} if listed else {}),
    }


def draw(path: Path, cases: list[dict[str, Any]]) -> None:
    """A stacked bar for each case: percent of the step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 1.6 + 0.8 * len(cases)))
    colours = pyplot.get_cmap("tab10").colors
    for row, case in enumerate(cases):
        left = 0.0
        for colour, part in zip(colours, case["parts"], strict=True):
            axes.barh(row, part["percent"], left=left, color=colour, label=part["part"] if row == 0 else None)
            if part["percent"] >= 4:
                middle = left + part["percent"] / 2
                axes.text(middle, row, f"{part['percent']:.0f}%", ha="center", va="center", color="white", fontsize=8)
            left += part["percent"]
    names = [f"{case['model']}\n{case['step_without_hooks_ms']['median']:.3g} ms a step" for case in cases]
    axes.set_yticks(range(len(cases)), names)
    axes.invert_yaxis()
    axes.set_xlabel(f"share of a training step of {ROWS} rows of {LENGTH} tokens, percent")
    axes.set_xlim(0, 100)
    axes.legend(ncols=5, loc="upper center", bbox_to_anchor=(0.45, -0.35), frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def main() -> None:
    """Measure, print, draw, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--json", type=Path, default=RESULTS / "step_profile.json")
    parser.add_argument("--png", type=Path, help="default: beside the record")
    parser.add_argument("--model", choices=list(MODELS), action="append", help="may be repeated; default: all")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16", "auto"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--ops", type=int, default=0, metavar="N", help="list the N costliest operators")
    parser.add_argument("--quick", action="store_true", help="the small model, few steps: its figures say little")
    args = parser.parse_args()
    steps, skipped = (2, 1) if args.quick else (args.steps, 5)
    models = args.model or ([list(MODELS)[-1]] if args.quick else list(MODELS))
    distributed.init_distributed()
    with tempfile.TemporaryDirectory(prefix="benchmark-profile.") as folder:
        store = small_store(Path(folder) / "store", corpus_files(Path(folder)))
        cases = []
        for model in models:
            cases.append(measure(store, model, args.precision, steps, skipped, args.ops))
            print(f"{model}, {args.precision}", table(cases[-1]["parts"]), sep="\n", end="\n\n", flush=True)
            if args.ops:
                print(table(cases[-1]["operators"]), end="\n\n")
            write_json(args.json, {**about(), "quick": args.quick, "cases": cases})
    distributed.shutdown()
    draw(args.png or args.json.with_suffix(".png"), cases)


if __name__ == "__main__":
    main()
