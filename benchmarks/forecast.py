"""What `growth_ds.forecast` says of runs that others have published: `python benchmarks/forecast.py --json OUT`.

Every point is BERT-Large. Its software, batch and network are what its source says; where it names a time to a quality,
the samples until then are its own too. Nothing is fitted: the forecast's four shares are the same for every point, for
three generations of GPUs, for one GPU and for thousands. Seconds are compared, so that 20 % too long and 20 % too short
are about alike; `error` is predicted over published, less 1.

Sources: DeepSpeed's tutorial "Pre-training Bing BERT" and its post of 2020-05-28 (batches, samples of both phases,
DGX-2 nodes of 16 V100 with 8 x 100 Gb/s); NVIDIA's DeepLearningExamples, PyTorch BERT (A100-80GB: DGX with 8 x 200
Gb/s; its rows of "512" come in bins of 64 tokens); MLPerf Training v4.0 results of NVIDIA (DGX H100, 8 x 400 Gb/s; FP8;
padding is removed, so a row counts its tokens). What each program keeps out of memory is a fact about it (`Software`).

The shares were set beforehand. Two things were added to the roofline after a first look by hand, for all points: the
operands of products go through memory too, and 8-bit operands are cast by kernels; without them H100 came out 1.8 times
too fast, V100 and A100 10 % too fast. `--json` also has the mean error under other shares.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import about, write_json
from growth_ds import forecast as roofline
from growth_ds.config import Model
from growth_ds.forecast import Software, forecast
from growth_ds.hardware import GPUS, Cluster, bandwidth
from growth_ds.model import cost

LARGE = Model(layers=24, hidden=1024, heads=16, ffn=4096, vocab_size=30528, positions=512, nsp=True)
AVERAGE = 256
"""Tokens of a row of phase 2 without padding: MLPerf's data, Wikipedia in rows of up to 512, packs to half."""
BINNED = AVERAGE + 32
"""The same where rows are padded to the next multiple of 64."""
SHARES = ("MATRIX", "MEMORY", "LINKS")
DEEPSPEED = Software(fused=True, attention="fused")
NVIDIA = Software(fused=False, attention="eager")
MLPERF = Software(fused=True, attention="flash", fp8=True)


@dataclass(frozen=True)
class Phase:
    """Rows of one length, in steps of one size."""

    length: int
    """Tokens that are computed."""
    predicted: int
    micro: float
    """Rows of a micro-batch on one GPU."""
    accumulation: int
    rows: float
    """Rows that are trained on; 1: a rate is published, not a time."""


@dataclass(frozen=True)
class Point:
    """One published number."""

    name: str
    gpu: str
    nodes: int
    per_node: int
    interconnect: str
    software: Software
    phases: tuple[Phase, ...]
    seconds: float
    """Published: for all rows of the phases."""
    sharded: bool = False
    """Whether the optimizer's state is divided among the ranks."""

    def predicted(self) -> float:
        """Seconds for the same."""
        network = bandwidth(self.interconnect, self.per_node)
        on = Cluster(self.gpu, GPUS[self.gpu], self.nodes, self.per_node, network)
        total = 0.0
        for phase in self.phases:
            step = forecast(
                LARGE, phase.length, phase.micro, phase.accumulation, flops(phase), on, predicted=phase.predicted,
                zero=int(self.sharded), optimizer="lamb", precision="fp16", software=self.software,
            )  # fmt: skip
            total += phase.rows / (phase.micro * phase.accumulation * on.ranks) * step.seconds
        return total


def flops(phase: Phase) -> float:
    """Forward and backward of a row, its last layer on all positions, which is how these programs compute it."""
    ours = cost.train_flops_per_row(LARGE, phase.length, phase.predicted / phase.length, nsp=True)
    left_out = phase.length - phase.predicted - 1
    products = 2 * LARGE.hidden * (2 * LARGE.hidden + 2 * LARGE.ffn) + 4 * phase.length * LARGE.hidden
    return ours + 3 * left_out * products


