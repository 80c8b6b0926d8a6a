"""What this machine was measured to do: the rates by which `plan --hardware here` predicts, and their file.

`growth_ds.calibrating` measures. A record holds numbers of ranks apart, for ranks share the machine; what it lacks for
a plan is measured and added.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from growth_ds.errors import UserError
from growth_ds.files import write_durably

FORMAT = "growth_ds-calibration-3"
LIMIT_S = 900.0
"""For each (ZeRO stage, precision); two cores took about three minutes."""
Points = Sequence[Sequence[float]]
"""[x, ..., y] of each measurement, the last axis the fastest."""
SIZES = ((2, 64, 512), (2, 256, 8192), (2, 768, 8192), (2, 1024, 30522))
"""(layers, hidden, vocabulary) of the models that are measured."""
STATES = (*SIZES[:2], (2, 512, 16384), *SIZES[2:], (6, 1024, 30522))
"""Of those whose runs tell a rank's memory. The third is just below, and the fourth above, what `memory.keep_memory`
takes for large. The last two have more parameters than DeepSpeed's buckets (`ds_config`): between them each parameter
takes what it takes in larger models."""
FULL = ((4, 256, 8192, 128, 16), (4, 512, 8192, 128, 16))
"""(layers, hidden, vocabulary, length, rows of a micro-batch) of runs that keep much."""


def between(points: Points, x: float) -> float:
    """y at x, by a straight line in the logarithms of [x, y] points; the nearest one's beyond them."""
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x <= x1:
            share = math.log(x / x0) / math.log(x1 / x0)
            return math.exp(math.log(y0) + share * math.log(y1 / y0))
    return points[-1][1]


@dataclass(frozen=True)
class Rates:
    """What one of `ranks` ranks does in one precision."""

    ranks: int
    operations: dict[str, Any]
    engines: dict[str, Points]
    """`zero-2 bf16` -> [parameters, layers, seconds of a step, seconds of another micro-batch]."""
    memory: dict[str, dict[str, Any]]
    """`zero-2 bf16` -> `calibrating_memory.resident_bytes`."""
    links: Points

    def product(self, tokens: float, inputs: int, outputs: int) -> float:
        """Seconds of x W^T and its two gradients: the rate of a square matrix of as many elements."""
        if tokens <= 0:
            return 0.0
        width, points = math.sqrt(inputs * outputs), self.operations["products"]
        by_width = [
            [w, between([[t, rate] for t, other, rate in points if other == w], tokens)]
            for w in sorted({each[1] for each in points})
        ]
        return 6 * tokens * inputs * outputs / between(by_width, width)

    def attention(self, length: int, rows: float, heads: int, head_size: int) -> float:
        """Seconds of the forward and backward of attention; beyond the longest row its cost grows as the square."""
        points = self.operations["attention"]
        longest = points[-1][0]
        beyond = max(1.0, length / longest) ** 2
        return between(points, length) * beyond * rows * heads * head_size / 64

    def elements(self, kind: str, count: float) -> float:
        """Seconds of a `norm`, `gelu`, `add` or `embed`, forward and backward, of so many elements."""
        return count * between(self.operations[kind], max(1.0, count))

    def engine(self, key: str, parameters: int, layers: int) -> tuple[float, float]:
        """Seconds that a step takes beside its layers, and that each further micro-batch adds."""
        few, many, *_ = points = self.engines[key]
        found = []
        for column in (2, 3):
            of_a_layer = max(0.0, (many[column] - few[column]) / (many[1] - few[1]))
            line = [(p[0], max(0.0, p[column] - p[1] * of_a_layer)) for p in points if p is not many]
            found.append(_straight(line, parameters) + layers * of_a_layer)
        return found[0], found[1]

    def empty(self, key: str) -> float:
        """Resident bytes of a rank with next to no model."""
        return float(self.memory[key]["state"][0][2])

    def resident(self, key: str, parameters: int, accumulation: int, kept: float, each: float) -> float:
        """Resident bytes of a rank whose micro-batches keep so many for their backward.

        `each`: bytes of weights, gradients and optimizer of a parameter. Models that are larger than those measured
        hold at least so many more, and what lies between the last two of those measured.
        """
        state, full = self.memory[key]["state"], self.memory[key]["full"]
        built, one, several = ([(p[0], p[column]) for p in state] for column in (1, 2, 3))
        beside = sum(held - _straight(several, other) for other, _, held in full)
        share = max(0.0, beside) / sum(other_kept for _, other_kept, _ in full)
        steps = _straight(one if accumulation == 1 else several, parameters, each) + share * kept
        return max(_straight(built, parameters, each), steps)

    def message(self, size: float) -> float:
        """Seconds of an all-reduce of so many bytes."""
        if not self.links:
            return 0.0
        (few, short), (many, long) = self.links
        return short + max(0.0, size - few) * max(0.0, long - short) / (many - few)


