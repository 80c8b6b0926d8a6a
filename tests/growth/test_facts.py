"""What `growth-ds recipes` says of a recipe in words is what its plans say."""

from __future__ import annotations

import pytest

from growth_ds.errors import UserError
from growth_ds.growth.plan import GrowthPlan
from growth_ds.growth.recipes import RECIPES
from tests.growth.models import changed, plan_of, small

SIZES = {"hidden": (24, 20), "heads": (6, 5), "ffn": (20, 17), "layers": (4, 3), "positions": (18, 14)}
"""Config key -> a whole multiple of the small model's size, and another size."""
SIZES |= {"vocab_size": (46, 31), "segments": (4, 3), "stored_layers": (4, 3)}
PAIRS = [(recipe, key) for recipe in RECIPES.values() for key in recipe.axes if key in SIZES]


def plans(name: str, key: str, norm: str) -> list[GrowthPlan | None]:
    """Of a whole multiple and of another size; None where the recipe refuses."""
    shared = {"layers": 12, "stored_layers": 2} if key == "stored_layers" else {}
    old, found = small(norm=norm, nsp=True, **shared), []
    for size in SIZES[key]:
        try:
            found.append(plan_of(old, changed(old, **{key: size}), recipe=name))
        except UserError:
            found.append(None)
    return found


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize(("recipe", "key"), PAIRS, ids=[f"{recipe.name}-{key}" for recipe, key in PAIRS])
def test_the_words_of_a_recipe_are_those_of_its_plans(recipe, key, norm):
    multiple, other = plans(recipe.name, key, norm)
    word = recipe.exact.get(key, "never")
    if recipe.name == "identity":
        assert multiple is other is None
    elif word.startswith("always"):
        assert multiple is not None
        assert multiple.exact
        assert other is None or other.exact
    elif word.startswith("whole multiples"):
        assert multiple is not None
        assert multiple.exact
        assert other is None or not other.exact
    else:
        assert word in ("never", "with a ramp")
        assert all(plan is None or not plan.exact for plan in (multiple, other))


def test_a_recipe_that_says_with_a_ramp_is_exact_with_one():
    old = small(nsp=True)
    found = [(recipe.name, key) for recipe, key in PAIRS if recipe.exact.get(key) == "with a ramp"]
    assert found == [("zero-pad", "hidden")]
    assert all(plan_of(old, changed(old, **{key: SIZES[key][1]}), recipe=name, ramp=5).exact for name, key in found)
