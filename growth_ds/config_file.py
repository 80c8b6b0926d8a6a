"""YAML -> Run: inheritance between stages, `--set`, file references, and errors that name file, key and fix."""

from __future__ import annotations

import difflib
import json
import os
import typing
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from growth_ds.config import Frozen, Grow, Model, Run, inherit_model
from growth_ds.errors import UserError
from growth_ds.files import sha256

PACKAGE = Path(__file__).resolve().parent
GROW_FILES = (".yaml", ".yml", ".json")
"""A recipe of the user's: `grow:` blocks in such a file, or Python."""


def shipped(relative: str) -> Path:
    """A file of `configs/`, in a checkout or in an installed package."""
    checkout = PACKAGE.parent / "configs" / relative
    return checkout if os.path.exists(checkout) else PACKAGE / "configs" / relative


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice: YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a plain word", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key '{key.value}' is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML (or JSON) file. Raises UserError with file and line."""
    if not os.path.exists(path) and path.parts[:1] == ("configs",):
        path = shipped("/".join(path.parts[1:]))  # outside a checkout the shipped files go by the same names
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the path of a config") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a readable YAML file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}: not valid YAML: {problem}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds {type(tree).__name__}, not a mapping of keys; see configs/ for examples")
    return tree


def load_run(path: str | Path, overrides: Iterable[str] = ()) -> Run:
    """Read, override (`key.path=value`), resolve and validate a run. Raises UserError: one line, file and key named."""
    path = Path(path)
    tree = read_yaml(path)
    for override in overrides:
        _set(tree, override)
    tree.setdefault("name", path.stem)
    return resolve_run(tree, path)


def resolve_run(tree: dict[str, Any], path: Path, source: str | None = None) -> Run:
    """A run's mapping, with the files it names beside `path`, as a Run. Raises UserError that begins with `source`."""
    engine = tree.get("engine")
    if isinstance(engine, dict):
        for key in ("zero", "deepspeed"):
            if isinstance(engine.get(key), str):
                engine[key] = _referenced(path, f"engine.{key}", engine[key])
    for stage in tree["stages"] if isinstance(tree.get("stages"), list) else []:
        if isinstance(stage, dict) and stage.get("grow") is not None:
            stage["grow"] = _grow_block(path, stage["grow"])
    return validated(Run, tree, source or str(path))


def _grow_block(config: Path, block: Any) -> Any:
    """A `grow:` block with the files it names: a block in a file comes first, keys given beside it count."""
    if isinstance(block, str):
        block = {"recipe": block}
    recipe = block.get("recipe") if isinstance(block, dict) else None
    if isinstance(recipe, str) and Path(recipe).suffix in GROW_FILES:
        tree = _grow_file(_beside(config, recipe))
        return {**tree, **_located(config, {key: value for key, value in block.items() if key != "recipe"})}
    return _located(config, block) if isinstance(block, dict) else block


def _grow_file(path: Path) -> dict[str, Any]:
    """A `grow:` block in a file of its own. Raises UserError."""
    tree = read_yaml(path)
    validated(Grow, tree, str(path))
    return _located(path, tree)


def _located(config: Path, block: Mapping[str, Any]) -> dict[str, Any]:
    """The block with its Python files found and named by path and content: `recipes/mine.py@1f3c...`."""
    return {
        key: _named(_beside(config, value)) if isinstance(value, str) and value.endswith(".py") else value
        for key, value in block.items()
    }


def _named(path: Path) -> str:
    """A run whose recipe file changes is another run, one whose file moves is not (see `Run.identity`)."""
    return f"{path}@{sha256(path)[:16]}" if os.path.isfile(path) else str(path)


def _beside(config: Path, name: str) -> Path:
    """A file named in a config: from the working directory, or from the config's own folder."""
    beside = config.parent / name
    return beside if not os.path.exists(name) and os.path.exists(beside) else Path(name)


def load_model(path: str | Path, previous: Model) -> Model:
    """A `model:` block in a file of its own; missing keys keep the value they have in `previous`."""
    tree = read_yaml(Path(path))
    return validated(Model, inherit_model(previous.model_dump(), tree), str(path))


def load_grow(name_or_path: str, require_exact: bool = False, overrides: Iterable[str] = ()) -> Grow:
    """A recipe by name, by the path of a Python file, or a `grow:` block in a file; `overrides` are `key=value`."""
    tree: dict[str, Any] = {"recipe": name_or_path}
    source = "--recipe"
    if Path(name_or_path).suffix in GROW_FILES:
        tree, source = _grow_file(Path(name_or_path)), name_or_path
    for override in overrides:
        _set(tree, override)
    if require_exact:
        tree["require_exact"] = True
    return validated(Grow, tree, source)


T = typing.TypeVar("T", bound=BaseModel)


