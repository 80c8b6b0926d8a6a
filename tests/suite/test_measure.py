"""What a run took to reach a loss: against the curve that the synthetic runs follow."""

from __future__ import annotations

import pytest

from growth_ds.run_folder import RunFolder
from growth_ds.suite.measure import failed_record, finished, record_of, summaries
from growth_ds.suite.tables import NEVER, past_baselines, rows_of
from tests.report.runs import SIZES, write_run


def ended(path):
    """With the checkpoint of its last step."""
    folder = RunFolder(path)
    (end,) = [record for record in folder.records(folder.ledger) if record["event"] == "finish"]
    folder.checkpoint_path(end["step"], end["stage"]).mkdir(parents=True)
    return folder


def runs(tmp_path, floor):
    scratch = write_run(tmp_path / "scratch", steps=100, sizes=SIZES[-1:], validate_every=2, floor=4.6)
    grown = write_run(tmp_path / "grown", steps=60, validate_every=2, floor=floor)
    found = [finished(ended(path)) for path in (grown, scratch)]
    assert all(found)
    return found


def flops_at(loss, floor):
    """Inverse of the curve the synthetic runs follow."""
    from tests.report.runs import VOCAB, math

    return 6e10 * (((math.log(VOCAB) - floor) / (loss - floor)) ** (1 / 0.6) - 1)


def test_the_price_of_the_from_scratch_loss(tmp_path):
    grown, scratch = runs(tmp_path, floor=4.3)
    record = record_of("grown", 1, 0.6, grown, scratch)
    flops = flops_at(scratch.final_loss, 4.3)
    assert record["flops_ratio"] == pytest.approx(flops / scratch.flops, rel=5e-3)
    step = next(each for each in grown.curve.train if each["flops"] >= flops)
    grew = sum(seconds for at, seconds in grown.growth_seconds if at < step["step"])
    assert grew > 0
    whole = scratch.curve.train[-1]["seconds"]
    assert record["seconds_ratio"] == pytest.approx((step["seconds"] + grew) / whole, rel=0.02)
    assert record["tokens_ratio"] == pytest.approx(step["tokens"] / scratch.curve.train[-1]["tokens"], rel=0.02)
    assert record["final_loss_scratch"] == scratch.final_loss
    assert record["flops"] == grown.flops


def test_a_loss_that_is_never_reached_has_no_price(tmp_path):
    grown, scratch = runs(tmp_path, floor=6.0)
    record = record_of("grown", 1, 0.6, grown, scratch)
    assert (record["flops_ratio"], record["seconds_ratio"], record["tokens_ratio"]) == (None, None, None)
    assert record["final_loss"] > record["final_loss_scratch"]


def test_from_scratch_costs_itself(tmp_path):
    _, scratch = runs(tmp_path, floor=4.3)
    record = record_of("scratch", 1, 1.0, scratch, scratch)
    assert (record["flops_ratio"], record["seconds_ratio"], record["tokens_ratio"]) == (1.0, 1.0, 1.0)


def test_a_run_that_has_not_ended_is_not_finished(tmp_path, keep_lines):
    path = write_run(tmp_path / "run", steps=10)
    assert finished(RunFolder(path)) is None, "its last checkpoint is not there"
    assert finished(ended(path)) is not None
    keep_lines(path / "ledger.jsonl", lambda line: '"finish"' not in line)
    assert finished(RunFolder(path)) is None
    assert finished(RunFolder(tmp_path / "nothing")) is None


def rows(*ratios, name="m", final=5.0):
    return [
        {"method": name, "seed": seed, "budget": 0.6, "flops_ratio": ratio, "seconds_ratio": ratio, "final_loss": final,
         "final_loss_scratch": 5.1}
        for seed, ratio in enumerate(ratios)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("ratios", "flops"),
    [((0.5, 0.6, 0.7), (0.6, 0.5, 0.7)), ((0.5, None, 0.6), (0.6, 0.5, float("inf"))), ((None, None, 0.4), None)],
)
def test_a_seed_that_never_reaches_the_loss_counts_as_the_dearest(ratios, flops):
    (found,) = summaries(rows(*ratios))
    assert found.flops == flops
    assert found.reached == sum(ratio is not None for ratio in ratios)
    assert found.difference == pytest.approx((-0.1, -0.1, -0.1))


def test_the_table_says_what_was_not_reached(tmp_path):
    found = rows_of([*rows(0.5, 0.55, None), *rows(None, name="n"), failed_record("broken", 1, 0.6, "exit code 1")])
    assert found[0][2] == "0.550 [0.500, never]"
    assert found[0][-1] == "2 of 3"
    assert found[1][2] == NEVER
    assert found[2][4] == "–"  # noqa: RUF001


def test_it_says_whether_from_scratch_is_past_the_baselines():
    assert "ats, past both" in past_baselines(rows(0.5), {"unigram": 6.0, "bigram": 5.2})
    assert "NOT past" in past_baselines(rows(0.5), {"unigram": 6.0, "bigram": 5.05})
