"""The driver of a suite: which methods are run with all seeds."""

from __future__ import annotations

from benchmarks.suite import best


def row(method: str, ratio: float | None, loss: float | None) -> dict[str, object]:
    return {"method": method, "flops_ratio": ratio, "final_loss": loss}


def test_the_best_need_the_fewest_flops_and_failures_come_last() -> None:
    rows = [
        row("slow", 0.9, 1.0),
        row("fast", 0.5, 1.1),
        row("never", None, 1.2),
        row("nearly", None, 1.15),
        row("failed", None, None),
    ]
    methods = ["failed", "never", "slow", "nearly", "fast"]
    assert best(rows, methods, 5) == ["fast", "slow", "nearly", "never", "failed"]
    assert best(rows, methods, 2) == ["fast", "slow"]


def test_the_median_over_seeds_counts() -> None:
    rows = [row("a", 0.5, 1.0), row("a", 0.9, 1.0), row("a", 0.9, 1.0), row("b", 0.7, 1.0)]
    assert best(rows, ["a", "b"], 1) == ["b"]
