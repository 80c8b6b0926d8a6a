"""Work on checkpoints without an engine: import, export, grow, evaluate. One process, CPU, one tensor at a time."""

from __future__ import annotations

import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from growth_ds.checkpoint import MANIFEST, Checkpoint, CheckpointWriter, is_checkpoint, open_verified
from growth_ds.config import Data, Grow, Model
from growth_ds.coordinator import growth_plan
from growth_ds.during import During
from growth_ds.engine.state import TensorState
from growth_ds.errors import UserError
from growth_ds.files import put_back
from growth_ds.growth.plan import GrowthPlan
from growth_ds.growth.split import Order
from growth_ds.growth.state import grow_state
from growth_ds.model.bert import Bert, check_rows, without_weights
from growth_ds.model.layout import parameter_shapes
from growth_ds.ops.growth_gather import gather
from growth_ds.run_folder import RunFolder

if TYPE_CHECKING:
    from growth_ds.data.text import Text
    from growth_ds.evaluate.mlm import Validation


def find_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint folder, or the newest whole checkpoint of a run folder; every byte compared with its manifest.

    Raises UserError if there is none.
    """
    if (path / MANIFEST).is_file():
        return open_verified(path)
    if not path.exists():
        raise UserError(f"{path}: no such folder; give a checkpoint or a run folder")
    checkpoint = RunFolder(path).newest(lambda line: print(line, file=sys.stderr))
    if checkpoint is None:
        raise UserError(f"{path}: neither a checkpoint (no {MANIFEST}) nor a run with checkpoints")
    return checkpoint


def check_free(out: Path, force: bool) -> None:
    """Raises UserError if something is at `out` already and may not be replaced; also if a kill left it hidden."""
    try:
        put_back(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give another --out", "GDS-O01") from None
    if out.exists() and not force:
        raise UserError(f"{out}: exists; give another --out, or --force to replace it", "GDS-O01")


def write_checkpoint(
    out: Path, model: Model, read: Callable[[str], TensorState], facts: dict[str, Any], *, moments: bool,
    tokenizer: Path | None, force: bool,
) -> None:  # fmt: skip
    """A whole checkpoint from a function name -> state."""
    check_free(out, force)
    if out.exists() and not is_checkpoint(out):
        raise UserError(f"{out}: is not a checkpoint, and --force replaces nothing else; give another --out")
    try:
        with CheckpointWriter(out, model, moments=moments, facts=facts, tokenizer=tokenizer) as writer:
            for name in parameter_shapes(model):
                writer.add(name, read(name))
            writer.commit()
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give a folder that can", "GDS-O01") from None


class Source(Protocol):
    """What grows: a checkpoint, or a Hugging Face folder (`growth_ds.folders`)."""

    path: Path
    model: Model

    def read(self, name: str) -> TensorState:
        """Everything known of one parameter."""


def growth_of(
    source: Source, target: Model, grow: Grow, order: Callable[[], Order] | None = None
) -> tuple[GrowthPlan, Callable[[str], TensorState]]:
    """The plan of a growth and what it makes of each parameter of the target. Raises UserError for one that cannot be.

    `order`: measures the units of the feed-forward layers, for a recipe that deals them out by their importance.
    """
    check_rows(target)
    plan = growth_plan(source.model, target, grow)
    if plan.splits and order is not None:
        plan = growth_plan(source.model, target, grow, order=order())
    if plan.learned is not None:
        raise UserError(f"grow.recipe: {grow.recipe} is learned on data; use it in a run (growth-ds train)", "GDS-G03")

    def read(name: str) -> TensorState:
        try:
            return grow_state(plan, name, source.read, gather)
        except ValueError as error:
            raise UserError(f"{source.path}: {error}") from None

    return plan, read


def grow_checkpoint(
    source: Checkpoint, target: Model, grow: Grow, out: Path, force: bool, finish_ramp: bool = False,
    store: Path | None = None,
) -> GrowthPlan:  # fmt: skip
    """Write the grown checkpoint. Raises UserError for a growth that cannot be, before anything is written.

    `store`: text for recipes that measure the old model on its validation split.
    """
    during, step = During.of(source.facts), int(source.facts.get("step", 0))
    if during.progress(step) is not None and not finish_ramp:
        raise UserError(
            f"{source.path}: is in the middle of a growth's ramp; train it to the ramp's end, then grow it, or give "
            "--finish-ramp to grow what it will end in"
        )
    plan, read = growth_of(source, target, grow, lambda: _order(source, store))
    facts = {**source.facts, "grown": [*source.facts.get("grown", []), plan.to_json()]}
    for key in ("probe", "ramp", "lr", "lr_decay"):
        facts.pop(key, None)
    facts |= during.after(plan, step).facts(step)
    write_checkpoint(
        out,
        target,
        read,
        facts,
        moments=source.moments and plan.moments != "reset",
        tokenizer=source.tokenizer,
        force=force,
    )
    return plan


def _order(source: Checkpoint, store: Path | None) -> Order:
    """The units of its feed-forward layers by their importance on a store. Raises UserError."""
    from growth_ds.importance import order_of

    if store is None:
        line = "grow: moebert measures the units on text; give --store with a store, or use upcycle"
        raise UserError(line, "GDS-G03")
    validation, _ = _validation(source, store, None, tokens=1 << 16)
    return dict(enumerate(order_of(source, source.model, validation.batches(validation.length))))


def import_checkpoint(folder: Path, out: Path, force: bool) -> Model:
    """A Hugging Face folder as a checkpoint without optimizer state. Raises UserError."""
    from growth_ds.interop.huggingface import read_huggingface

    check_free(out, force)
    imported = read_huggingface(folder)

    def read(name: str) -> TensorState:
        return TensorState(imported.weights[name].float(), None, None, 0)

    facts: dict[str, Any] = {"step": 0, "stage": 0, "seconds": 0.0, "imported_from": folder.name}
    if imported.unread is not None:
        if not bool(imported.unread.isfinite().all()):
            raise UserError(f"{folder}: the first rows of its position table are not finite; correct the weights")
        facts["unread_positions"] = imported.unread.tolist()
    tokenizer = tokenizer_only(imported.tokenizer, out) if imported.tokenizer else None
    try:
        write_checkpoint(out, imported.model, read, facts, moments=False, tokenizer=tokenizer, force=force)
    finally:
        if tokenizer:
            shutil.rmtree(tokenizer, ignore_errors=True)
    return imported.model


def tokenizer_only(folder: Path, near: Path) -> Path:
    """A temporary folder beside `near` with just the tokenizer's files."""
    from growth_ds.interop.tokenizer_files import TOKENIZER_FILES

    temporary = near.with_name(f".{near.name}.tokenizer")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, temporary / name)
    return temporary


