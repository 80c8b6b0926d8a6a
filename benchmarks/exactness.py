"""The README's table of which growth is exact: `python -m benchmarks.exactness` in the repository, about a minute.

Runs the cases of `tests/interop/recipe_cases.py` against transformers; writes `benchmarks/results/exactness.md`
(recipe, shape and norm -> exact, largest difference of a logit) and `exactness.json` (every figure, hardware,
versions). Exit code 1 if a measurement contradicts a plan.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import growth_ds
from benchmarks.common import processor
from growth_ds.growth.recipes import RECIPES
from tests.interop.recipe_cases import Case, cases
from tests.interop.recipe_runs import Outcome, Sources, run_case

RESULTS = Path(__file__).parent / "results"
TOLERANCE = 1e-5
HEAD = """\
# Which growth keeps the function, measured

Written by `python -m benchmarks.exactness`. Each row grows a randomised transformers model (hidden 48, 3 heads of 16,
ffn 40, 2 layers, every weight, bias and norm drawn; float32) by import, grow and export, and compares all MLM logits at
real tokens (of the old words, where there are new ones) and all NSP logits, on padded and on whole rows. Differences
below 1e-5 are rounding; the logits reach about {scale:.0f}.

*exact* is what the plan says before a weight is read; {agree} of {count} plans agree with the measurement. *start*
is the largest difference right after the growth. In a ramp our own forward is measured there; at its *end* the plain
weights are exported, our forward agrees with transformers' on them within 1e-5, and the column says how far they are
from the source. "ours": transformers holds no model whose heads do not fill hidden, so our forward is compared.
*loss*: largest difference of a token's loss in nats, where new words take part in the softmax.

{versions}
"""


def agrees(outcome: Outcome) -> bool:
    """Whether the plan and the measurement say the same; a ramp's end has to be what is exported too."""
    measured = outcome.moved < TOLERANCE
    return outcome.exact == measured and (outcome.end is None or outcome.end < TOLERANCE)


def measure() -> Iterable[tuple[Case, Outcome, float]]:
    """Every case, what it did, and the largest logit of its source."""
    with tempfile.TemporaryDirectory() as folder:
        sources = Sources(Path(folder) / "sources")
        for number, case in enumerate(cases()):
            (out := Path(folder) / str(number)).mkdir()
            scale = max(float(mlm.abs().max()) for mlm, _ in sources.of(case).logits)
            yield case, run_case(case, sources, out), scale


def row_of(case: Case, outcome: Outcome) -> str:
    """One line of the table."""
    exact = "yes" if outcome.exact else "no: " + ", ".join(outcome.reasons)
    cells = [case.recipe, case.shape, case.norm, exact, _short(outcome.moved), ", ".join(outcome.ramp)]
    cells += [_short(outcome.moved_at_end), _short(outcome.loss), "" if case.in_transformers else "ours"]
    return f"| {' | '.join(cells)} |"


def summary_of(recipe: str, done: list[tuple[Case, Outcome, float]]) -> str:
    """One line over all shapes and norms of a recipe."""
    mine = [outcome for case, outcome, _ in done if case.recipe == recipe]
    kept, changed = ([each.moved for each in mine if each.exact == exact] for exact in (True, False))
    cells = [recipe, str(len(kept)), _short(max(kept, default=None)), str(len(changed) or "")]
    cells += [_short(min(changed, default=None)), str(sum(bool(each.ramp) for each in mine) or "")]
    return f"| {' | '.join(cells)} |"


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}" if value else "0"


def _table(*columns: str) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def versions() -> dict[str, str]:
    """What the figures were made with."""
    modules = (growth_ds, torch, transformers, np)
    return {"python": platform.python_version()} | {module.__name__: str(module.__version__) for module in modules}


def record_of(case: Case, outcome: Outcome) -> dict[str, Any]:
    """One entry of the JSON."""
    keep = {"recipe": case.recipe, "norm": case.norm, "shape": case.shape, "change": dict(case.change)}
    return {**keep, "grow": dict(case.grow), **asdict(outcome), "agrees": agrees(outcome)}


def main() -> int:
    torch.set_num_threads(1)
    begin = time.perf_counter()
    done = list(measure())
    # By recipe, in the order in which they are listed; the table's own order within.
    order = list(RECIPES)
    done.sort(key=lambda each: (order.index(each[0].recipe), each[0].norm != "post"))
    agree = sum(agrees(outcome) for _, outcome, _ in done)
    made_with = versions()
    head = HEAD.format(
        scale=max(scale for *_, scale in done), agree=agree, count=len(done),
        versions=", ".join(f"{name} {version}" for name, version in made_with.items()) + ".",
    )  # fmt: skip
    table = _table("recipe", "exact cases", "largest start", "others", "smallest start", "of all by a ramp")
    table += [summary_of(recipe, done) for recipe in order]
    table += ["", *_table("recipe", "what grows", "norm", "exact", "start", "ramp", "end", "loss", "judge")]
    table += [row_of(case, outcome) for case, outcome, _ in done]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "exactness.md").write_text(head + "\n" + "\n".join(table) + "\n", encoding="utf-8")
    record = {
        "hardware": {"processor": processor(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": made_with,
        "tolerance": TOLERANCE,
        "seconds": round(time.perf_counter() - begin, 1),
        "cases": len(done),
        "agree": agree,
        "largest_of_exact": max(outcome.moved for _, outcome, _ in done if outcome.exact),
        "smallest_of_inexact": min(outcome.moved for _, outcome, _ in done if not outcome.exact),
        "results": [record_of(case, outcome) for case, outcome, _ in done],
    }
    (RESULTS / "exactness.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{agree} of {len(done)} plans agree with transformers, {record['seconds']} s; {RESULTS / 'exactness.md'}")
    return 0 if agree == len(done) else 1


if __name__ == "__main__":
    sys.exit(main())
