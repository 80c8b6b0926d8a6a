"""The cases of the state matrix: references, saves, and every move from one place to another (see state_matrix.py).

    MATRIX   every ZeRO stage and number of ranks to every other: without a growth, with one that is not exact, and with
             one that is
    OTHERS   bf16 and back, CPU offload as from and as to, other micro-batches; ranks and growths in turn
    FEW      what the ordinary tests run

Which cases a group of ranks can run is told by `names_for`.
"""

from __future__ import annotations

from functools import partial
from itertools import product

from growth_ds.engine.scrub import live_engines
from tests.distributed.state_matrix import GROWTHS, RANKS, STAGES, Move, Place, reference, resume, save

PLACES = [Place(ranks, stage) for ranks, stage in product(RANKS, STAGES)]
MATRIX = [Move(saved, resumed, growth) for growth in GROWTHS for saved, resumed in product(PLACES, PLACES)]


def _turns(
    old: str, new: str, old_stages: tuple[int, ...] = STAGES, new_stages: tuple[int, ...] = STAGES
) -> list[Move]:
    """All pairs of stages from one kind of place to another; ranks and growths in turn."""
    moves = []
    for number, (a, b) in enumerate(product(old_stages, new_stages)):
        m, n, growth = RANKS[number // 3 % 3], RANKS[number % 3], list(GROWTHS)[(number + number // 3) % 3]
        moves.append(Move(Place(m, a, old), Place(n, b, new), growth))
    return moves


_BF16 = [
    Move(Place(2, a, "bf16"), Place(2, b, "bf16"), growth) for growth in GROWTHS for a, b in product(STAGES, STAGES)
]
OTHERS = {
    "bf16": [*_BF16, *(move for move in _turns("bf16", "bf16") if move not in _BF16)],
    "fp32 to bf16": _turns("", "bf16"),
    "bf16 to fp32": _turns("bf16", ""),
    "offloaded to not": _turns("offload", "", old_stages=(2, 3)),
    "to offloaded": _turns("", "offload", new_stages=(2, 3)),
    "offloaded to offloaded": _turns("offload", "offload", (2, 3), (2, 3)),
    "other micro-batches": [*_turns("", "rows"), *_turns("rows", "")],
}
"""What is unusual about them -> moves."""
ALL = [*MATRIX, *(move for moves in OTHERS.values() for move in moves)]
_PAIRS = [Move(Place(2, a), Place(2, b), "width" if a == b else "depth") for a, b in product(STAGES, STAGES)]
_ONE = [Move(Place(m, a), Place(3 - m, b), growth) for m, a, b, growth in (
    (1, 2, 3, "none"), (1, 2, 0, "depth"), (2, 3, 1, "none"), (2, 3, 2, "depth"),
)]  # fmt: skip
FEW = [
    *_PAIRS,
    *_ONE,
    Move(Place(2, 3), Place(2, 2, "bf16"), "none"),
    Move(Place(2, 3), Place(2, 2, "offload"), "none"),
    Move(Place(2, 3), Place(2, 3, "rows"), "none"),
]
REFERENCES = {
    f"reference_{growth}_{precision}": (growth, precision) for growth in GROWTHS for precision in ("fp32", "bf16")
}
SAVES = {f"save_{move.saved}_{move.growth}": (move.saved, move.growth) for move in [*ALL, *FEW]}
MOVES = {str(move): move for move in [*ALL, *FEW]}


def groups_for(moves: list[Move]) -> list[tuple[int, list[str]]]:
    """(ranks, cases in order) of the groups to start, one after the other: all saves come before all resumes."""
    saves: dict[int, list[str]] = {1: [name for name in REFERENCES if _is_wanted(name, moves)]}
    for name in dict.fromkeys(f"save_{move.saved}_{move.growth}" for move in moves):
        saves.setdefault(SAVES[name][0].ranks, []).append(name)
    resumes: dict[int, list[str]] = {}
    for move in moves:
        resumes.setdefault(move.resumed.ranks, []).append(str(move))
    first, then = sorted(saves), sorted(resumes, reverse=True)
    groups = [(ranks, saves[ranks]) for ranks in first]
    if first[-1] == then[0]:  # the same ranks go on
        groups[-1] = (first[-1], saves[first[-1]] + resumes[then.pop(0)])
    groups += [(ranks, resumes[ranks]) for ranks in then]
    return [(ranks, [*names, "no_engine_is_left"]) for ranks, names in groups]


def _is_wanted(name: str, moves: list[Move]) -> bool:
    return name.replace("_", "-") in {move.reference for move in moves}


def case_no_engine_is_left() -> None:
    assert live_engines() == 0


for _name, _of in REFERENCES.items():
    globals()[f"case_{_name}"] = partial(reference, *_of)
for _name, _saved in SAVES.items():
    globals()[f"case_{_name}"] = partial(save, *_saved)
for _name, _move in MOVES.items():
    globals()[f"case_{_name}"] = partial(resume, _move)