def _straight(points: Sequence[tuple[float, float]], x: float, least: float = -math.inf) -> float:
    """y at x on the lines between points; beyond the last on its line, which rises by `least` at the least."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x <= x1 or (x1, y1) == points[-1]:
            slope = (y1 - y0) / (x1 - x0)
            return max(0.0, y0 + (x - x0) * slope if x <= x1 else y1 + (x - x1) * max(slope, least))
    raise AssertionError("two points at the least")


def rates(record: dict[str, Any], ranks: int, precision: str) -> Rates:
    """Of a record that has them."""
    found = record["ranks"][str(ranks)]
    return Rates(ranks, found["operations"][precision], found["engine"], found["memory"], found["links"])


def calibrated(
    path: Path | None, ranks: int, wanted: Sequence[tuple[int, str]], say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """The record with the rates of so many ranks for each (ZeRO stage, precision) wanted.

    What the file at `path` has is taken, the rest measured and, where there is a path, written there. Raises UserError
    for a file that is no calibration or of another machine, and where nothing can be measured.
    """
    record: dict[str, Any] = {"format": FORMAT, "machine": machine(), "ranks": {}}
    if path is not None and path.exists():
        record = _read(path)
    known = record["ranks"].get(str(ranks), {"operations": {}, "engine": {}, "memory": {}})
    missing = [pair for pair in wanted if f"zero-{pair[0]} {pair[1]}" not in known["engine"]]
    if not missing:
        return record
    precisions = sorted({precision for _, precision in missing})
    say(f"calibrating: {ranks} rank(s) of this machine, {', '.join(precisions)}")
    found = _measured(ranks, missing, precisions)
    merged = {**found, **{key: {**known[key], **found[key]} for key in ("operations", "engine", "memory")}}
    record = {**record, "ranks": {**record["ranks"], str(ranks): merged}}
    if path is not None:
        try:
            write_durably(path, json.dumps(record, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--calibration: {path} cannot be written ({error.strerror}); name another file") from None
    return record


def machine() -> dict[str, Any]:
    """By what a calibration belongs to a machine: processor, cores that may be used, torch."""
    from importlib.metadata import version

    from growth_ds.doctor import cores, processor

    return {"processor": processor(), "cores": cores(), "torch": version("torch")}


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT or not isinstance(record["ranks"], dict):
            raise ValueError
        here = record["machine"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"--calibration: {path} is no calibration of growth_ds; name another file") from None
    if here != machine():
        raise UserError(f"--calibration: {path} was measured on {here}, this is {machine()}; name another file")
    return dict(record)


def _measured(ranks: int, wanted: Sequence[tuple[int, str]], precisions: Sequence[str]) -> dict[str, Any]:
    """What ranks of our own measure. UserError with the last line of the first that fails."""
    from growth_ds.engine.hosts import free_port

    port, *ports = (free_port() for _ in range(1 + len(jobs(wanted))))
    processes = []
    with tempfile.TemporaryDirectory(prefix="growth_ds.") as folder:
        out = Path(folder) / "record"
        store = _small_store(Path(folder))
        job = json.dumps({"wanted": wanted, "precisions": precisions, "out": str(out), "store": store, "ports": ports})
        for rank in range(ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            env = {**os.environ, **{key: str(value) for key, value in place.items()}}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
            command = [sys.executable, "-m", "growth_ds.calibrating", job]
            with (Path(folder) / f"log.{rank}").open("w") as log:
                processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
        try:
            failed = _first_to_fail(processes, LIMIT_S * len(wanted))
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if failed is not None:
            lines = (Path(folder) / f"log.{failed}").read_text(errors="replace").strip().splitlines() or ["no output"]
            raise UserError(f"--hardware here: rank {failed} cannot measure: {lines[-1]}")
        return dict(json.loads(out.read_text()))


def _small_store(folder: Path) -> str:
    """A store for ranks to open: of the package's configuration classes, a few pages of text."""
    from growth_ds.data.prepare import prepare

    source, files = folder / "text.jsonl", sorted((Path(__file__).parent / "config").glob("*.py"))
    source.write_text(
        "\n".join(json.dumps({"id": file.stem, "text": file.read_text("utf-8")}) for file in files), "utf-8"
    )
    prepare([source], folder / "store", vocab_size=512, workers=1, valid=0.2, progress=False)
    return str(folder / "store")


def jobs(wanted: Sequence[tuple[int, str]]) -> list[tuple[int, str, int, Sequence[int]]]:
    """(ZeRO stage, precision, micro-batches of a step, sizes) of the runs whose memory is measured for `wanted`."""
    kinds = [(accumulation, sizes) for sizes in STATES for accumulation in (1, 2)] + [(2, sizes) for sizes in FULL]
    return [(zero, precision, *kind) for zero, precision in wanted for kind in kinds]


def _first_to_fail(processes: Sequence[subprocess.Popen[bytes]], limit: float) -> int | None:
    """Wait for all; None if they end well, else the rank that fails first: the others only say that it is gone.

    UserError after `limit` seconds.
    """
    begun = time.monotonic()
    while True:
        codes = [process.poll() for process in processes]
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if failed is not None or None not in codes:
            return failed
        if time.monotonic() - begun > limit:
            raise UserError(f"--hardware here: not calibrated within {limit:.0f} s; is the machine busy?")
        time.sleep(0.05)
