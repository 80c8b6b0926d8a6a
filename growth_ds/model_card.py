"""The model card of an exported folder, `README.md`: what its checkpoint and its run's folder say, and no more.

The front matter is what the Hugging Face hub reads. Nothing is claimed of license, language or use: no file of a run
knows them. A card has no date, so that the same checkpoint gives the same card.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from growth_ds import __version__
from growth_ds.config import Model, Run
from growth_ds.errors import UserError
from growth_ds.model.cost import parameters
from growth_ds.report import units
from growth_ds.report.rows import growth_row
from growth_ds.run_folder import RunFolder

CARD = "README.md"
Record = Mapping[str, Any]


def card_of(
    model: Model, facts: Record, path: Path | None = None, *, has_tokenizer: bool, kind: str, notes: Sequence[str] = ()
) -> str:
    """The card of a model of transformers' class `kind`, or "" for one with a loader of its own.

    path: the checkpoint's folder; if it lies in its run's folder, the card tells of the run up to its step. notes: more
    sentences on what was exported.
    """
    told: tuple[list[str], list[str]] = ([], [])
    if path is not None and (history := _history(path, facts)) is not None:
        try:
            told = _run(history, facts), _versions(history, facts)
        except (KeyError, TypeError, ValueError, AttributeError):
            print(f"{history.path}: lines there that no run has written (the model card says less)", file=sys.stderr)
    parts = [
        _front(model, kind),
        f"# {_code(facts['name']) if facts.get('name') else kind or 'A BERT with experts'}\n",
        _about(model, facts, kind, notes),
        _load(kind, has_tokenizer),
        *told[0],
        _offline(facts),
        _checkpoint(facts),
        *told[1],
        "License, language and intended use are not known here; whoever publishes the model says them.\n",
    ]
    return "\n".join(part for part in parts if part)


def _run(history: RunFolder, facts: Record) -> list[str]:
    return [_plan(history.run()), _data(history), *_reached(history, facts), _growths(history, facts)]


def _history(path: Path, facts: Record) -> RunFolder | None:
    """The folder of the run that wrote a checkpoint, where it still lies in it."""
    folder = RunFolder(path.absolute().parent.parent)
    if facts.get("run") is None or not folder.config.is_file() or path.absolute().parent != folder.checkpoints:
        return None
    try:
        return folder if folder.run().digest() == facts["run"] else None
    except UserError as error:
        print(f"{error} (the model card says less)", file=sys.stderr)
        return None


def _front(model: Model, kind: str) -> str:
    family = model.family if kind else "bert"
    task = "feature-extraction" if kind.endswith("Model") else "fill-mask"
    library = "transformers" if kind else "pytorch"
    tags = "\n".join(f"- {tag}" for tag in (family, task, "growth_ds"))
    return f"---\nlibrary_name: {library}\npipeline_tag: {task}\ntags:\n{tags}\n---\n"


def _about(model: Model, facts: Record, kind: str, notes: Sequence[str]) -> str:
    plain = model.model_copy(update={"stored_layers": model.layers, "shared_runs": None, "ffn_rank": None})
    experts = "" if model.experts == 1 else f"{model.experts} experts of "
    sizes = (
        f"{model.layers} layers of {model.hidden}, {model.heads} heads of {model.head_size}, {experts}ffn {model.ffn}, "
        f"{model.vocab:,} pieces, {model.positions} positions; {parameters(plain):,} parameters"
    )
    origin = next((f", from {_code(facts[key])}" for key in ("imported_from", "converted_from") if facts.get(key)), "")
    first = f"{kind or 'A BERT with experts'}: {sizes}. Written by growth_ds {__version__}{origin}."
    return "\n\n".join([first, *notes]) + "\n"


def _load(kind: str, has_tokenizer: bool) -> str:
    if not kind:
        lines = ["from expert_bert import load", "", 'model = load(".")  # in this folder; see expert_bert.py']
    else:
        auto = "AutoModel" if kind.endswith("Model") else "AutoModelForMaskedLM"
        names = f"{auto}, AutoTokenizer" if has_tokenizer else auto
        lines = [f"from transformers import {names}", "", f'model = {auto}.from_pretrained(".")  # this folder']
        lines += ['tokenizer = AutoTokenizer.from_pretrained(".")'] if has_tokenizer else []
    return "\n".join(["## Load", "", "```python", *lines, "```", ""])


def _plan(run: Run) -> str:
    rows, before = [], None
    for number, stage in enumerate(run.stages):
        model, grow = stage.planned_model, ""
        if before is not None and model != before:
            said = stage.grow.model_dump(mode="json", exclude_defaults=True) or {"recipe": stage.grow.recipe}
            grow = ", ".join(f"{key}: {value}" for key, value in said.items())
        sizes = [model.layers, model.hidden, model.heads, model.ffn, stage.length, stage.batch.global_]
        rows.append([number, *sizes, f"{stage.total_steps:,}", _text(grow)])
        before = model
    heads = ["stage", "layers", "hidden", "heads", "ffn", "length", "batch", "steps", "grown by"]
    optim = f"{run.optim.name}, peak learning rate {run.optim.lr:g}, seed {run.seed}."
    return f"## Plan of the run\n\n{_table(heads, rows)}\n{optim}\n"


def _data(history: RunFolder) -> str:
    data = history.run().data
    start: Record = next(_events(history, "start", None), {})
    words = ", whole words" if data.whole_word else ""
    lines = [f"Objective {data.objective}, {units.percent(data.mask_prob, 0)} of each row masked{words}."]
    if start.get("store"):
        lines.append(f"SHA-256 of the text's store: `{start['store']}`.")
    if start.get("start"):
        lines.append(
            f"The run began with the weights of a checkpoint (SHA-256 of its manifest: `{start['start']}...`)."
        )
    return "## Data\n\n" + "\n".join(lines) + "\n"


def _reached(history: RunFolder, facts: Record) -> Iterator[str]:
    """The last losses up to the checkpoint's step, and what was spent."""
    records = [line for line in history.records(history.metrics) if _is_past(line, facts)]
    train: Record | None = next((line for line in reversed(records) if "loss" in line), None)
    ends = _events(history, "finish", facts)
    checked = [line for line in (*records, *ends) if "valid_loss" in line]
    if train is None:
        return
    rows = [["training loss", f"{train['loss']:.4f} nats", train["step"]]]
    if checked:
        last = checked[-1]
        name = "validation loss"
        name += f", {last['valid_length']} tokens a row" if "valid_length" in last else ""
        rows.append([name, f"{last['valid_loss']:.4f} nats", last["step"]])
        rows.append(["masked tokens right in validation", units.percent(last["valid_accuracy"]), last["step"]])
    entropy = next((line.get("unigram_entropy") for line in _events(history, "start", facts)), None)
    rows += [["entropy of single tokens, for comparison", f"{entropy:.4f} nats", ""]] if entropy is not None else []
    rows += [
        ["tokens read", f"{train['tokens']:,}", train["step"]],
        ["FLOPs", units.plain_flops(train["flops"]), train["step"]],
        ["training time", units.duration(train["seconds"]), train["step"]],
    ]
    yield f"## Reached\n\n{_table(['', '', 'at step'], rows)}"