def deepspeed(nodes: int, minutes: float) -> Point:
    """Both phases on DGX-2 nodes: 403 M rows of 128, 64 K a step, and 18 to 22 M of 512, 32 K a step."""
    ranks = 16 * nodes
    phases = (
        Phase(128, 20, 64, max(1, 65536 // (64 * ranks)), 403e6),
        Phase(512, 80, 8, max(1, 32768 // (8 * ranks)), 20e6),
    )
    name = f"DeepSpeed, {ranks:,} V100, time to SQuAD 90.5"
    return Point(name, "v100", nodes, 16, "8x100g", DEEPSPEED, phases, 60 * minutes)


def one(name: str, gpu: str, software: Software, phase: Phase, published: float, gpus: int = 1) -> Point:
    """Rows a second in one node: the seconds of one row are compared."""
    return Point(f"{name}, {gpus} {gpu.upper()}", gpu, 1, gpus, "8x200g", software, (phase,), 1 / published)


def mlperf(nodes: int, rows: int, published: float) -> Point:
    """Rows a second under a global batch of so many rows."""
    ranks = 8 * nodes
    phases = (Phase(AVERAGE, 38, rows / ranks, 1, 1.0),)
    return Point(
        f"MLPerf v4.0, {ranks:,} H100", "h100", nodes, 8, "8x400g", MLPERF, phases, 1 / published, sharded=True
    )


def points() -> list[Point]:
    """All published points that are compared."""
    recipe = (
        Phase(128, 20, 256, 1, 7038 * 65536),
        Phase(BINNED, 45, 128, 1, 1563 * 32768),
    )  # NVIDIA's, on 256 GPUs: 65,536 and 32,768 rows a step
    short, long = "rows of 128", "rows of up to 512"
    return [
        one(f"DeepSpeed, {short}", "v100", DEEPSPEED, Phase(128, 20, 64, 64, 1.0), 272),
        one("DeepSpeed, rows of 512", "v100", DEEPSPEED, Phase(512, 80, 8, 256, 1.0), 52),
        *(deepspeed(nodes, minutes) for nodes, minutes in ((1, 1993), (4, 521), (16, 144), (64, 44))),
        one(f"NVIDIA, {short}", "v100", NVIDIA, Phase(128, 20, 64, 128, 1.0), 224),
        one(f"NVIDIA, {long}", "v100", NVIDIA, Phase(BINNED, 45, 16, 256, 1.0), 75),
        one(f"NVIDIA, {short}", "a100", NVIDIA, Phase(128, 20, 256, 32, 1.0), 580),
        one(f"NVIDIA, {long}", "a100", NVIDIA, Phase(BINNED, 45, 128, 32, 1.0), 210),
        one(f"NVIDIA, {short}", "a100", NVIDIA, Phase(128, 20, 256, 32, 1.0), 4591, gpus=8),
        one(f"NVIDIA, {long}", "a100", NVIDIA, Phase(BINNED, 45, 128, 32, 1.0), 1657, gpus=8),
        Point("NVIDIA, 256 A100, both phases", "a100", 32, 8, "8x200g", NVIDIA, recipe, 1.2 * 3600),
        mlperf(1, 768, 7760),
        mlperf(8, 4608, 53200),
        mlperf(434, 13888, 800_000),
    ]


def compare() -> list[dict[str, Any]]:
    """Every point: seconds published and predicted, and the error."""
    found = [(point, point.predicted()) for point in points()]
    return [
        {
            "point": point.name,
            "published_s": point.seconds,
            "predicted_s": seconds,
            "error": seconds / point.seconds - 1,
        }
        for point, seconds in found
    ]


def mean_error(rows: list[dict[str, Any]]) -> float:
    """Mean of the errors' sizes."""
    return float(sum(abs(row["error"]) for row in rows) / len(rows))


def sensitivity() -> dict[str, float]:
    """Mean error with one share at a time a tenth lower and higher."""
    found = {}
    for share in SHARES:
        given = getattr(roofline, share)
        for value in (round(given - 0.1, 3), round(given + 0.1, 3)):
            setattr(roofline, share, value)
            found[f"{share} {value}"] = mean_error(compare())
        setattr(roofline, share, given)
    return found


def main() -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description="Forecast beside published runs of BERT-Large.")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = compare()
    width = max(len(row["point"]) for row in rows)
    print(f"{'point':{width}}  {'published':>12}  {'predicted':>12}  {'error':>6}")
    for row in rows:
        print(f"{row['point']:{width}}  {row['published_s']:12.4g}  {row['predicted_s']:12.4g}  {row['error']:+6.1%}")
    worst = max(rows, key=lambda row: abs(row["error"]))
    print("seconds; of one row where a rate was published")
    print(f"mean error {mean_error(rows):.1%}, worst {worst['error']:+.1%} ({worst['point']})")
    others = sensitivity()
    print("under other shares: " + ", ".join(f"{share} {error:.1%}" for share, error in others.items()))
    if options.json:
        shares = {key: getattr(roofline, key) for key in (*SHARES, "LAUNCH_S", "HOP_S")}
        record = {"shares": shares, "mean_error": mean_error(rows), "mean_error_under": others, "points": rows}
        write_json(options.json, {"about": about(), **record})


if __name__ == "__main__":
    main()
