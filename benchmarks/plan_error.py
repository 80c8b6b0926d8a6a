"""What `growth-ds plan` says of runs beside what they were measured to do: `python benchmarks/plan_error.py`.

Each run is trained for some steps by the ordinary `growth-ds train --ranks N` in processes of its own, on the CPU. One
calibration of this machine for each number of ranks (`plan --hardware here`), right before the runs with as many,
predicts all of them; nothing is fitted to a run. With `--only` some are measured again and the rest of the record
stays, predicted as it was. Compared, stage by stage:

    parameters   the plan's, and `numel` of the built model
    FLOPs        the plan's, those that the run recorded, and torch's own counter round one row's forward and backward
                 (matrix products alone, as the plan counts; ops and attention in torch's own operations)
    memory       most resident bytes, that no file backs, of a rank over the run, sampled every 10 ms, those of a rank
                 with next to no model included; the error of what lies above them is given too
    time         median seconds of a step, without a stage's first two

A machine that does other work gives other figures for the same step; the load average is in the record.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import psutil  # noqa: E402
import yaml  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from benchmarks.common import RESULTS, about, table, write_json  # noqa: E402
from benchmarks.training import corpus_files, small_store  # noqa: E402
from growth_ds.calibration import calibrated, rates  # noqa: E402
from growth_ds.config import Run  # noqa: E402
from growth_ds.config_file import load_run  # noqa: E402
from growth_ds.engine.ds_config import resolve_precision  # noqa: E402
from growth_ds.engine.memory import resident_memory  # noqa: E402
from growth_ds.fit import random_rows  # noqa: E402
from growth_ds.forecast_here import forecast_run_here, precision_here  # noqa: E402
from growth_ds.model.bert import Bert  # noqa: E402
from growth_ds.planning import plan_run, with_vocabulary  # noqa: E402

WITHIN = {"memory": 0.10, "time": 0.20}
SKIPPED, EVERY_S = 2, 0.01
LIMIT_S = 600.0
VOCABULARY = 8192
"""Of the store."""


def stage(layers: int, hidden: int, length: int, rows: int, micro: int, steps: int, **more: Any) -> dict[str, Any]:
    """A stage of a model with heads of 64 and an FFN of four times its width."""
    model = {"layers": layers, "hidden": hidden, "heads": hidden // 64, "ffn": 4 * hidden, "positions": length}
    return {"model": model, "length": length, "batch": {"global": rows, "micro": micro}, "steps": steps, **more}


TILE = {"grow": {"layers": "tile", "positions": "tile", "moments": "carry"}}
RUNS: dict[str, dict[str, Any]] = {
    "2 x 128": {"ranks": 2, "zero": 2, "precision": "fp32", "stages": [stage(2, 128, 32, 64, 32, 150)]},
    "4 x 256 to 8 x 256": {
        "ranks": 2, "zero": 2, "precision": "auto",
        "stages": [stage(4, 256, 32, 64, 32, 20), stage(8, 256, 64, 32, 16, 12, **TILE)],
    },
    "4 x 256": {"ranks": 1, "zero": 1, "precision": "fp32", "stages": [stage(4, 256, 128, 32, 16, 10)]},
    "6 x 512": {"ranks": 2, "zero": 3, "precision": "auto", "stages": [stage(6, 512, 128, 16, 8, 8)]},
    "6 x 384, rows of 512": {"ranks": 1, "zero": 3, "precision": "fp32", "stages": [stage(6, 384, 512, 4, 2, 6)]},
    "3 x 512 to 6 x 512": {
        "ranks": 1, "zero": 1, "precision": "auto",
        "stages": [stage(3, 512, 64, 16, 16, 10), stage(6, 512, 128, 8, 8, 10, **TILE)],
    },
    "12 x 768 (BERT-Base)": {
        "ranks": 2, "zero": 1, "precision": "auto", "vocab": 30522, "stages": [stage(12, 768, 128, 8, 4, 12)],
    },
    "3 x 1024 (BERT-Large's width)": {
        "ranks": 1, "zero": 0, "precision": "fp32", "vocab": 30522, "stages": [stage(3, 1024, 128, 8, 8, 6)],
    },
}  # fmt: skip


def config(name: str, case: dict[str, Any], store: Path) -> dict[str, Any]:
    """The run's YAML."""
    return {
        "name": name.replace(" ", "-"),
        "data": {"store": str(store), "verify": False},
        "engine": {"precision": case["precision"], "zero": case["zero"]},
        "optim": {"lr": 1e-4, "warmup": 0.1},
        "evaluation": {"tokens": 1024},
        "log": {"tensorboard": False},
        "model": {"vocab_size": case.get("vocab")} if "vocab" in case else {},
        "stages": case["stages"],
    }