def _growths(history: RunFolder, facts: Record) -> str:
    rows = []
    for record in _events(history, "growth", facts):
        row = growth_row(dict(record))
        exact = "exact" if row.exact else "not exact"
        losses = f"{row.loss_before:.4f} -> {row.loss_after:.4f}"
        rows.append([row.step, ", ".join(change.text() for change in row.changes), exact, row.moments, losses,
                     f"`{record['digest'][:12]}`"])  # fmt: skip
    heads = ["step", "grown", "by plan", "moments", "probe loss (nats)", "plan"]
    return f"## Growths\n\n{_table(heads, rows)}" if rows else ""


def _offline(facts: Record) -> str:
    """Growths outside of a run, by `growth-ds grow`."""
    lines = []
    for record in facts.get("grown", []):
        axes = [f"{axis['axis']} {axis['old']} -> {axis['new']} ({axis['recipe']})" for axis in record.get("axes", [])]
        exact = "exact" if record.get("exact") else "not exact"
        lines.append(f"- {_text(', '.join(axes) or 'no axis')}, {exact}, plan `{str(record.get('digest'))[:12]}`")
    return "## Grown outside of a run\n\n" + "\n".join(lines) + "\n" if lines else ""


def _checkpoint(facts: Record) -> str:
    probe = facts.get("probe") or {}
    rows = [
        ("step", f"{facts['step']:,}" if facts.get("step") else None),
        ("stage", facts.get("stage") if facts.get("run") else None),
        ("tokens", f"{facts['tokens']:,}" if facts.get("tokens") else None),
        ("precision", facts.get("precision")),
        ("ZeRO stage", facts.get("zero")),
        ("ranks", facts.get("ranks")),
        ("loss on its probe batch", f"{probe['loss']:.4f} nats" if probe else None),
        ("SHA-256 of the run's configuration", f"`{_text(facts['run'])}`" if facts.get("run") else None),
    ]
    known = [(key, _text(value)) for key, value in rows if value is not None]
    return f"## Checkpoint\n\n{_table(['', ''], known)}" if known else ""


def _versions(history: RunFolder, facts: Record) -> list[str]:
    """Of every start of the run; those that went on with others have a line of their own."""
    told: dict[str, None] = {}
    for record in _events(history, "start", facts):
        told[", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())] = None
    lines = [f"- {_text(line)}" for line in told if line]
    return ["## Versions\n\n" + "\n".join(lines) + "\n"] if lines else []


def _events(history: RunFolder, kind: str, facts: Record | None) -> Iterator[Record]:
    """Lines of the ledger up to the checkpoint's step; all without `facts`."""
    for record in history.records(history.ledger):
        if record.get("event") == kind and (facts is None or _is_past(record, facts)):
            yield record


def _is_past(record: Record, facts: Record) -> bool:
    """Whether a line was written before the checkpoint; a growth at its step belongs to the stage that it began."""
    return (record["step"], record["stage"]) <= (facts.get("step", 0), facts.get("stage", 0))


def _table(heads: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _code(text: object) -> str:
    return f"`{_text(text).replace('`', '')}`"


def _text(value: object) -> str:
    """Within one cell of a table: names may be a stranger's."""
    return "".join(letter if letter.isprintable() and letter not in "|<" else " " for letter in str(value))[:200]
