"""Growth of BERT-Large from 12 to 24 layers on two CPU ranks: seconds, bytes written, peak memory of each rank.

    python benchmarks/growth_large.py             # all cases
    python benchmarks/growth_large.py --quick     # a small model: it runs, its figures say little

A 12-layer state of random weights and moments is written as two ranks would write it. Then two processes enter the
24-layer stage through the coordinator and save what they got once more, `--repeats` times for each case: ZeRO stage,
precision, mode. Measured on each rank:

    build     DeepSpeed's engine around the empty module
    inject    gather, transform, re-shard
    verify    checksums of every tensor, parameter groups
    probe     one forward of the new engine on a tiny batch
    save      the checkpoint that makes the growth durable

Growth time is build + inject + verify, the growth's own work; it is set against one plain checkpoint of the grown
state, median against median. The first growth and the first save are given too: on a virtual machine memory that nobody
has used for a while is slow, 2 s a GB instead of 0.1. In a run a growth finds what the engine before it has left. The
whole of `enter`, its own checkpoint included, is given as well. A checkpoint waits for the disk (fsync).

Peak memory is the largest RssAnon + RssShmem of /proc/self/status, sampled every 5 ms in a thread, less what it was
before `enter`. Pages of mapped checkpoint files do not count: the system drops them when it needs the room. It is
compared with `cost.growth_peak`, which leaves the probe's activations and gathered layers out: the probe's own peak is
given beside it. Bytes on disk are compared with 12 a parameter; files also have headers, the folder a manifest.

Writes `benchmarks/results/growth_large.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.common import about  # noqa: E402
from growth_ds import coordinator as coordinator_module  # noqa: E402
from growth_ds.checkpoint import SliceFile, commit, temporary_folder  # noqa: E402
from growth_ds.config import Model, Run  # noqa: E402
from growth_ds.coordinator import Coordinator, Position  # noqa: E402
from growth_ds.data.batch import Batch  # noqa: E402
from growth_ds.engine import distributed  # noqa: E402
from growth_ds.engine.memory import release_memory  # noqa: E402
from growth_ds.engine.zero import ZeroEngine  # noqa: E402
from growth_ds.model import cost  # noqa: E402
from growth_ds.model.layout import parameter_shapes  # noqa: E402
from growth_ds.run_folder import RunFolder  # noqa: E402

RESULTS = Path(__file__).parent / "results"
SIZES: dict[str, dict[str, Any]] = {
    "large": {"hidden": 1024, "heads": 16, "ffn": 4096, "vocab_size": 30522, "positions": 512, "nsp": True},
    "quick": {"hidden": 256, "heads": 4, "ffn": 1024, "vocab_size": 4000, "positions": 512, "nsp": True},
    "tiny": {"hidden": 64, "heads": 1, "ffn": 64, "vocab_size": 1000, "positions": 512, "nsp": True},
}
LAYERS = (12, 24)
RANKS = 2
TIME_GOAL, WITHIN = 2.0, 0.15
CASES = [(zero, precision, mode) for zero in (3, 2) for precision in ("fp32", "bf16") for mode in ("sharded", "rank0")]
GOALS = (3, "sharded")
"""ZeRO stage and mode for which the goals are stated; the other cases are information."""
STEP = 1000
OWN = ("build", "inject", "verify")


def the_run(sizes: dict[str, Any], zero: int, precision: str, mode: str) -> Run:
    """Two stages, of which the second has twice the layers."""
    batch = {"global": RANKS, "micro": 1}
    stages = [{"model": {"layers": layers}, "length": 16, "batch": batch, "steps": STEP} for layers in LAYERS]
    return Run.model_validate(
        {
            "name": "growth-large",
            "model": sizes,
            "engine": {"precision": precision, "zero": zero, "coordinator": mode},
            "checkpoint": {"keep": 1},
            "log": {"tensorboard": False},
            "stages": stages,
        }
    )


def write_source(run: Run, folder: RunFolder) -> None:
    """A checkpoint of random values at the end of the first stage, in one file for each rank, as ZeRO-3 cuts it."""
    generator, model = torch.Generator().manual_seed(0), run.stages[0].model
    path = folder.checkpoint_path(STEP, 0)
    temporary, records = temporary_folder(path), []
    for rank in range(RANKS):
        ranges = {}
        for name, shape in parameter_shapes(model).items():
            count = torch.Size(shape).numel()
            piece = -(-count // RANKS)
            ranges[name] = (min(count, rank * piece), min(count, (rank + 1) * piece))
        file = SliceFile(temporary, rank, ranges, moments=True)
        for name, (begin, end) in ranges.items():
            weight, mean = (torch.empty(end - begin).normal_(0, std, generator=generator) for std in (0.02, 1e-4))
            file.add_all(name, weight, mean, mean.square(), STEP)
        records.append(file.close())
    facts = {"step": STEP, "stage": 0, "seconds": 1.0, "tokens": run.tokens_at(STEP), "precision": "fp32", "keep": []}
    facts |= {"run": run.digest(), "name": run.name, "zero": 3, "ranks": RANKS, "probe": {"loss": 10.0, "accuracy": 0}}
    commit(temporary, path, model, True, facts, records, None)
    folder.publish(path, keep=1)


class Meter:
    """Seconds of named phases, and the most memory in each, over what there was at the start."""

    INTERVAL = 0.005

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self.now = "start"
        self.before = resident()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()

    def _sample(self) -> None:
        while not self.done.wait(self.INTERVAL):
            phase, held = self.now, resident() - self.before
            self.peaks[phase] = max(self.peaks.get(phase, 0), held)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        outer, self.now, started = self.now, phase, time.perf_counter()
        yield
        spent = time.perf_counter() - started
        self.seconds[phase] = self.seconds.get(phase, 0.0) + spent
        self.seconds[outer] = self.seconds.get(outer, 0.0) - spent  # a phase inside another is not part of it
        self.now = outer

    def close(self) -> None:
        self.done.set()
        self.thread.join()


def resident() -> int:
    """Bytes of memory of this process that no file backs."""
    total = 0
    with open("/proc/self/status", "rb") as file:
        for line in file:
            if line.startswith((b"RssAnon:", b"RssShmem:")):
                total += int(line.split()[1]) * 1024
    return total


class Measured(Coordinator):
    """The coordinator with a clock at its phases."""

    meter: Meter

    def _build(self, index: int) -> ZeroEngine:
        with self.meter("build"):
            return super()._build(index)

    def _verified(self, *rest: Any) -> dict[str, Any]:
        with self.meter("verify"):
            return super()._verified(*rest)

    def _commit_growth(self, *rest: Any) -> None:
        with self.meter("save"):
            super()._commit_growth(*rest)


def timed(meter: Meter, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any) -> Any:
        with meter(phase):
            return function(*args)

    return wrapped


def probe(engine: ZeroEngine, length: int) -> dict[str, float]:
    """The loss on one row for each rank."""
    ids = torch.arange(length)[None] % 1000
    picked = torch.arange(2)
    batch = Batch(ids, torch.zeros_like(ids), None, picked, picked, torch.zeros(1, dtype=torch.int64))
    sums, counts = engine.evaluate([batch])
    return {"loss": sums["mlm"] / counts["mlm"], "accuracy": sums["mlm_correct"] / counts["mlm"]}


def warm_up(run: Run) -> None:
    """A tiny engine, built and probed: DeepSpeed imports half of itself with the first one, as a run's first stage does
    long before its first growth."""
    tiny = Model.model_validate({**SIZES["tiny"], "layers": 1})
    stages = tuple(stage.model_copy(update={"model": tiny}) for stage in run.stages)
    coordinator = Coordinator(
        run.model_copy(update={"stages": stages}), RunFolder(Path(os.devnull)), probe, None, say=lambda _: None
    )
    engine, _ = coordinator.enter(0, Position())
    probe(engine, 16)
    engine.close()


def probe_and_release(engine: ZeroEngine, length: int) -> dict[str, float]:
    """The probe, its freed memory given back while it is still the probe's."""
    found = probe(engine, length)
    release_memory()
    return found


