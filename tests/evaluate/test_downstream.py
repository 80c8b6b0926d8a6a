"""`growth-ds evaluate RUN --task`: the table, what it goes on with, ranks, refusals."""

from __future__ import annotations

import json
import os

import pytest

from growth_ds import downstream
from growth_ds.config import Model
from tests.checkpoints import write_random
from tests.cli import growth_ds
from tests.evaluate.folders import random_bert, separable
from tests.ranks import forked

HOW = ["--set", "epochs=1", "--set", "length=16", "--set", "limit=32"]


@pytest.fixture
def run(monkeypatch, capsys):
    return lambda *argv: growth_ds(monkeypatch, capsys, "evaluate", *argv)


@pytest.fixture(scope="module")
def bert(tmp_path_factory, store):
    return random_bert(tmp_path_factory.mktemp("downstream") / "bert", store)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return separable(tmp_path_factory.mktemp("toy") / "toy.tsv")


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_the_table_of_a_checkpoint_goes_on_where_it_stopped(run, toy, store, tmp_path, monkeypatch, norm):
    sizes = Model(norm=norm, layers=1, hidden=12, heads=3, ffn=20, vocab_size=120, positions=16)
    write_random(tmp_path / "run", sizes, tokenizer=store / "tokenizer")
    first = run(tmp_path / "run", "--task", toy, "--seeds", 2, *HOW)
    assert first.code == 0, first.err
    assert not {"RANK", "WORLD_SIZE"} & os.environ.keys(), "what this process starts later would take itself for a rank"
    assert first.out.splitlines()[0].split() == ["task", "metric", "median", "min", "max", "baseline", "seeds"]
    out = tmp_path / "run.tasks.json"
    before = json.loads(out.read_text())["tasks"][str(toy)]["scores"]
    calls = []
    tune = downstream.classify
    monkeypatch.setattr(downstream, "classify", lambda *given: calls.append(given[-1]) or tune(*given))
    again = run(tmp_path / "run", "--task", toy, "--seeds", 3, *HOW)
    assert again.code == 0, again.err
    after = json.loads(out.read_text())["tasks"][str(toy)]["scores"]
    assert calls == [2]
    assert {seed: after[seed] for seed in "01"} == before
    assert "of another model, data or --set" in run(tmp_path / "run", "--task", toy, "--seeds", 2).err


def test_two_ranks_write_what_one_writes(run, bert, toy, tmp_path):
    argv = [str(bert), "--task", str(toy), "--seeds", "3", *HOW]
    codes = forked().run(
        ["growth_ds", "evaluate", *argv, "--out", str(tmp_path / "two.json")], 2, tmp_path / "log", 120
    )
    printed = (tmp_path / "log.0").read_text()
    assert codes == [0, 0], printed + (tmp_path / "log.1").read_text()
    alone = run(*argv, "--out", tmp_path / "one.json")
    assert alone.code == 0, alone.err
    assert printed.endswith(alone.out)
    assert json.loads((tmp_path / "two.json").read_text()) == json.loads((tmp_path / "one.json").read_text())


def test_refusals(run, bert, toy, store, tmp_path):
    def refused(*argv):
        result = run(*argv, "--out", tmp_path / "out.json")
        assert result.code == 2
        assert result.err.count("\n") == 1
        assert not (tmp_path / "out.json").exists()
        return result.err

    assert "'sst3' is no task and no file; there are cola," in refused(bert, "--task", "sst3")
    assert "gluebenchmark" in refused(bert, "--task", "cola")
    assert "squad needs the folder" in refused(bert, "--task", "squad")
    assert "epoch: unknown key; did you mean 'epochs'?" in refused(bert, "--task", toy, "--set", "epoch=2")
    assert "give either" in refused(bert, "--task", toy, "--store", store)
    data = tmp_path / "SST-2"
    data.mkdir()
    for name in ("train.tsv", "dev.tsv"):
        (data / name).write_text("sentence\tlabel\nfine\t1\nbad\n")
    assert "SST-2/train.tsv:3: has 1 columns" in refused(bert, "--task", "sst2", "--data", tmp_path)
    assert "seed 0: the fine-tuned model gives no numbers; lower --set lr" in refused(
        bert, "--task", toy, "--set", "lr=1.0e+30", "--set", "epochs=1"
    )
    bare = write_random(tmp_path / "bare").path
    assert "bare: has no tokenizer" in refused(bare, "--task", toy)
    assert "absent: no such folder" in refused(tmp_path / "absent", "--task", toy)
