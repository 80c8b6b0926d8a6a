from __future__ import annotations

from pathlib import Path

import pytest

from growth_ds.errors import UserError
from growth_ds.model import cost
from growth_ds.report.rows import Change, growth_rows, metrics, stage_rows, summary
from growth_ds.run_folder import RunFolder
from tests.report.runs import ENTROPY, SIZES, make_run, true_loss, write_run

RUN = make_run("grown", 20, SIZES)
STAGE_FLOPS = [20 * 16 * cost.train_flops_per_row(stage.model, stage.length, 0.15) for stage in RUN.stages]


def test_summary_is_the_last_state(grown: RunFolder) -> None:
    found = summary(grown)
    assert (found.steps, found.planned_steps, found.finished) == (60, 60, True)
    assert found.tokens == 20 * 16 * (64 + 64 + 128)
    assert found.flops == sum(STAGE_FLOPS)
    assert found.parameters == cost.parameters(RUN.stages[-1].model)
    assert found.valid_loss == pytest.approx(true_loss(sum(STAGE_FLOPS)))
    assert found.valid_accuracy == pytest.approx(0.1 + sum(STAGE_FLOPS) * 1e-14)
    assert (found.unigram_entropy, found.store) == (ENTROPY, "5f1c")
    assert found.seconds == pytest.approx(60 * 0.01 + sum(STAGE_FLOPS) / 2e11, abs=1e-3)


def test_stages_add_up_to_the_run(grown: RunFolder) -> None:
    rows = stage_rows(grown)
    assert [row.flops for row in rows] == STAGE_FLOPS
    assert [row.tokens for row in rows] == [20480, 20480, 40960]
    assert [(row.index, row.steps, row.length, row.batch) for row in rows] == [
        (0, 20, 64, 16), (1, 20, 64, 16), (2, 20, 128, 16)
    ]  # fmt: skip
    assert sum(row.share for row in rows) == pytest.approx(1.0)
    assert rows[0].share == pytest.approx(STAGE_FLOPS[0] / sum(STAGE_FLOPS))
    assert [row.model for row in rows] == [stage.model for stage in RUN.stages]
    assert rows[1].valid_loss == pytest.approx(true_loss(sum(STAGE_FLOPS[:2])))


def test_growths_with_their_lag(grown: RunFolder) -> None:
    first, second = growth_rows(grown)
    assert first.changes == (Change("layer", 2, 4, "tile"), Change("ffn", 128, 256, "tile"))
    assert not first.exact
    assert first.reasons == ("layer: the layers run in another composition",)
    assert first.delta == pytest.approx(0.125)
    assert (first.lag_steps, first.lag_loss) == (5, pytest.approx(first.loss_before - 0.05))
    assert second.exact
    assert second.reasons == ()
    assert second.delta == 0
    assert second.changes[-1] == Change("length", 64, 128)


def test_the_final_validation_may_stand_in_the_ledger_alone(tmp_path: Path) -> None:
    folder = RunFolder(write_run(tmp_path / "run", validate_every=50))
    _, checked = metrics(folder)
    assert [record["step"] for record in checked] == [50, 60]
    assert summary(folder).valid_loss == pytest.approx(true_loss(sum(STAGE_FLOPS)))
    assert stage_rows(folder)[-1].valid_loss == summary(folder).valid_loss


def test_ledger_may_be_missing(tmp_path: Path) -> None:
    """What the ledger says of a stage, the configuration says too."""
    whole, bare = RunFolder(write_run(tmp_path / "a")), RunFolder(write_run(tmp_path / "b"))
    bare.ledger.unlink()
    assert stage_rows(bare) == stage_rows(whole)
    assert growth_rows(bare) == []
    assert summary(bare).unigram_entropy is None


def test_unfinished_run(tmp_path: Path, keep_lines) -> None:
    folder = RunFolder(write_run(tmp_path / "run"))
    keep_lines(folder.metrics, lambda line: '"stage": 0' in line and "valid_loss" not in line)
    keep_lines(folder.ledger, lambda line: '"stage": 0' in line)
    found = summary(folder)
    assert (found.steps, found.finished, found.valid_loss) == (20, False, None)
    assert found.parameters == cost.parameters(RUN.stages[0].model)
    assert [row.share for row in stage_rows(folder)] == [1.0]


@pytest.mark.parametrize("text", ["", '{"step": 1, "stage"', '{"step": 0, "stage": 0, "valid_loss": 7.0}\n'])
def test_no_training_step_is_the_users_error(tmp_path: Path, text: str) -> None:
    folder = RunFolder(write_run(tmp_path / "run"))
    folder.metrics.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"metrics\.jsonl: no training steps"):
        summary(folder)


def test_missing_files_are_the_users_error(tmp_path: Path) -> None:
    folder = RunFolder(write_run(tmp_path / "run"))
    folder.metrics.unlink()
    with pytest.raises(UserError, match="no training steps"):
        summary(folder)
    with pytest.raises(UserError, match="not a run folder"):
        summary(RunFolder(tmp_path / "nowhere"))
