"""Whose the entries of an optimizer are, where its file gives them numbers and no names (DeepSpeed without ZeRO).

The optimizer numbers its parameters group by group. A module's parameters, taken in order and dealt out to the groups
so that every shape fits, usually allow one deal only: decayed matrices here, biases and norms there. Then it is the
right one. More than one, or none, is refused: moments of the wrong parameter would do harm unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

MOST_STATES = 200_000
"""Ways that are followed at once; layer-wise groups of equal shapes have no end of them."""
_State = tuple[int, ...]


def deal(names: Sequence[str], groups: Sequence[dict[str, Any]], fits: Callable[[str, int], bool]) -> dict[str, int]:
    """Parameter name -> its number in the optimizer; a frozen parameter has none.

    `names` in module order, `groups` as in a torch optimizer's state_dict, `fits(name, number)` says whether the entry
    may be that parameter's. Raises ValueError unless exactly one deal fits.
    """
    numbers = [list(group["params"]) for group in groups]
    given = [group.get("param_names") or [] for group in groups]
    if all(given):
        pairs = [pair for theirs, mine in zip(given, numbers, strict=True) for pair in zip(theirs, mine, strict=True)]
        return dict(pairs)
    spare = len(names) - sum(map(len, numbers))
    steps: list[dict[_State, tuple[int, _State]]] = [{(0,) * len(numbers): (1, ())}]
    for name in names:
        steps.append(_next(steps[-1], name, numbers, fits, spare, len(steps)))
    end = tuple(map(len, numbers))
    ways = steps[-1].get(end, (0, ()))[0]
    if ways != 1:
        many = "several ways" if ways else "no way"
        raise ValueError(f"the optimizer's entries have no names, and {many} of giving them to the parameters fit")
    return _walk_back(steps, end, names, numbers)


def _next(
    before: dict[_State, tuple[int, _State]], name: str, numbers: Sequence[Sequence[int]],
    fits: Callable[[str, int], bool], spare: int, count: int,
) -> dict[_State, tuple[int, _State]]:  # fmt: skip
    """States after one more parameter: how many of each group are dealt -> (ways, at most 2; one state before)."""
    after: dict[_State, tuple[int, _State]] = {}
    for state, (ways, _) in before.items():
        follow = [state] if count - sum(state) <= spare else []  # left out: frozen
        for group, members in enumerate(numbers):
            if state[group] < len(members) and fits(name, members[state[group]]):
                follow.append((*state[:group], state[group] + 1, *state[group + 1 :]))
        for one in follow:
            after[one] = (min(2, after.get(one, (0, ()))[0] + ways), state)
    if len(after) > MOST_STATES:
        raise ValueError("the optimizer's entries have no names, and too many ways of giving them out fit")
    return after


def _walk_back(
    steps: Sequence[dict[_State, tuple[int, _State]]], end: _State, names: Sequence[str], numbers: Sequence[list[int]]
) -> dict[str, int]:
    found: dict[str, int] = {}
    state = end
    for index in range(len(names), 0, -1):
        previous = steps[index][state][1]
        for group, members in enumerate(numbers):
            if previous[group] < state[group]:
                found[names[index - 1]] = members[previous[group]]
        state = previous
    return found
