"""Interchange with DeepSpeed's checkpoint folders: rigid or universal -> checkpoint, and anything -> universal.

To a checkpoint, parameters go by growth_ds's own names or by those of Hugging Face's BERT, with or without `module.`
in front. Between DeepSpeed's folders names stay as they are, whatever the model.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from growth_ds.checkpoint import MANIFEST
from growth_ds.config import Model
from growth_ds.config_file import read_yaml, validated
from growth_ds.during import During
from growth_ds.engine.ds_files import read_tag
from growth_ds.engine.rigid import MODEL_FILES, Rigid, open_rigid
from growth_ds.engine.state import TensorState
from growth_ds.engine.universal import LATEST, Universal, open_universal, write_universal
from growth_ds.errors import UserError
from growth_ds.interop import huggingface, names
from growth_ds.interop.tokenizer_files import VOCABULARIES
from growth_ds.model.layout import parameter_shapes
from growth_ds.offline import check_free, find_checkpoint, tokenizer_only, write_checkpoint

Opened = Rigid | Universal
_PREFIX = "module."


def convert(
    source: Path, out: Path, *, to: str, model: Model | None, zero: int, force: bool, tokenizer: Path | None
) -> list[str]:
    """Write `out` from `source`; returns lines for the user.

    `source`: a checkpoint, a run folder, or a DeepSpeed folder (with `latest`, `latest_universal`, or a tag folder).
    `to`: "checkpoint" or "universal". `model`: for a checkpoint, where the source does not say the sizes. `zero`: the
    stage that will load a universal folder. `tokenizer`: a folder whose tokenizer goes into the checkpoint. Raises
    UserError before anything stands at `out`.
    """
    if to not in ("checkpoint", "universal"):
        raise UserError(f"--to: '{to}' is neither checkpoint nor universal")
    if zero not in (1, 2, 3):
        raise UserError(f"--zero: {zero} is not a stage that loads a universal folder; give 1, 2 or 3")
    check_free(out, force)
    if to == "universal" and (model is not None or tokenizer is not None):
        option = "--model" if model is not None else "--tokenizer"
        raise UserError(f"{option}: a universal folder holds none, and names stay as they are; leave the option out")
    kind = kind_of(source)
    if kind == "checkpoint":
        if to == kind:
            raise UserError(f"{source}: is a checkpoint already; give --to universal")
        return _from_checkpoint(source, out, zero, force)
    opened = open_rigid(source) if kind == "rigid" else open_universal(source)
    ranks = f" of ZeRO-{opened.stage} on {opened.ranks} ranks" if isinstance(opened, Rigid) else ""
    first = f"{opened.path}: a {kind} DeepSpeed folder{ranks}, step {opened.global_steps}"
    if to == "universal":
        return [first, *_to_universal(opened, out, zero, force)]
    return [first, *_to_checkpoint(source, opened, out, model, force, tokenizer)]


def kind_of(source: Path) -> str:
    """ "checkpoint", "rigid" or "universal", by the files in a folder. Raises UserError for none of them.

    Where DeepSpeed's converter wrote beside what it read, the rigid folder is meant; the tag folder says otherwise.
    """
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; give a checkpoint, a run folder or a DeepSpeed folder")
    if (source / MANIFEST).is_file():
        return "checkpoint"
    if (source / "latest").is_file():
        return "rigid"
    if (source / LATEST).is_file() or (source / "zero").is_dir():
        return "universal"
    if any((source / name).is_file() for name in MODEL_FILES) or any(source.glob("*zero_pp_rank_*")):
        return "rigid"
    if (source / "checkpoints").is_dir():
        return "checkpoint"
    raise UserError(
        f"{source}: neither a checkpoint (no {MANIFEST}), nor a run folder, nor DeepSpeed's (no latest, no {LATEST}); "
        "if DeepSpeed's, give its tag folder"
    )


def read_model(path: Path) -> Model:
    """The model of `--model`: a YAML with the keys of a `model:` block, or a Hugging Face config.json.

    Raises UserError. A config.json does not say whether there is a next-sentence head: `nsp` is True, and `convert`
    takes it back where the source has none.
    """
    path = path / "config.json" if path.is_dir() else path
    tree = read_yaml(path)
    if "model_type" not in tree:
        return validated(Model, tree, str(path))
    if path.name != "config.json":
        raise UserError(f"{path}: a Hugging Face configuration is found by its name; call it config.json")
    config = huggingface.read_config(path.parent)
    if names.base_of(config["model_type"]) != "bert.":
        raise UserError(f"{path}: model_type: convert reads no {config['model_type']}; give a bert or megatron-bert")
    return huggingface.model_of(path.parent, config, nsp=True)


def _from_checkpoint(source: Path, out: Path, zero: int, force: bool) -> list[str]:
    checkpoint = find_checkpoint(source)
    step = int(checkpoint.facts.get("step", 0))
    during = During.of(checkpoint.facts)
    if during.progress(step) is not None:
        raise UserError(f"{checkpoint.path}: is in the middle of a growth's ramp; train to its end, then convert")
    _check_universal(out, force)
    ours = {"model": checkpoint.model.model_dump(mode="json")}
    tag = write_universal(out, checkpoint.shapes(), checkpoint.read, zero=zero, global_steps=step, ours=ours)
    first = f"{checkpoint.path}: a checkpoint at step {step}"
    rates = (
        ["the learning rates that its growths left on some parameters are not in it"] if during.rates_at(step) else []
    )
    return [first, *rates, *_advice(out, tag, zero)]


def _to_universal(opened: Opened, out: Path, zero: int, force: bool) -> list[str]:
    _check_universal(out, force)
    tag = write_universal(
        out, opened.shapes(), opened.read, zero=zero, global_steps=opened.global_steps,
        integer_steps=opened.moments and opened.integer_steps, aliases=opened.aliases,
        ours=opened.ours if isinstance(opened, Universal) else None,
    )  # fmt: skip
    return _advice(out, tag, zero)


def _check_universal(out: Path, force: bool) -> None:
    """Raises UserError unless `out` is free, or `force` and nothing stands there but one universal checkpoint."""
    check_free(out, force)
    entries = {entry.name for entry in out.iterdir()} if out.is_dir() else set()
    if out.exists() and (LATEST not in entries or entries != {LATEST, read_tag(out / LATEST)}):
        raise UserError(f"{out}: is not just a universal folder, and --force replaces nothing else; give another --out")


def _advice(out: Path, tag: str, zero: int) -> list[str]:
    stages = "ZeRO-3" if zero == 3 else "ZeRO 1, 2 and 3"
    lines = [
        f'{out}: {tag}, for {stages}; load with "checkpoint": {{"load_universal": true}} in the configuration and '
        f"engine.load_checkpoint('{out}', load_lr_scheduler_states=False)",
        "no hyper-parameters are in it: every parameter group keeps its own (after DeepSpeed's own converter, ZeRO-3 "
        "gives the first group's to all, and they have to be set again)",
    ]
    return [
        *lines,
        "under ZeRO-3, DeepSpeed gives all groups one step tensor: clone the step of each entry of optimizer.state "
        "after loading if the optimizer is torch's",
    ]


def _to_checkpoint(
    source: Path, opened: Opened, out: Path, model: Model | None, force: bool, tokenizer: Path | None
) -> list[str]:
    plain = _plain_names(opened)
    model, notes = _fitted(model or _own_model(source, opened) or _no_model(opened, plain), plain, opened)
    table = name_table(opened, plain, model)
    facts = {
        "step": opened.global_steps,
        "stage": 0,
        "seconds": 0.0,
        "converted_from": source.absolute().name,
    }
    if tokenizer is not None and not any((tokenizer / name).is_file() for name in VOCABULARIES):
        raise UserError(f"{tokenizer}: holds no tokenizer ({' or '.join(VOCABULARIES)}); give its folder")
    copied = tokenizer_only(tokenizer, out) if tokenizer is not None else None
    try:
        write_checkpoint(
            out, model, lambda name: _gather(opened, name, table[name]), facts, moments=opened.moments,
            tokenizer=copied, force=force,
        )  # fmt: skip
    finally:
        if copied is not None:
            shutil.rmtree(copied, ignore_errors=True)
    parts = "weights and moments" if opened.moments else "weights, no moments"
    return [*notes, f"{out}: a checkpoint of {model.layers} layers of {model.hidden}, {parts}"]


def _plain_names(opened: Opened) -> dict[str, str]:
    """Parameter names without `module.` -> the source's."""
    given = list(opened.shapes())
    cut = len(_PREFIX) if given and all(name.startswith(_PREFIX) for name in given) else 0
    return {name[cut:]: name for name in given}


