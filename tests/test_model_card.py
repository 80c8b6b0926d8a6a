"""The model card of an export: every figure of it is in the run's folder, and a bare checkpoint's says less."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from growth_ds.offline import export_checkpoint, find_checkpoint
from growth_ds.run_folder import RunFolder
from tests.checkpoints import TINY, small_tokenizer, write_random
from tests.cli import growth_ds
from tests.report.runs import write_run


@pytest.fixture
def run_folder(tmp_path: Path) -> RunFolder:
    """A run of three stages with checkpoints at the end of the second stage, right after the growth, and at the end."""
    folder = RunFolder(write_run(tmp_path / "grown"))
    run = folder.run()
    for step, stage in ((40, 1), (40, 2), (60, 2)):
        facts = {"step": step, "stage": stage, "run": run.digest(), "name": run.name, "precision": "bf16", "ranks": 2}
        write_random(folder.checkpoint_path(step, stage), run.stages[stage].model, moments=False, facts=facts)
    folder.latest.write_text("step-00000060-stage-2\n")
    return folder


def card(source: Path, out: Path) -> str:
    export_checkpoint(find_checkpoint(source), out, force=True)
    return (out / "README.md").read_text(encoding="utf-8")


def front(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_the_card_of_a_run_tells_its_plan_data_losses_growths_and_versions(run_folder, tmp_path):
    text = card(run_folder.path, tmp_path / "out")
    assert front(text) == {
        "library_name": "transformers",
        "pipeline_tag": "fill-mask",
        "tags": ["bert", "fill-mask", "growth_ds"],
    }
    assert "license" not in text.split("## Load")[0]
    plan = re.findall(r"^\| \d \| .*", text, re.MULTILINE)
    assert plan == [
        "| 0 | 2 | 64 | 2 | 128 | 64 | 16 | 20 |  |",
        "| 1 | 4 | 64 | 2 | 256 | 64 | 16 | 20 | recipe: tile |",
        "| 2 | 4 | 128 | 4 | 512 | 128 | 16 | 20 | recipe: tile |",
    ]
    assert "store: `5f1c`" in text
    metrics = run_folder.records(run_folder.metrics)
    loss = [line for line in metrics if "loss" in line][-1]
    finish = run_folder.records(run_folder.ledger)[-1]
    assert f"| training loss | {loss['loss']:.4f} nats | 60 |" in text
    assert f"| validation loss | {finish['valid_loss']:.4f} nats | 60 |" in text
    assert "6.5000 nats" in text
    growths = [line for line in run_folder.records(run_folder.ledger) if line.get("event") == "growth"]
    for line in growths:
        assert f"{line['loss_before']:.4f} -> {line['loss_after']:.4f} | `abababababab` |" in text
    assert "layer 2 -> 4 (tile), ffn 128 -> 256 (tile) | not exact" in text
    assert "growth_ds 0.1, torch 2.9.0" in text
    assert run_folder.run().digest() in text
    assert str(tmp_path) not in text, "no path of this machine"
    assert card(run_folder.path, tmp_path / "out") == text


def test_the_card_of_an_earlier_checkpoint_does_not_know_what_came_later(run_folder, tmp_path):
    before = card(run_folder.checkpoint_path(40, 1), tmp_path / "before")
    after = card(run_folder.checkpoint_path(40, 2), tmp_path / "after")
    loss = [line for line in run_folder.records(run_folder.metrics) if line["step"] == 40 and "loss" in line][-1]
    for text in (before, after):
        assert f"| training loss | {loss['loss']:.4f} nats | 40 |" in text
        assert "| 60 |" not in text
    assert before.count("`abababababab`") == 1
    assert after.count("`abababababab`") == 2


def test_a_checkpoint_elsewhere_says_less(run_folder, tmp_path):
    (tmp_path / "copy" / "checkpoints").mkdir(parents=True)
    run_folder.checkpoint_path(60, 2).rename(tmp_path / "copy" / "checkpoints" / "step-00000060-stage-2")
    text = card(tmp_path / "copy" / "checkpoints" / "step-00000060-stage-2", tmp_path / "out")
    assert "# `grown`" in text
    assert "| step | 60 |" in text
    assert "## Plan" not in text
    assert "## Versions" not in text
    (tmp_path / "copy" / "config.yaml").write_text(run_folder.config.read_text().replace("seed: 42", "seed: 43"))
    other = card(tmp_path / "copy" / "checkpoints" / "step-00000060-stage-2", tmp_path / "out")
    assert other == text, "a folder of another run says nothing about this one"


def test_damaged_records_leave_the_rest(run_folder, tmp_path, capsys):
    lines = run_folder.ledger.read_text().splitlines()
    odd = [line.replace('"loss_before"', '"lost"') for line in lines]
    run_folder.ledger.write_text("\n".join(odd) + "\n")
    text = card(run_folder.path, tmp_path / "out")
    assert "## Plan" not in text
    assert "| step | 60 |" in text
    assert capsys.readouterr().err.count("the model card says less") == 1


def test_a_bare_checkpoint_has_its_sizes_and_how_to_load_it(tmp_path):
    axis = {"axis": "layer", "old": 1, "new": 2, "recipe": "stack"}
    facts = {
        "imported_from": "bert|`small`\n# x", "probe": {"loss": 2.5, "accuracy": 0.5},
        "grown": [{"axes": [axis], "exact": False, "digest": "cd" * 32}],
    }  # fmt: skip
    tokenizer = small_tokenizer(tmp_path / "tokenizer")
    write_random(tmp_path / "ours", TINY, moments=False, facts=facts, tokenizer=tokenizer)
    text = card(tmp_path / "ours", tmp_path / "out")
    assert "BertForPreTraining: 2 layers of 12, 3 heads of 4, ffn 20, 40 pieces, 16 positions" in text
    assert "from `bert small # x`." in text
    assert "- layer 1 -> 2 (stack), not exact, plan `cdcdcdcdcdcd`" in text
    assert "| loss on its probe batch | 2.5000 nats |" in text
    assert "AutoTokenizer" in text
    saved = sum(_parameters(tmp_path / "out"))
    assert f"{saved:,} parameters" in text


def _parameters(folder: Path) -> list[int]:
    from safetensors.torch import load_file

    return [tensor.numel() for tensor in load_file(folder / "model.safetensors").values()]


def test_the_code_of_a_card_opens_the_folder(tmp_path, monkeypatch):
    write_random(tmp_path / "ours", TINY.model_copy(update={"nsp": False}), moments=False)
    text = card(tmp_path / "ours", tmp_path / "out")
    code = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path / "out")
    found: dict = {}
    exec(code, found)
    assert type(found["model"]).__name__ == "BertForMaskedLM"
    assert f"{sum(p.numel() for p in found['model'].parameters()):,} parameters" in text


def test_the_card_of_experts_names_their_loader(tmp_path):
    model = TINY.model_copy(update={"experts": 2})
    write_random(tmp_path / "ours", model, moments=False)
    text = card(tmp_path / "ours", tmp_path / "out")
    assert front(text)["library_name"] == "pytorch"
    assert "from expert_bert import load" in text
    assert "2 experts of ffn 20" in text


def test_a_card_that_somebody_has_edited_is_not_replaced_without_force(tmp_path, monkeypatch, capsys):
    write_random(tmp_path / "ours", TINY, moments=False)
    argv = ("export", tmp_path / "ours", "--out", tmp_path / "out")
    assert growth_ds(monkeypatch, capsys, *argv).code == 0
    (tmp_path / "out" / "README.md").write_text("license: mine\n")
    assert growth_ds(monkeypatch, capsys, *argv).code == 2
    assert (tmp_path / "out" / "README.md").read_text() == "license: mine\n"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "bert"
