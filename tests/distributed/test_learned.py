"""cases_learned.py on two ranks; and runs that are killed while an operator learns, or after it has."""

from __future__ import annotations

import json

import pytest

from growth_ds.config import Run
from tests.distributed.corpus import own_folder, small_run
from tests.distributed.growing import noted
from tests.engine.distributed_cases import case_names, check, run_cases
from tests.faults.chain import Chain, Fault
from tests.ranks import forked

CASES = "tests.distributed.cases_learned"
NAMES = ["ligo", "mango"]


@pytest.fixture(scope="module")
def results(store, tmp_path_factory):
    with own_folder(store, tmp_path_factory, "learned") as path:
        return run_cases(CASES, ranks=2, limit_s=300), noted(path)


@pytest.mark.parametrize("name", case_names(CASES))
def test_case(results, name):
    check(results[0], name)


@pytest.mark.parametrize("name", NAMES)
def test_hundred_steps_lower_the_loss(results, name):
    check(results[0], f"{name}_hundred_steps")
    figures = results[1][f"{name}-toy"]
    print(json.dumps({**figures, "resumed": results[1][f"{name}-again"]["apart"]}))
    assert figures["first"] > 2.0, "what it starts with has lost what the small model knows"
    assert figures["last"] < figures["first"] - 0.8


def learned_run(name: str) -> Run:
    tree = small_run(name, steps=(7, 7)).model_dump(mode="json", by_alias=True)
    tree["stages"][1]["grow"] = {"recipe": "ligo", "learn": {"steps": 12}}
    tree["engine"]["timeout_s"] = 60
    tree["checkpoint"] = {"every": 3, "keep": 2}
    tree["evaluation"] = {"tokens": 256, "every": 4}
    return Run.model_validate(tree)


def _growth(chain: Chain) -> dict[str, object]:
    (record,) = [line for line in chain.folder.records(chain.folder.ledger) if line["event"] == "growth"]
    return dict(record["learn"])


def test_a_run_that_is_killed_while_it_learns_ends_as_without(store, tmp_path_factory):
    with own_folder(store, tmp_path_factory, "killed") as home:
        reference = Chain(learned_run("one"), home / "reference", forked())
        assert reference.start(Fault()) == (False, True)
        reference.check_finished()
        chain = Chain(learned_run("one"), home / "chain", forked(), reference)
        growths = chain.folder.growths
        assert chain.start(Fault("rank", "growth.learn", 6, 1)) == (True, False)
        assert not list(growths.glob("*"))
        chain.check_before_restart()
        assert chain.start(Fault("rank", "growth.learned", 1, 0)) == (True, False)
        (kept,) = growths.glob("*")
        made = kept.stat().st_mtime_ns
        assert chain.start(Fault("all", "growth.ledger", 1, 0)) == (True, False)
        assert chain.start(Fault()) == (False, True)
        chain.check_finished()
        assert kept.stat().st_mtime_ns == made, "what was learned is not learned again"
        assert _growth(chain)["digest"] == _growth(reference)["digest"]
