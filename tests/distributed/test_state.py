"""State that goes from any ZeRO stage and number of ranks to any other: a few moves here, all of them on request.

`make test-state` runs every move of cases_state_moves.py, groups of ranks one after the other over one folder of runs,
and prints a table. GROWTH_DS_STATE_TABLE names a file for it besides.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.distributed.cases_state_moves import ALL, FEW, MATRIX, OTHERS, PLACES, groups_for
from tests.distributed.corpus import own_folder
from tests.distributed.state_matrix import GROWTHS, Move, noted
from tests.engine.distributed_cases import check, run_cases

CASES = "tests.distributed.cases_state_moves"
TABLE = "GROWTH_DS_STATE_TABLE"
CASE_S = 8
"""Seconds after which a group is taken to hang, for each of its cases; ten times what one takes."""


def _run(moves, store, tmp_path_factory):
    results, started = {}, time.monotonic()
    with own_folder(store, tmp_path_factory, "state") as path:
        for ranks, names in groups_for(moves):
            results |= run_cases(CASES, ranks=ranks, names=names, limit_s=120 + CASE_S * len(names))
            if any(results.values()):
                break  # what the next group needs is not there
    return results, noted(path), time.monotonic() - started


@pytest.fixture(scope="module")
def few(store, tmp_path_factory):
    return _run(FEW, store, tmp_path_factory)[0]


@pytest.fixture(scope="module")
def everything(store, tmp_path_factory):
    return _run(ALL, store, tmp_path_factory)


def _names(moves):
    return dict.fromkeys(name for _, names in groups_for(moves) for name in names)


def _check(results, name):
    if name not in results:
        pytest.fail(f"{name}: not run, a group of ranks before it failed")
    check(results, name)


@pytest.mark.parametrize("name", _names(FEW))
def test_few(few, name):
    _check(few, name)


def test_every_combination_is_there():
    """Four stages and three numbers of ranks, from and to: 144, each without a growth and with two kinds of them."""
    for growth in GROWTHS:
        moves = {(move.saved, move.resumed) for move in MATRIX if move.growth == growth}
        assert len(moves) == 144
    modes = {(move.resumed, move.growth, move.options()["engine"]["coordinator"]) for move in MATRIX}
    assert len(modes) == 2 * len(PLACES) * len(GROWTHS)
    background = {(move.resumed, move.options()["checkpoint"]["background"]) for move in MATRIX}
    assert len(background) == 2 * len(PLACES)


@pytest.mark.state
@pytest.mark.parametrize("name", _names(ALL))
def test_move(everything, name):
    _check(everything[0], name)


@pytest.mark.state
def test_table(everything):
    results, figures, seconds = everything
    text = "\n\n".join([*(_table(growth, figures) for growth in GROWTHS), _summary(figures, seconds)])
    print("\n" + text)
    if TABLE in os.environ:
        Path(os.environ[TABLE]).write_text(text + "\n")
    assert not any(results.values())
    assert len(figures) == len(set(map(str, ALL)))


def _table(growth, figures):
    """Rows: saved at (ranks x stage); columns: resumed at."""
    lines = [f"growth: {growth}; ranks x ZeRO stage; rows saved, columns resumed; digest, largest loss difference"]
    lines.append(" " * 4 + "".join(f"{place!s:>10}" for place in PLACES))
    for saved in PLACES:
        cells = [_cell(figures.get(str(Move(saved, resumed, growth)))) for resumed in PLACES]
        lines.append(f"{saved!s:4}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def _cell(figure):
    if figure is None:
        return "-"
    return f"{'ok' if figure['equal'] else 'NO'} {figure['difference']:.0e}"


def _summary(figures, seconds):
    lines = []
    for what, moves in {"matrix": MATRIX, **OTHERS}.items():
        found = [figures[str(move)] for move in moves if str(move) in figures]
        equal, largest = sum(each["equal"] for each in found), max((each["difference"] for each in found), default=0.0)
        lines.append(f"{what}: {len(found)} combinations, {equal} digests equal, largest loss difference {largest:.2g}")
    return "\n".join([*lines, f"{seconds:.0f} s, {seconds / max(1, len(figures)):.2f} s a combination"])