def _ours(plain: Mapping[str, str]) -> bool:
    return "embeddings.word.weight" in plain


def _own_model(source: Path, opened: Opened) -> Model | None:
    """The sizes that stand in or beside the source: our own record, or the config.json of transformers' trainer."""
    if isinstance(opened, Universal) and isinstance(opened.ours.get("model"), dict):
        return validated(Model, opened.ours["model"], f"{opened.path / MODEL_FILES[0]}: growth_ds.model")
    for folder in (source, opened.path.parent):
        if (folder / "config.json").is_file():
            return read_model(folder / "config.json")
    return None


def _no_model(opened: Opened, plain: Mapping[str, str]) -> Model:
    """Always raises UserError, with the sizes that the shapes do say."""
    found = _canonical(opened, plain) if not _ours(plain) else plain
    probe = Model.model_validate({"layers": 1, "hidden": 1, "heads": 1, "ffn": 1})
    said = []
    for key, name, axis in (
        ("hidden", "embeddings.word.weight", 1),
        ("vocab_size", "embeddings.word.weight", 0),
        ("positions", "embeddings.position.weight", 0),
        ("ffn", "layers.0.up.weight", 0),
    ):
        theirs = name if _ours(plain) else names.their_names(probe, name)[0]
        shape = opened.shapes()[found[theirs]] if theirs in found else ()
        said += [f"{key} {shape[axis]}"] if len(shape) == 2 else []
    sizes = f"its shapes say {', '.join(said)}, and none says the number of heads" if said else "sizes are not known"
    raise UserError(f"{opened.path}: {sizes}; give --model, a YAML with the keys of a model: block or a config.json")


