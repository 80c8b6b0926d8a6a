"""Time and memory of a growth of BERT-Large's training state against a plain copy: `python benchmarks/growth_apply.py`.

One process grows weights and both Adam moments, fp32, one parameter at a time with `grow_state`: 12 -> 24 layers
(recipe stack) and 512 -> 1024 wide (recipe tile). The source is a real checkpoint of random values, written to a
temporary folder and memory-mapped by `Checkpoint.read`; its pages are in the page cache, and every repeat maps it anew.

What is timed: opening the checkpoint, growing, and having the whole target in anonymous memory. Nothing is allocated
before: a grown tensor is kept as `grow_state` returns it, and one that it returns still mapped (nothing moved) is
cloned. The plain copy is `torch.empty(shape).copy_(mapped)` for the same tensors in the same order, so of exactly the
bytes written; it reads the same files, also mapped anew, one run of bytes after the other and round again at the end.
Copy and growth take turns in going first (ABBA): on a virtual machine fresh pages come at two speeds, which may
alternate with every allocation of this size. A ratio is that of two neighbours; that of the two best times is given
too. Freed memory goes back to the kernel in between (`malloc_trim`), so that both always fault in fresh pages.

Peak memory is the largest RssAnon of /proc/self/status, sampled every 2 ms in a thread, less RssAnon before.

Writes `benchmarks/results/growth_apply.json`, and other recipes (`--also`) as information without a goal.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.common import about
from growth_ds.checkpoint import KINDS, Checkpoint, CheckpointWriter
from growth_ds.config import Grow, Model
from growth_ds.engine.state import TensorState
from growth_ds.growth.plan import GrowthPlan
from growth_ds.growth.planner import make_plan
from growth_ds.growth.state import grow_state
from growth_ds.model.layout import FIXED, layout, parameter_shapes
from growth_ds.ops.growth_gather import gather

RESULTS = Path(__file__).parent / "results"
TIME_GOAL, MEMORY_GOAL = 1.5, 1.1
LARGE = {"layers": 24, "hidden": 1024, "heads": 16, "ffn": 4096, "vocab_size": 30522, "positions": 512, "nsp": True}
CASES = {
    "depth": ({"layers": 12}, "stack"),
    "width": ({"hidden": 512, "heads": 8, "ffn": 2048}, "tile"),
}
"""Case -> what its source has other than BERT-Large, and the recipe the goals are for."""
ALSO = ("interleave", "fpi", "staged", "zero-pad", "lemon", "hyperclone", "msg")
QUICK = {"layers": 4, "vocab_size": 4000}
"""`--quick`: the same with fewer layers and entries, to see that it runs; its figures say little."""

State = dict[str, TensorState]


class Sampler:
    """Largest RssAnon while the block runs, in bytes over what it was at its start."""

    INTERVAL = 0.002

    def __enter__(self) -> Sampler:
        self.before = self.peak = rss_anon()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        return self

    def _sample(self) -> None:
        while not self.done.wait(self.INTERVAL):
            self.peak = max(self.peak, rss_anon())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.done.set()
        self.thread.join()
        self.peak = max(self.peak, rss_anon())

    @property
    def rise(self) -> int:
        return self.peak - self.before


def rss_anon() -> int:
    """Bytes of anonymous memory that the process has resident."""
    with open("/proc/self/status", "rb") as file:
        for line in file:
            if line.startswith(b"RssAnon:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon; this benchmark needs Linux")


def release() -> None:
    """Give freed memory back to the kernel."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def write_source(folder: Path, model: Model) -> Path:
    """A checkpoint of random values, as large as a real one, in the page cache."""
    generator = torch.Generator().manual_seed(0)
    with CheckpointWriter(folder, model, moments=True, facts={"step": 1000}) as writer:
        for name, shape in parameter_shapes(model).items():
            weight, mean = (torch.empty(shape).normal_(0, std, generator=generator) for std in (0.02, 1e-4))
            writer.add(name, TensorState(weight, mean, mean.square(), 1000))
        writer.commit()
    Checkpoint(folder).verify()  # reads every byte
    return folder


def grow_all(path: Path, plan: GrowthPlan, model: Model) -> State:
    """The whole grown state in anonymous memory."""
    checkpoint = Checkpoint(path)
    mapped: set[int] = set()

    def read(name: str) -> TensorState:
        state = checkpoint.read(name)
        mapped.update(getattr(state, kind).data_ptr() for kind in KINDS)
        return state

    def held(x: Tensor | None) -> Tensor | None:
        return x.clone() if x is not None and x.data_ptr() in mapped else x

    target = {}
    for name in parameter_shapes(model):
        state = grow_state(plan, name, read, gather)
        target[name] = TensorState(held(state.weight), held(state.exp_avg), held(state.exp_avg_sq), state.step)
        del state
    return target


def copy_all(path: Path, model: Model) -> State:
    """Copies of mapped memory, tensor by tensor as large as the grown state."""
    runs = {kind: mapped_runs(path / file) for kind, file in KINDS.items()}
    for each in runs.values():
        next(each)
    target = {}
    for name, shape in parameter_shapes(model).items():
        size = torch.Size(shape).numel()
        copies = (torch.empty(shape).copy_(run.send(size).view(shape)) for run in runs.values())
        target[name] = TensorState(*copies, step=0)
    return target