def overridden(kind: type[T], overrides: Iterable[str], source: str) -> T:
    """`kind` with its defaults but for `overrides`, each `key=value`. Raises UserError."""
    tree: dict[str, Any] = {}
    for override in overrides:
        _set(tree, override)
    return validated(kind, tree, source)


def dump_run(run: Run) -> str:
    """YAML that reads back as the same run, every default written out."""
    return yaml.safe_dump(run.model_dump(mode="json", by_alias=True), sort_keys=False)


def validated(kind: type[T], tree: Mapping[str, Any], source: str) -> T:
    """`kind` from a mapping; a pydantic error becomes one line for the user."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: {_explain(kind, error)}", "GDS-C02") from None


def _explain(kind: type[BaseModel], error: ValidationError) -> str:
    """The first problem of a validation error, unknown keys first: they are usually the cause of the others."""
    problems = _distinct(error)
    first = problems[0]
    where = _place(first["loc"])
    if first["type"] == "extra_forbidden":
        known = _keys_at(kind, first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.5)
        fix = f"did you mean '{near[0]}'?" if near else f"known keys here: {', '.join(known)}"
        return f"{where}: unknown key; {fix}"
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if first["type"] == "missing":
        return f"{where}: this key is required; add it"
    given = "" if isinstance(first["input"], (dict, list)) else f" (given: {first['input']!r})"
    more = f" [and {len(problems) - 1} more]" if len(problems) > 1 else ""
    return f"{where}: {message}{given}{more}" if where else f"{message}{more}"


def _distinct(error: ValidationError) -> list[Any]:
    """The problems worth telling. pydantic reports one thing several times: an inherited block once for each stage, a
    union once for each member, and a list whose items are wrong as too short as well."""
    problems = sorted(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    told = [each for each in problems if each["type"] != "too_short" and each["loc"][-1:] != ("str",)]
    problems = told or problems
    return list({(each["loc"][-1:], each["msg"]): each for each in reversed(problems)}.values())[::-1]


def _place(location: Sequence[str | int]) -> str:
    """`data.store.0.path`, without the names pydantic gives to the members of a union."""
    return ".".join(str(part) for part in location if part not in ("str", "Sources") and "[" not in str(part))


def _keys_at(kind: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """Config keys of the block at a location such as ("stages", 1, "model")."""
    current: Any = kind
    for part in location:
        if isinstance(part, int) or not _is_block(current):
            continue
        fields = {field.alias or name: field for name, field in current.model_fields.items()}
        if part in fields:
            current = _block_in(fields[part].annotation)
    keys = [field.alias or name for name, field in current.model_fields.items()] if _is_block(current) else []
    return [*keys, "model"] if current is Run else keys


def _is_block(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Frozen)


def _block_in(annotation: Any) -> Any:
    """The config class inside an annotation such as `tuple[Stage, ...]` or `Optim | None`."""
    if _is_block(annotation):
        return annotation
    for inner in typing.get_args(annotation):
        found = _block_in(inner)
        if _is_block(found):
            return found
    return None


def _referenced(config: Path, key: str, name: str) -> dict[str, Any]:
    """The JSON file that a key names: from the working directory, beside the config, or shipped with the package."""
    candidates = [Path(name), config.parent / name, shipped(name.removeprefix("configs/"))]
    for candidate in candidates:
        if os.path.isfile(candidate):  # also of a name that no system takes
            try:
                tree = json.loads(candidate.read_text(encoding="utf-8"))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{candidate}: not valid JSON: {error}") from None
            if not isinstance(tree, dict):
                raise UserError(f"{candidate}: holds {type(tree).__name__}, not a DeepSpeed configuration")
            return tree
    raise UserError(
        f"{config}: {key}: no file '{name}'; give a ZeRO stage (0-3) or the path of a DeepSpeed JSON", "GDS-C02"
    )


def _set(tree: dict[str, Any], override: str) -> None:
    """Apply one `a.b.0.c=value`; the value is YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: not of the form key=value, for example stages.0.steps=10", "GDS-C03")
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError):
        raise UserError(f"--set {override}: the value is not valid YAML", "GDS-C03") from None
    *parents, last = key.split(".")
    node: Any = tree
    for part in parents:
        node = _child(node, part, override)
        if node is None:
            raise UserError(f"--set {override}: '{part}' holds no keys", "GDS-C03")
    if isinstance(node, dict):
        node[last] = value
    elif isinstance(node, list):
        _child(node, last, override)
        node[int(last)] = value
    else:
        raise UserError(f"--set {override}: '{parents[-1]}' holds no keys", "GDS-C03")


def _child(node: Any, part: str, override: str) -> Any:
    """What stands under `part`; a block that is not written yet is made."""
    if isinstance(node, list):
        if not part.isdecimal() or int(part) >= len(node):
            raise UserError(f"--set {override}: '{part}' is not an index below {len(node)}", "GDS-C03")
        return node[int(part)]
    if isinstance(node, dict):
        if node.get(part) is None:
            node[part] = {}
        return node[part]
    return None
