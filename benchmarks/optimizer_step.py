"""Milliseconds of DeepSpeed's whole optimizer step around our optimizers: `python benchmarks/optimizer_step.py`.

A module of many tensors whose forward and backward are next to nothing, one process, bf16: what is timed is
`engine.step` of DeepSpeed (norm, scaling, optimizer, copy to bf16, zeroing), with the compiled ops and without, in
turns. In that of `reference` the gradient is scaled in a pass of its own and torch's fused AdamW is taken.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("DS_ACCELERATOR", "cpu")
from growth_ds.engine import distributed
from growth_ds.engine.zero import ZeroEngine

WAYS = {"compiled": "auto", "reference": "torch"}


class Batch:
    def counts(self) -> dict[str, int]:
        return {"sum": 1}


class Tensors(nn.Module):
    """As many numbers as asked for, in tensors of a million."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.all = nn.ParameterList(torch.randn(1000, 1000) * 0.02 for _ in range(numel // 10**6))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"sum": torch.stack([each.sum() for each in self.all]).sum()}


def engine(numel: int, stage: int, name: str) -> ZeroEngine:
    def groups(module: nn.Module) -> list[dict[str, Any]]:
        return [{"params": list(module.parameters()), "weight_decay": 0.01, "name": "decay"}]

    return ZeroEngine(
        Tensors(numel),
        groups,
        zero={"stage": stage},
        precision="bf16",
        micro_batch=1,
        accumulation=1,
        clip=1.0,
        optimizer={"betas": (0.9, 0.98), "eps": 1e-6, "name": name},
    )


def measure(numel: int, stage: int, name: str, repeats: int) -> dict[str, float]:
    """Median milliseconds by way."""
    made, found = engine(numel, stage, name), {way: [] for way in WAYS}
    inner, times = made._ds.step, []

    def step() -> None:
        started = time.perf_counter()
        inner()
        times.append((time.perf_counter() - started) * 1e3)

    made._ds.step = step
    for turn in range(2 * repeats + 2):
        way = list(WAYS)[turn % 2]
        os.environ["GROWTH_DS_OPS"] = WAYS[way]
        made.step([Batch()], 1e-3)
        if turn > 1:
            found[way].append(times[-1])
    made.close()
    return {way: round(statistics.median(each), 1) for way, each in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--millions", type=int, nargs="*", default=[11, 34])
    parser.add_argument("--stages", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--optimizers", nargs="*", default=["adamw", "lamb"])
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    distributed.init_distributed()
    for name in args.optimizers:
        for millions in args.millions:
            for stage in args.stages:
                print(
                    name,
                    f"{millions}M",
                    f"ZeRO-{stage}",
                    measure(millions * 10**6, stage, name, args.repeats),
                    flush=True,
                )
    distributed.shutdown()


if __name__ == "__main__":
    main()