def mapped_runs(path: Path) -> Iterator[Any]:
    """A generator to which a number of elements is sent: the next run of them in a mapped file."""
    begin, size = 0, path.stat().st_size // 4
    values = torch.from_file(str(path), shared=False, size=size, dtype=torch.float32)
    wanted = yield
    while True:
        if begin + wanted > size:
            begin = 0
        run = values[begin : begin + wanted]
        begin += wanted
        wanted = yield run


def timed(work: Callable[[], State]) -> tuple[float, int]:
    """(seconds, rise of anonymous memory) of making a state, which is thrown away."""
    release()
    with Sampler() as sampler:
        started = time.perf_counter()
        state = work()
        seconds = time.perf_counter() - started
    del state
    release()
    return seconds, sampler.rise


def measure(path: Path, old: Model, new: Model, recipe: str, repeats: int) -> dict[str, Any]:
    """Copy and growth, alternating."""
    plan = make_plan(layout, old, new, Grow(recipe=recipe), FIXED)
    size = 4 * len(KINDS) * sum(torch.Size(shape).numel() for shape in parameter_shapes(new).values())
    copies, growths = [], []
    for turn in range(repeats):
        if turn % 2:
            growths.append(timed(lambda: grow_all(path, plan, new)))
        copies.append(timed(lambda: copy_all(path, new)))
        if not turn % 2:
            growths.append(timed(lambda: grow_all(path, plan, new)))
    ratios = [grown / copied for (copied, _), (grown, _) in zip(copies, growths, strict=True)]
    memory = [rise / size for _, rise in growths]
    if min(memory) < 0.99:
        raise RuntimeError(f"anonymous memory rose by {min(memory):.3f} of the target: it was not all held there")
    return {
        "recipe": recipe,
        "old": old.model_dump(mode="json"),
        "new": new.model_dump(mode="json"),
        "source_bytes": sum((path / file).stat().st_size for file in KINDS.values()),
        "target_bytes": size,
        "copy_seconds": spread([seconds for seconds, _ in copies]),
        "grow_seconds": spread([seconds for seconds, _ in growths]),
        "time_ratio": spread(ratios),
        "time_ratio_of_best": round(min(seconds for seconds, _ in growths) / min(seconds for seconds, _ in copies), 4),
        "peak_memory_ratio": spread(memory),
        "copy_peak_memory_ratio": spread([rise / size for _, rise in copies]),
    }


def spread(values: list[float]) -> dict[str, Any]:
    rounded = [round(value, 4) for value in values]
    return {"median": round(statistics.median(values), 4), "min": min(rounded), "max": max(rounded), "all": rounded}


def said(values: dict[str, Any]) -> str:
    return f"{values['median']:.2f} ({values['min']:.2f} to {values['max']:.2f})"


def report(case: str, record: dict[str, Any], goals: bool) -> None:
    """Human lines of one measurement."""
    time_ratio, memory = record["time_ratio"], record["peak_memory_ratio"]
    gigabytes = record["target_bytes"] / 1e9
    print(f"{case}, {record['recipe']}: {gigabytes:.2f} GB written, {len(time_ratio['all'])} repeats, median (spread)")
    print(f"  seconds to grow      {said(record['grow_seconds'])}; plain copy {said(record['copy_seconds'])}")
    print(f"  best over best       {record['time_ratio_of_best']:.2f}")
    print(f"  time over copy       {said(time_ratio)}{met(time_ratio, TIME_GOAL) if goals else ''}")
    print(f"  peak memory over new {said(memory)}{met(memory, MEMORY_GOAL) if goals else ''}", flush=True)


def met(values: dict[str, Any], goal: float) -> str:
    return f"; goal {goal}: {'met' if values['median'] <= goal else 'MISSED'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--case", choices=list(CASES), action="append", help="only this one; may be repeated")
    parser.add_argument("--recipe", action="append", help="in place of the case's own; then there are no goals")
    parser.add_argument("--also", nargs="*", metavar="RECIPE", help="more recipes of width; without names: all usual")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--also-repeats", type=int, default=3, help="repeats of recipes that have no goal")
    parser.add_argument("--threads", type=int, help="of torch; 1 is steadier where other jobs run (default: all cores)")
    parser.add_argument("--quick", action="store_true", help="a small model")
    parser.add_argument("--folder", help="where the temporary checkpoints are written (2.2 GB)")
    parser.add_argument("--out", type=Path, default=RESULTS / "growth_apply.json")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    large = {**LARGE, **(QUICK if args.quick else {})}
    record: dict[str, Any] = {**about(), "goals": {"time_ratio": TIME_GOAL, "peak_memory_ratio": MEMORY_GOAL}}
    record["cases"], record["information"] = {}, {}

    def add(case: str, measured: dict[str, Any], goals: bool) -> None:
        report(case, measured, goals)
        record["cases" if goals else "information"][f"{case}, {measured['recipe']}"] = measured
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")

    for case in args.case or CASES:
        smaller, own = CASES[case]
        if args.quick and "layers" in smaller:
            smaller = {"layers": large["layers"] // 2}
        old, new = (Model.model_validate({**large, "head_size": 64, **change}) for change in (smaller, {}))
        also = [] if args.also is None or case != "width" else args.also or ALSO
        with tempfile.TemporaryDirectory(prefix="growth_apply.", dir=args.folder) as folder:
            source = write_source(Path(folder) / "source", old)
            for recipe in args.recipe or [own]:
                add(case, measure(source, old, new, recipe, args.repeats), recipe == own and not args.quick)
            for recipe in also:
                add(case, measure(source, old, new, recipe, args.also_repeats), False)


if __name__ == "__main__":
    main()