def one_rank(job: dict[str, Any], out: Path) -> None:
    """What one process does, as often as it is told: enter the second stage, save it plainly, forget it."""
    info = distributed.init_distributed(timeout_s=600)
    run, folder = Run.model_validate(job["run"]), Path(job["folder"])
    warm_up(run)
    right, turns = coordinator_module.inject, []
    for number in range(job["repeats"]):
        home = folder / f"turn-{number}"
        if info.rank == 0:
            shutil.copytree(job["source"], home, copy_function=os.link)
        distributed.barrier()
        turns.append(one_turn(run, RunFolder(home), right))
        distributed.barrier()
        if info.rank == 0:
            shutil.rmtree(home)
    (out / f"rank.{info.rank}").write_text(json.dumps(turns))
    distributed.barrier()
    distributed.shutdown()


def one_turn(run: Run, folder: RunFolder, inject: Callable[..., Any]) -> dict[str, Any]:
    """One growth and one plain checkpoint of what it made."""
    coordinator = Measured(run, folder, probe, None, say=lambda _: None)
    if coordinator.main:
        coordinator.resume()
    release_memory()
    distributed.barrier()
    meter = coordinator.meter = Meter()
    coordinator_module.inject = timed(meter, "inject", inject)  # type: ignore[assignment]
    coordinator.probe = timed(meter, "probe", probe_and_release)
    with meter("rest"):
        engine, record = coordinator.enter(1, Position(STEP, 1.0))
    meter.now = "done"
    assert record is not None
    distributed.barrier()
    held = resident() - meter.before
    meter.close()
    started, path = time.perf_counter(), folder.checkpoint_path(STEP + 1, 1)
    coordinator.saver.save(engine, path, run.stages[1].model, {"step": STEP + 1, "stage": 1, "keep": []})
    plain = time.perf_counter() - started
    written = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    engine.close()
    figures = {"mode": record["mode"], "seconds": meter.seconds, "peaks": meter.peaks, "plain": plain}
    return {**figures, "bytes": written, "held": held, "before": meter.before}


