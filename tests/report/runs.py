"""Synthetic run folders: three stages that grow, or one model, with losses that fall the way real ones do."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from growth_ds.config import Run
from growth_ds.config_file import dump_run
from growth_ds.model import cost

ENTROPY = 6.5
VOCAB = 2000
SIZES = ((2, 64, 128, 64), (4, 64, 256, 64), (4, 128, 512, 128))
"""(layers, hidden, ffn, length) of each stage."""


def make_run(name: str, steps: int, sizes: tuple[tuple[int, int, int, int], ...]) -> Run:
    stages = [
        {
            "model": {
                "layers": layers, "hidden": hidden, "heads": hidden // 32, "ffn": ffn, "vocab_size": VOCAB,
                "positions": 128,
            },
            "length": length,
            "batch": {"global": 16, "micro": 8},
            "steps": steps,
        }
        for layers, hidden, ffn, length in sizes
    ]  # fmt: skip
    return Run.model_validate({"name": name, "stages": stages})


def write_run(
    path: Path,
    name: str = "grown",
    steps: int = 20,
    sizes: tuple[tuple[int, int, int, int], ...] = SIZES,
    seed: int = 0,
    validate_every: int = 10,
    floor: float = 4.6,
) -> Path:
    """A finished run of `steps` steps a stage. The validation loss of a record is `true_loss` of its FLOPs."""
    run, noise = make_run(name, steps, sizes), random.Random(seed)
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(dump_run(run), encoding="utf-8")
    metrics: list[dict[str, Any]] = []
    ledger: list[dict[str, Any]] = [start()]
    tokens, flops, seconds, step, total = 0, 0, 0.0, 0, run.total_steps
    for index, stage in enumerate(run.stages):
        if index:
            ledger += growth(run, index, step, true_loss(flops, floor))
        ledger.append(entered(run, index, step))
        per_step = 16 * cost.train_flops_per_row(stage.model, stage.length, run.data.mask_prob)
        for _ in range(steps):
            step, tokens, flops = step + 1, tokens + 16 * stage.length, flops + per_step
            seconds += 0.01 + per_step / 2e11
            where = {"step": step, "stage": index, "tokens": tokens, "flops": flops, "seconds": round(seconds, 4)}
            loss = true_loss(flops, floor) + noise.gauss(0, 0.08)
            warm = min(1.0, step / (0.1 * total))
            rate = 1e-3 * min(warm, (total - step) / (0.9 * total) + 1e-9)
            metrics.append(
                {**where, "loss": loss, "mlm": loss, "lr": rate, "grad_norm": 1 + 6 / step + abs(noise.gauss(0, 0.2)),
                 "tokens_per_s": 16 * stage.length / 0.02}
            )  # fmt: skip
            if step % validate_every == 0:
                metrics.append({**where, "valid_loss": true_loss(flops, floor), "valid_accuracy": 0.1 + flops * 1e-14})
    end = {"valid_loss": true_loss(flops, floor), "valid_accuracy": 0.1 + flops * 1e-14}
    ledger.append({"event": "finish", **where, **end})
    for file, records in (("metrics.jsonl", metrics), ("ledger.jsonl", ledger)):
        (path / file).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def true_loss(flops: float, floor: float = 4.6) -> float:
    """Nats: from ln(vocabulary) down to `floor`."""
    return floor + (math.log(VOCAB) - floor) / (1 + flops / 6e10) ** 0.6


def start() -> dict[str, Any]:
    return {
        "event": "start", "step": 0, "stage": 0, "store": "5f1c", "ranks": 2, "zero": 2, "precision": "bf16",
        "versions": {"growth_ds": "0.1", "torch": "2.9.0"}, "unigram_entropy": ENTROPY,
    }  # fmt: skip


def entered(run: Run, index: int, step: int) -> dict[str, Any]:
    stage = run.stages[index]
    return {
        "event": "stage", "step": step, "stage": index, "model": stage.model.model_dump(mode="json"),
        "parameters": cost.parameters(stage.model), "length": stage.length, "batch": stage.batch.global_,
    }  # fmt: skip


def growth(run: Run, index: int, step: int, loss: float) -> list[dict[str, Any]]:
    """The growth into stage `index`, as the coordinator writes it, and the probe 5 steps later."""
    before, after = run.stages[index - 1], run.stages[index]
    old, new = before.model.sizes(), after.model.sizes()
    axes = [
        {
            "axis": axis, "old": old[axis], "new": new[axis], "recipe": "tile", "exact": axis != "layer",
            "reason": "the layers run in another composition" if axis == "layer" else None,
        }
        for axis in ("layer", "hidden", "head", "ffn")
        if old[axis] != new[axis]
    ]  # fmt: skip
    exact = all(axis["exact"] for axis in axes)
    record = {
        "event": "growth", "step": step, "stage": index, "axes": axes, "length": [before.length, after.length],
        "exact": exact, "digest": "ab" * 32, "moments": "carry", "loss_before": loss,
        "loss_after": loss + (0.0 if exact else 0.125), "accuracy_before": 0.125,
        "accuracy_after": 0.125 if exact else 0.0625, "seconds": 0.5,
    }  # fmt: skip
    lag = {"event": "lag", "step": step + 5, "stage": index, "loss": loss - 0.05, "accuracy": 0.13, "after_steps": 5}
    return [record, lag]