class Watcher:
    """The most resident bytes of each rank among the children of a process."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process, self.peaks, self.done = process, dict[int, int](), threading.Event()
        self.ranks = set[int]()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        last = 0.0
        while not self.done.wait(EVERY_S):
            if time.monotonic() - last > 1.0:
                last = time.monotonic()
                self._find()
            for pid in list(self.ranks):
                try:
                    self.peaks[pid] = max(self.peaks.get(pid, 0), resident_memory(pid))
                except OSError:
                    self.ranks.discard(pid)

    def _find(self) -> None:
        try:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                if child.pid not in self.peaks and "RANK" in child.environ():
                    self.ranks.add(child.pid)
        except psutil.Error:
            pass

    def close(self) -> list[int]:
        """Bytes of each rank."""
        self.done.set()
        self.thread.join()
        return sorted(self.peaks.values(), reverse=True)


def end(process: subprocess.Popen[bytes]) -> None:
    """With the ranks that it has started, if they have not ended."""
    family = [process, *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
    for each in family:
        with contextlib.suppress(psutil.Error):
            each.kill()
    process.wait()


def trained(path: Path, ranks: int) -> tuple[list[dict[str, Any]], int]:
    """Records of a run's steps, and the most bytes of any of its ranks."""
    folder, log = path.with_suffix(".run"), path.with_suffix(".log")
    command = [sys.executable, "-m", "growth_ds", "train", str(path), "--run-dir", str(folder), "--ranks", str(ranks)]
    env = {**os.environ, "DS_ACCELERATOR": "cpu"}
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)
        watcher = Watcher(process)
        try:
            code = process.wait(LIMIT_S)
        finally:
            end(process)
            peaks = watcher.close()
    if code:
        raise RuntimeError(f"{path.stem}: {log.read_text()[-2000:]}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line], max(peaks[:ranks])


def counted(run: Run, index: int) -> tuple[int, int]:
    """Parameters of the built model of a stage, and what torch counts in forward and backward of one of its rows."""
    model = Bert(run.stages[index].model).train()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        sum(model(random_rows(run, index, 1)).values()).backward()
    return sum(each.numel() for each in model.parameters()), counter.get_total_flops()


def compare(name: str, case: dict[str, Any], store: Path, record: dict[str, Any]) -> dict[str, Any]:
    """One run, predicted, then measured; its files beside the store."""
    folder = store.parent
    path = folder / f"run-{list(RUNS).index(name)}.yaml"
    path.write_text(yaml.safe_dump(config(name, case, store)))
    run = with_vocabulary(load_run(path), VOCABULARY)
    plan, here = plan_run(run, case["ranks"]), forecast_run_here(run, case["ranks"], record)
    load = os.getloadavg()[0]
    steps, peak = trained(path, case["ranks"])
    stages = [_stage(run, index, plan, here, steps) for index in range(len(run.stages))]
    precision = precision_here(run)
    empty = rates(record, case["ranks"], precision).empty(f"zero-{case['zero']} {precision}")
    expected = max(each["bytes_per_rank"][str(case["zero"])] for each in here["stages"])
    facts = {"ranks": case["ranks"], "zero": case["zero"], "precision": precision}
    return {
        "run": name, **facts, "load_average": round(load, 2), "stages": stages,
        "flops": {"plan": plan["flops"], "run": steps[-1]["flops"]},
        "memory": {"predicted": expected, "measured": peak, "empty": empty, "error": expected / peak - 1,
                   "error_above_empty": (expected - empty) / (peak - empty) - 1},
    }  # fmt: skip


def _stage(
    run: Run, index: int, plan: dict[str, Any], here: dict[str, Any], steps: list[dict[str, Any]]
) -> dict[str, Any]:
    own, planned = run.stages[index], plan["stages"][index]
    tokens = own.batch.global_ * own.length
    seconds = [tokens / step["tokens_per_s"] for step in steps if step["stage"] == index][SKIPPED:]
    measured, predicted = statistics.median(seconds), here["stages"][index]["step_seconds"]
    built, by_torch = counted(run, index)
    sizes = f"{own.model.layers} x {own.model.hidden}, {own.length}"
    return {
        "sizes": sizes,
        "parameters": {"plan": planned["parameters"], "built": built},
        "flops_of_a_row": {"plan": planned["flops_per_token"] * own.length, "torch": by_torch},
        "time": {"predicted": predicted, "measured": measured, "error": predicted / measured - 1, "all": seconds},
        "parts": here["stages"][index]["step"],
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether counts are exact, and mean and worst of the errors' sizes."""
    stages = [each for run in runs for each in run["stages"]]
    found: dict[str, Any] = {
        "runs": len(runs),
        "parameters_exact": all(each["parameters"]["plan"] == each["parameters"]["built"] for each in stages),
        "flops_exact": all(run["flops"]["plan"] == run["flops"]["run"] for run in runs)
        and all(each["flops_of_a_row"]["plan"] == each["flops_of_a_row"]["torch"] for each in stages),
    }
    errors = {"memory": [run["memory"]["error"] for run in runs], "time": [each["time"]["error"] for each in stages]}
    for key, values in errors.items():
        sizes = [abs(value) for value in values]
        found[key] = {"mean": statistics.mean(sizes), "worst": max(values, key=abs), "within": WITHIN[key]}
        found[key]["held"] = sum(size <= WITHIN[key] for size in sizes)
        found[key]["of"] = len(sizes)
    return found


def figures_of(runs: list[dict[str, Any]], begun: float, calibration: dict[str, Any]) -> dict[str, Any]:
    """The record."""
    spent = round(time.monotonic() - begun, 1)
    return {**about(), "seconds": spent, **summary(runs), "runs": runs, "calibration": calibration}


def rows_of(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table's."""
    found = []
    for run in runs:
        for number, each in enumerate(run["stages"]):
            counts, row, clock, memory = each["parameters"], each["flops_of_a_row"], each["time"], run["memory"]
            found.append({
                "run": run["run"], "stage": number, "ranks": run["ranks"], "ZeRO": run["zero"], "in": run["precision"],
                "parameters": f"{counts['plan']:,}" + ("" if counts["plan"] == counts["built"] else " WRONG"),
                "FLOPs/row": f"{row['plan']:.4g}" + ("" if row["plan"] == row["torch"] else " WRONG"),
                "ms": 1e3 * clock["measured"], "plan ms": 1e3 * clock["predicted"], "error": f"{clock['error']:+.1%}",
                "MiB": memory["measured"] / 2**20, "plan MiB": memory["predicted"] / 2**20,
                "off": f"{memory['error']:+.1%}", "above empty": f"{memory['error_above_empty']:+.1%}",
            })  # fmt: skip
    return found


def main() -> None:
    """Calibrate, train, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--json", type=Path, default=RESULTS / "plan_error.json")
    parser.add_argument("--calibration", type=Path, help="keep it here, and take it from here")
    parser.add_argument(
        "--only", action="append", help="a run's name, or its beginning; may be repeated; others stay in the record"
    )
    args = parser.parse_args()
    chosen = {name: case for name, case in RUNS.items() if not args.only or name.startswith(tuple(args.only))}
    begun, runs = time.monotonic(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(prefix="plan-error.") as place:
        folder = Path(place)
        store = small_store(folder / "store", corpus_files(folder))
        calibration = args.calibration or folder / "calibration.json"
        for ranks in sorted({case["ranks"] for case in chosen.values()}):
            cases = {name: case for name, case in chosen.items() if case["ranks"] == ranks}
            wanted = sorted({(case["zero"], resolve_precision(case["precision"])) for case in cases.values()})
            record = calibrated(calibration, ranks, wanted, lambda line: print(line, flush=True))
            for name, case in cases.items():
                runs.append(compare(name, case, store, record))
                print(table(rows_of(runs[-1:])), flush=True)
                if not args.only:  # a stopped one says what it has
                    write_json(args.json, figures_of(runs, begun, record))
    if args.only and args.json.exists():
        again = {run["run"]: run for run in runs}
        runs = [again.pop(run["run"], run) for run in json.loads(args.json.read_text())["runs"]]
        runs += again.values()
    print(table(rows_of(runs)))
    print(json.dumps(summary(runs), indent=1))
    time_of = summary(runs)["time"]
    line = {"of": time_of["of"], "mean": round(time_of["mean"], 4), "worst": round(abs(time_of["worst"]), 4)}
    print(f'growth_ds/report/plan_page.py, ERRORS: "here": {json.dumps(line)}')
    write_json(args.json, figures_of(runs, begun, record))


if __name__ == "__main__":
    main()