def _fitted(model: Model, plain: Mapping[str, str], opened: Opened) -> tuple[Model, list[str]]:
    """The model with the source's vocabulary if it names none, and without a next-sentence head if the source has none.

    And lines that say so.
    """
    notes = []
    found = plain if _ours(plain) else _canonical(opened, plain)
    if model.nsp and not any(key in found for name in names.NSP_NAMES for key in _keys(model, name, plain)):
        model = model.model_copy(update={"nsp": False})
        notes.append(f"{opened.path}: no next-sentence head, so the model has none")
    word = _keys(model, "embeddings.word.weight", plain)[0]
    shape = opened.shapes()[found[word]] if word in found else ()
    if model.vocab_size is None and len(shape) == 2:
        model = model.model_copy(update={"vocab_size": shape[0]})
    return model, notes


def _keys(model: Model, name: str, plain: Mapping[str, str], depth: int | None = None) -> tuple[str, ...]:
    """The names that a parameter of ours has in the source."""
    return (name,) if _ours(plain) else names.their_names(model, name, depth)


def _canonical(opened: Opened, plain: Mapping[str, str]) -> dict[str, str]:
    """Present Hugging Face name -> the source's, tied copies left out. Raises UserError for copies that differ."""
    found: dict[str, str] = {}
    for name, given in plain.items():
        present = names.canonical(name) or name
        if present in found:
            raise UserError(f"{opened.path}: holds both '{found[present]}' and '{given}'; keep one of them")
        found[present] = given
    for copy, name in names.TIED.items():
        if copy not in found:
            continue
        if name not in found:
            found[name] = found.pop(copy)
            continue
        mine, other = opened.read(found[name]), opened.read(found.pop(copy))
        if not torch.equal(mine.weight, other.weight):
            raise UserError(f"{opened.path}: '{copy}' differs from '{name}', and ours are one tensor; tie the decoder")
    return found


def name_table(opened: Opened, plain: Mapping[str, str], model: Model) -> dict[str, tuple[str, ...]]:
    """Our parameter names -> the names in the source whose tensors, one after the other, are ours.

    Raises UserError for a parameter that is missing, has another shape than the model says, or is not the model's.
    """
    found = dict(plain) if _ours(plain) else _canonical(opened, plain)
    if not _ours(plain) and model.shares_layers:
        raise UserError(f"{opened.path}: Hugging Face names know no shared layers; leave stored_layers out of --model")
    special = {"ffn_rank": model.ffn_rank, "light_every": model.light_every, "experts": model.experts > 1 or None}
    for key, given in special.items():
        if not _ours(plain) and given is not None:
            what = {"ffn_rank": "low-rank layers", "light_every": "light attention", "experts": "experts"}[key]
            raise UserError(f"{opened.path}: Hugging Face names know no {what}; leave {key} out of --model")
    shapes, table = opened.shapes(), {}
    for name, shape in parameter_shapes(model).items():
        keys = _keys(model, name, plain)
        for key in keys:
            if key not in found:
                known = "growth_ds" if _ours(plain) else "Hugging Face BERT"
                raise UserError(f"{opened.path}: has no '{key}' (names of {known}); give the --model that it is of")
            expected, actual = names.part_shape(shape, len(keys)), shapes[found[key]]
            if actual != expected:
                sizes = f"has shape {list(actual)}, the model says {list(expected)}"
                raise UserError(f"{opened.path}: '{found[key]}' {sizes}; give the --model that it is of")
        table[name] = tuple(found.pop(key) for key in keys)
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        left = next(iter(found.values()))
        raise UserError(f"{opened.path}: '{left}'{more} has no place in the model; give the --model that it is of")
    return table


def _gather(opened: Opened, name: str, keys: tuple[str, ...]) -> TensorState:
    """One state of ours from its parts. Raises UserError where they do not count the same steps."""
    states = [opened.read(key) for key in keys]
    if len({state.step for state in states}) > 1:
        raise UserError(f"{opened.path}: the parts of '{name}' count different steps; train on with all of them")
    tensors: dict[str, Any] = {}
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        parts = [getattr(state, kind) for state in states]
        tensors[kind] = None if any(part is None for part in parts) else torch.cat(parts)
    return TensorState(**tensors, step=states[0].step)
