"""A small suite, as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MODEL = {"layers": 4, "hidden": 32, "heads": 2, "ffn": 64, "positions": 32}


def tree(store: Path | str = "store", **changes: Any) -> dict[str, Any]:
    """From scratch for 30 steps, and one method that stacks; keys of `changes` replace the suite's."""
    return {
        "run": {
            "data": {"store": str(store)},
            "engine": {"precision": "fp32", "zero": 1},
            "optim": {"lr": 3e-3, "warmup": 0.1},
            "evaluation": {"tokens": 512, "every": 5},
            "checkpoint": {"every": 5},
            "log": {"tensorboard": False},
        },
        "scratch": {"model": MODEL, "length": 32, "batch": {"global": 8, "micro": 4}, "steps": 30},
        "seeds": [1, 2],
        "budget": 0.8,
        "methods": {
            "stack": {
                "summary": "half the layers, then all",
                "stages": [
                    {"model": {**MODEL, "layers": 2}, "share": 0.25},
                    {"share": 0.75, "grow": {"recipe": "stack"}},
                ],
            }
        },
    } | changes


def write(path: Path, **changes: Any) -> Path:
    """The suite as YAML."""
    path.write_text(yaml.safe_dump(tree(**changes), sort_keys=False), encoding="utf-8")
    return path