def export_checkpoint(
    source: Checkpoint, out: Path, force: bool, finish_ramp: bool = False, fold: bool = False
) -> str | None:
    """A checkpoint as a folder that transformers opens, one with experts as a folder that brings its own loader.

    Raises UserError for a shape that transformers cannot hold.

    In the middle of a ramp a plain model is another function than the one that was trained. `fold`: the ramp as it
    stands, put into the weights as far as that goes; `finish_ramp`: what it will end in. Returns the sentence on that
    that the model card has, too. Without either, UserError says what cannot be folded and how far the logits move.
    """
    from growth_ds.interop.expert_folder import write_experts
    from growth_ds.interop.huggingface import write_huggingface
    from growth_ds.interop.names import class_of
    from growth_ds.model_card import card_of

    if fold and finish_ramp:
        raise UserError("export: --fold keeps the ramp as it stands, --finish-ramp takes its end; give one of them")
    read, note = _plain(source, finish_ramp, fold)
    has_experts = source.model.experts > 1
    kind = "" if has_experts else class_of(source.model)
    card = card_of(
        source.model, source.facts, source.path, has_tokenizer=source.tokenizer is not None, kind=kind,
        notes=[note] if note else [],
    )  # fmt: skip
    if has_experts:
        write_experts(source.model, read, out, source.tokenizer, force, card)
        return note
    rows = source.facts.get("unread_positions")
    unread = None if rows is None else torch.tensor(rows, dtype=torch.float32)
    write_huggingface(source.model, read, out, source.tokenizer, force, unread, card=card)
    return note


def _plain(source: Checkpoint, finish_ramp: bool, fold: bool) -> tuple[Callable[[str], torch.Tensor], str | None]:
    """What an export reads, and what it has to say of a ramp. Raises UserError in a ramp of which nothing is asked."""
    from growth_ds import folding

    def read(name: str) -> torch.Tensor:
        return source.tensor("weight", name)

    during, step = During.of(source.facts), int(source.facts.get("step", 0))
    progress = during.progress(step)
    if progress is None or during.ramp is None:
        return read, None
    where = f"in the middle of a growth's ramp (progress {progress:g})"
    if finish_ramp:
        return read, f"Exported {where} as what it will end in, which was not trained as such."
    found = folding.measure(load_module(source))
    if not fold:
        raise UserError(
            f"{source.path}: is {where}, which a plain BERT cannot hold: {found.text()}; train to its end, give --fold "
            "to export that, or --finish-ramp for what the ramp will end in"
        )
    return folding.fold(source.model, during.ramp.at(progress) or {}, read), f"Exported {where}: {found.text()}."


