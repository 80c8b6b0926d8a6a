"""The recipes that have a name, and how one is found: by name, or as a Python file of the user's."""

from __future__ import annotations

import difflib
import runpy
from pathlib import Path
from types import ModuleType

from growth_ds.errors import UserError
from growth_ds.files import sha256
from growth_ds.growth.axis_map import AxisMap
from growth_ds.growth.recipe import Ask, Recipe, recipe
from growth_ds.growth.recipes import copies, depth, experts, lookup, width
from growth_ds.growth.recipes.learned import LEARNED_RECIPES
from growth_ds.growth.split import MOEBERT


def _in(module: ModuleType) -> list[Recipe]:
    return [value for value in vars(module).values() if isinstance(value, Recipe)]


@recipe("add-nsp", axes=("nsp",), exact={"nsp": "always"})
def add_nsp(ask: Ask) -> AxisMap:
    """A pooler and the next-sentence head, drawn anew; nothing that was there changes."""
    raise UserError("add-nsp grows no axis; it is what a model with nsp: true after one without it gets")


_MODULES = (copies, depth, width, lookup, experts)
RECIPES: dict[str, Recipe] = {
    each.name: each for module in _MODULES for each in _in(module) if each.name != MOEBERT
} | {add_nsp.name: add_nsp}
"""Recipe name, as in `grow:` blocks and `--recipe`, -> recipe."""
MEASURED = {MOEBERT: experts.moebert}
"""Recipes that need more than sizes: what was measured of the old model on text."""


def find_recipe(name: str) -> Recipe:
    """A recipe by its name or by the path of a Python file that makes one with `@recipe`. Raises UserError."""
    path, _, digest = name.partition(".py@") if ".py@" in name else (name.removesuffix(".py"), "", "")
    if digest or name.endswith(".py"):
        return _from_file(Path(f"{path}.py"), digest)
    if name in (others := MEASURED | LEARNED_RECIPES):
        return others[name]
    if name not in RECIPES:
        near = difflib.get_close_matches(name, [*RECIPES, *others], n=1, cutoff=0.5)
        fix = f"did you mean '{near[0]}'?" if near else "growth-ds recipes lists them"
        raise UserError(f"no recipe '{name}'; {fix}", "GDS-G02")
    return RECIPES[name]


def _from_file(path: Path, digest: str) -> Recipe:
    """`digest`: how the SHA-256 of the file began when the run's configuration was read, if that is known."""
    if not path.is_file():
        raise UserError(f"{path}: no such recipe file; give the path of a Python file", "GDS-G02")
    if not sha256(path).startswith(digest):
        raise UserError(f"{path}: is not the file that the run began with ({digest}); put that one back", "GDS-G02")
    name = f"growth_ds_recipe_{path.stem}"
    try:
        values = runpy.run_path(str(path), run_name=name)  # not an import: no bytecode is left beside the file
    except Exception as error:  # whatever the user's file does: one line, with its place
        line = f":{error.lineno}" if isinstance(error, SyntaxError) else ""
        raise UserError(f"{path}{line}: {type(error).__name__}: {error}; mend the recipe file", "GDS-G02") from None
    own = [each for each in values.values() if isinstance(each, Recipe) and each.apply.__module__ == name]
    if len(own) != 1:
        raise UserError(
            f"{path}: makes {len(own)} recipes; decorate one function with growth_ds.growth.recipe.recipe", "GDS-G02"
        )
    return own[0]


def that_grow(key: str) -> list[Recipe]:
    """The recipes that grow an axis."""
    return [each for each in RECIPES.values() if key in each.axes]


__all__ = [
    "LEARNED_RECIPES", "MEASURED", "RECIPES", "Ask", "AxisMap", "Recipe", "find_recipe", "recipe", "that_grow",
]  # fmt: skip