def start_ranks(job: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """One process for each rank; what each measured, turn by turn."""
    port, processes = str(distributed.free_port()), []
    with tempfile.TemporaryDirectory() as out:
        for rank in range(RANKS):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
            env = {**os.environ, **{key: str(value) for key, value in place.items()}}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            command = [sys.executable, __file__, "--job", json.dumps(job), "--out", out]
            processes.append(subprocess.Popen(command, env=env, cwd=ROOT))
        codes = [process.wait() for process in processes]
        if any(codes):
            raise RuntimeError(f"the ranks ended with {codes}")
        return [json.loads((Path(out) / f"rank.{rank}").read_text()) for rank in range(RANKS)]


def measure(sizes: dict[str, Any], case: tuple[int, str, str], source: Path, repeats: int) -> dict[str, Any]:
    """One case, each turn from a fresh copy of the source."""
    zero, precision, mode = case
    run = the_run(sizes, zero, precision, mode)
    with tempfile.TemporaryDirectory(prefix="growth_large.", dir=source.parent) as folder:
        job = {"run": run.model_dump(mode="json", by_alias=True), "folder": folder, "source": str(source)}
        ranks = start_ranks({**job, "repeats": repeats})
    old, new = (stage.model for stage in run.stages)
    assert all(turn["mode"] == mode for turns in ranks for turn in turns)
    return judged(old, new, case, ranks)


def judged(
    old: Model, new: Model, case: tuple[int, str, str], ranks: list[list[dict[str, Any]]]
) -> dict[str, Any]:  # fmt: skip
    """The figures of a case beside what was predicted."""
    zero, precision, mode = case
    turns = list(zip(*ranks, strict=True))  # ranks wait for each other: the slowest tells how long a phase took

    def slowest(seconds: Callable[[dict[str, Any]], float]) -> list[float]:
        return [max(seconds(rank) for rank in turn) for turn in turns]

    def most(memory: Callable[[dict[str, Any]], int]) -> list[int]:
        return [max(memory(turn) for turn in rank) for rank in ranks]

    phases = [phase for phase in ranks[0][0]["seconds"] if phase != "start"]
    own = slowest(lambda rank: sum(rank["seconds"][phase] for phase in OWN))
    whole = slowest(lambda rank: sum(rank["seconds"][phase] for phase in phases))
    plain = slowest(lambda rank: rank["plain"])
    predicted = cost.growth_peak(old, new, zero, RANKS, precision != "fp32", mode)
    peaks = most(lambda turn: max(turn["peaks"].get(phase, 0) for phase in (*OWN, "save", "rest")))
    expected, written = 12 * cost.parameters(new), ranks[0][0]["bytes"]
    middle = statistics.median
    return {
        "zero": zero,
        "precision": precision,
        "mode": mode,
        "phase_seconds": {
            phase: [round(value, 3) for value in slowest(lambda rank, phase=phase: rank["seconds"].get(phase, 0.0))]
            for phase in phases
        },
        "growth_seconds": [round(value, 3) for value in own],
        "enter_seconds": [round(value, 3) for value in whole],
        "plain_save_seconds": [round(value, 3) for value in plain],
        "growth_over_save": round(middle(own) / middle(plain), 3),
        "first_growth_over_first_save": round(own[0] / plain[0], 3),
        "enter_over_save": round(middle(whole) / middle(plain), 3),
        "bytes_written": written,
        "bytes_expected": expected,
        "bytes_ratio": round(written / expected, 5),
        "peak_bytes": peaks,
        "peak_predicted": predicted,
        "peak_ratio": round(max(peaks) / predicted, 4),
        "probe_peak_bytes": most(lambda turn: turn["peaks"].get("probe", 0)),
        "peak_of_phase": [
            {phase: max(turn["peaks"].get(phase, 0) for turn in rank) for phase in (*phases, "done")} for rank in ranks
        ],
        "held_afterwards": [[turn["held"] for turn in rank] for rank in ranks],
        "process_before": [[turn["before"] for turn in rank] for rank in ranks],
    }


def report(figures: dict[str, Any], goals: bool) -> None:
    """Human lines of one case."""
    print(f"ZeRO-{figures['zero']}, {figures['precision']}, {figures['mode']}")
    middle = statistics.median
    phases = ", ".join(f"{phase} {middle(values):.2f}" for phase, values in figures["phase_seconds"].items())
    print(f"  seconds: {phases}; growths {figures['growth_seconds']}, plain saves {figures['plain_save_seconds']}")
    ratio = figures["growth_over_save"]
    verdict = f"; goal {TIME_GOAL}: {'met' if ratio <= TIME_GOAL else 'MISSED'}" if goals else ""
    print(f"  growth {middle(figures['growth_seconds']):.2f} s, {ratio:.2f} saves{verdict}; with probe and checkpoint "
          f"{middle(figures['enter_seconds']):.2f} s, {figures['enter_over_save']:.2f} saves")  # fmt: skip
    print(f"  bytes written over 12 a parameter {figures['bytes_ratio']:.4f}")
    peaks = ", ".join(f"{peak / 2**20:.0f}" for peak in figures["peak_bytes"])
    near = "met" if abs(figures["peak_ratio"] - 1) <= WITHIN else "MISSED"
    print(f"  peak MiB of the ranks {peaks}; predicted {figures['peak_predicted'] / 2**20:.0f}, ratio "
          f"{figures['peak_ratio']:.3f}; within {WITHIN:.0%}: {near}")  # fmt: skip
    print("  MiB in the probe " + ", ".join(f"{peak / 2**20:.0f}" for peak in figures["probe_peak_bytes"]))
    for rank, peaks_of in enumerate(figures["peak_of_phase"]):
        print(f"    rank {rank}: " + ", ".join(f"{phase} {peak / 2**20:.0f}" for phase, peak in peaks_of.items()))
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small model")
    parser.add_argument("--zero", type=int, action="append", help="only this stage; may be repeated")
    parser.add_argument("--precision", action="append", help="only this one; may be repeated")
    parser.add_argument("--mode", action="append", help="only this one; may be repeated")
    parser.add_argument("--repeats", type=int, default=3, help="growths, each followed by a plain save")
    parser.add_argument("--folder", help="where the temporary checkpoints are written (14 GB)")
    parser.add_argument("--out", type=Path, default=RESULTS / "growth_large.json")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        one_rank(args.job, args.out)
        return
    sizes = SIZES["quick" if args.quick else "large"]
    wanted: list[Any] = [args.zero, args.precision, args.mode]
    cases = [case for case in CASES if all(w is None or c in w for c, w in zip(case, wanted, strict=True))]
    record: dict[str, Any] = {**about(), "ranks": RANKS, "layers": LAYERS, "sizes": sizes, "cases": []}
    record["goals"] = {"growth_over_save": TIME_GOAL, "peak_within": WITHIN, "zero": GOALS[0], "mode": GOALS[1]}
    with tempfile.TemporaryDirectory(prefix="growth_large.", dir=args.folder) as folder:
        source = Path(folder) / "source"
        write_source(the_run(sizes, 3, "fp32", "sharded"), RunFolder(source))
        for case in cases:
            figures = measure(sizes, case, source, args.repeats)
            record["cases"].append(figures)
            report(figures, (case[0], case[2]) == GOALS)
            args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