def load_module(source: Checkpoint, progress: float | None = None) -> Bert:
    """The model of a checkpoint, fp32, in eval mode; its ramp where the checkpoint stands, or at `progress`."""
    module = without_weights(source.model)
    module.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(source.tensor("weight", name))
    during = During.of(source.facts)
    if progress is None:
        progress = during.progress(int(source.facts.get("step", 0)))
    elif during.ramp is None:
        raise UserError(f"--ramp: {source.path} has no ramp; leave the option out")
    if during.ramp is not None and progress is not None:
        module.ramp = during.ramp.at(progress)
    return module.eval()


def evaluate_logits(
    source: Checkpoint, inputs: Path, out: Path, force: bool, progress: float | None = None
) -> dict[str, tuple[int, ...]]:
    """Our own forward on given rows, in a growth's ramp where the checkpoint stands, or at `progress`.

    `inputs`: npz with `ids` [B, T] and, if wanted, `mask` [B, T] (1 = token, 0 = padding) and `types` [B, T].
    Writes npz with `mlm` [B, T, V] and, if the model has the head, `nsp` [B, 2], float32. Returns their shapes.
    """
    check_free(out, force)
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out}: its folder does not exist; make it first")
    given = _integer_arrays(inputs)
    ids = given["ids"]
    mask, types = given.get("mask", torch.ones_like(ids)), given.get("types", torch.zeros_like(ids))
    _check_inputs(inputs, source.model, {"ids": ids, "mask": mask, "types": types})
    with torch.no_grad():
        mlm, nsp = load_module(source, progress).predict(ids, types, None if bool(mask.all()) else mask.bool())
    logits = {"mlm": mlm.numpy()} | ({} if nsp is None else {"nsp": nsp.numpy()})
    temporary = out.with_name(f".{out.name}.tmp.npz")
    np.savez(temporary, **logits)  # type: ignore[arg-type]
    temporary.replace(out)
    return {key: value.shape for key, value in logits.items()}


def _integer_arrays(path: Path) -> dict[str, torch.Tensor]:
    """The arrays of an npz, int64. Raises UserError."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            given = {key: arrays[key] for key in arrays.files}
    except (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not an npz of integer arrays ({error}); give ids, mask and types") from None
    if "ids" not in given or not given["ids"].size:
        raise UserError(f"{path}: has no array 'ids' with anything in it; give ids, mask and types")
    for key, array in given.items():
        if array.dtype.kind not in "iub":
            raise UserError(f"{path}: '{key}' holds {array.dtype}; give whole numbers")
    return {key: torch.from_numpy(array.astype(np.int64)) for key, array in given.items()}


def _check_inputs(path: Path, model: Model, arrays: dict[str, torch.Tensor]) -> None:
    ids = arrays["ids"]
    if ids.ndim != 2 or any(array.shape != ids.shape for array in arrays.values()):
        raise UserError(f"{path}: ids, mask and types must be [rows, tokens] of one shape")
    if ids.shape[1] > model.positions:
        raise UserError(f"{path}: rows of {ids.shape[1]} tokens exceed the model's {model.positions} positions")
    for key, limit in (("ids", model.vocab), ("types", model.segments), ("mask", 2)):
        low, high = int(arrays[key].min()), int(arrays[key].max())
        if low < 0 or high >= limit:
            raise UserError(f"{path}: {key} must lie in [0, {limit}), found {low if low < 0 else high}")


def evaluate_store(
    source: Checkpoint, store: Path, length: int | None, tokens: int, progress: float | None = None
) -> dict[str, Any]:
    """MLM loss and accuracy on a store's validation split, masks fixed; its unigram entropy. Raises UserError."""
    from growth_ds.evaluate.mlm import PlainEvaluator, unigram_entropy

    validation, text = _validation(source, store, length, tokens)
    length = validation.length
    measured = validation.measure(PlainEvaluator(load_module(source, progress)))
    rows = validation.rows(length)
    entropy = unigram_entropy(text.validation_counts())
    return {**measured, "unigram_entropy": entropy, "rows": rows, "length": length, "step": source.facts.get("step", 0)}


def _validation(source: Checkpoint, store: Path, length: int | None, tokens: int) -> tuple[Validation, Text]:
    """(Validation, Text) of a store that a checkpoint can read, in rows of `length`. Raises UserError."""
    from growth_ds.data.text import Text
    from growth_ds.evaluate.mlm import Validation

    length = length or min(128, source.model.positions)
    if not 3 < length <= source.model.positions:
        raise UserError(f"--length: {length} must lie in [4, {source.model.positions}], the model's positions")
    text = Text(Data(store=str(store)), seed=0, chunk=length)
    if text.tokenizer.vocab_size > source.model.vocab:
        raise UserError(
            f"{store}: its vocabulary of {text.tokenizer.vocab_size} exceeds the model's {source.model.vocab}; "
            "prepare the text with the model's own tokenizer"
        )
    return Validation(text, length, tokens), text
