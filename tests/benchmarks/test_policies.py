"""The table of policies beside a sweep."""

from __future__ import annotations

from benchmarks.policies import summary


def row(method: str, step: int, loss: float, *decisions: str) -> dict[str, object]:
    record = {"method": method, "grown_at_step": step, "share_of_flops": step / 100, "final_loss": loss}
    return {**record, "decisions": [{"policy": each} for each in decisions]}


def test_policies_are_measured_against_the_best_fixed_switch() -> None:
    sweep = [row("at-10", 10, 2.0), row("at-20", 20, 1.5)]
    rows = [*sweep, row("slope", 15, 1.25, "slope"), row("slope", 25, 1.75, "slope")]
    found = {each["method"]: each for each in summary(rows)}
    assert [found[name]["nats_above_the_best_switch"] for name in ("at-10", "at-20", "slope")] == [0.5, 0.0, 0.0]
    assert found["slope"]["grown_at_step"] == 20
    assert [each["policy"] for each in found.values()] == [False, False, True]


def test_without_a_sweep_there_is_nothing_to_be_measured_against() -> None:
    assert summary([row("slope", 15, 1.25, "slope")])[0]["nats_above_the_best_switch"] is None
