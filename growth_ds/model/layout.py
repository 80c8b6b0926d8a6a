"""The table parameter -> named axes of our BERT: the only place that knows which dimension of which tensor is what.

Growth, conversion to other formats, cost and checks all read this table; see `growth_ds.axes` for its notation.
"""

from __future__ import annotations

import re

from growth_ds.axes import Layout, parse, shapes
from growth_ds.config import FFN_RANK, THIN, Model

FIXED = {"qkv": 3, "answer": 2}
"""Axes that are the same in every BERT: query/key/value, and the two answers of the next-sentence head."""

EMBEDDINGS = {
    "embeddings.word.weight": "vocab hidden",  # tied: also the decoder of the MLM head
    "embeddings.position.weight": "position hidden",
    "embeddings.segment.weight": "segment hidden",
}
EMBEDDING_NORM = {"embeddings.norm.weight": "hidden", "embeddings.norm.bias": "hidden"}
LAYERS = {
    "layers.{layer}.attention_norm.weight": "hidden",
    "layers.{layer}.attention_norm.bias": "hidden",
    "layers.{layer}.qkv.weight": "(qkv head head_size) hidden/",
    "layers.{layer}.qkv.bias": "(qkv head head_size)",
    "layers.{layer}.out.weight": "hidden (head head_size)/",
    "layers.{layer}.out.bias": "hidden",
    "layers.{layer}.ffn_norm.weight": "hidden",
    "layers.{layer}.ffn_norm.bias": "hidden",
    "layers.{layer}.up.weight": "ffn hidden/",
    "layers.{layer}.up.bias": "ffn",
    "layers.{layer}.down.weight": "hidden ffn/",
    "layers.{layer}.down.bias": "hidden",
}
THIN_ROWS = {
    "layers.{layer}.up.weight": f"{THIN} hidden/",
    "layers.{layer}.up.bias": THIN,
    "layers.{layer}.down.weight": f"hidden {THIN}/",
}
LIGHT_ROWS = {
    "layers.{layer}.qkv.weight": "(head head_size) hidden/",
    "layers.{layer}.qkv.bias": "(head head_size)",
}
"""Of layers that have values alone."""
LOW_RANK_ROWS = {
    "layers.{layer}.up.first.weight": f"{FFN_RANK} hidden/",
    "layers.{layer}.up.second.weight": f"ffn {FFN_RANK}/",
    "layers.{layer}.down.first.weight": f"{FFN_RANK} ffn/",
    "layers.{layer}.down.second.weight": f"hidden {FFN_RANK}/",
}
"""In place of `WHOLE`; the biases stay."""
WHOLE = ("layers.{layer}.up.weight", "layers.{layer}.down.weight")
EXPERT_ROWS = {
    "layers.{layer}.ffn_norm.weight": "expert hidden",
    "layers.{layer}.ffn_norm.bias": "expert hidden",
    "layers.{layer}.up.weight": "expert ffn hidden/",
    "layers.{layer}.up.bias": "expert ffn",
    "layers.{layer}.down.weight": "expert hidden ffn/",
    "layers.{layer}.down.bias": "expert hidden",
}
FINAL_NORM = {"norm.weight": "hidden", "norm.bias": "hidden"}
HEAD = {
    "head.dense.weight": "hidden hidden/",
    "head.dense.bias": "hidden",
    # The decoder is the word embedding: split there, the embedding itself would shrink. So the norm before it pays.
    "head.norm.weight": "hidden/",
    "head.norm.bias": "hidden/",
    "head.bias": "vocab",
}
NSP = {
    "pooler.weight": "hidden hidden/",
    "pooler.bias": "hidden",
    "nsp.weight": "answer hidden/",
    "nsp.bias": "answer",
}

EDGES = (
    ("head", ("layers.{layer}.out.weight",)),
    ("ffn", ("layers.{layer}.down.weight",)),
    ("hidden", ("layers.{layer}.qkv.weight",)),
    ("hidden", ("layers.{layer}.up.weight",)),
    ("ffn", ("layers.{layer}.down.first.weight",)),
    ("hidden", ("layers.{layer}.up.first.weight",)),
    (FFN_RANK, ("layers.{layer}.up.second.weight",)),
    (FFN_RANK, ("layers.{layer}.down.second.weight",)),
    ("hidden", ("pooler.weight",)),
    ("hidden", ("nsp.weight",)),
    ("hidden", ("head.dense.weight",)),
    ("hidden", ("head.norm.weight", "embeddings.word.weight")),
    ("hidden", ("head.norm.bias", "embeddings.word.weight")),
)
"""Where units of an axis are summed over: the axis, and the tensors on the way of which exactly one must pay (`/`)."""


def layout(model: Model) -> Layout:
    """The rows of a model of this kind (`norm`, `nsp`); sizes do not matter."""
    rows = dict(EMBEDDINGS)
    if model.norm == "post":
        rows |= EMBEDDING_NORM
    rows |= LAYERS if model.experts == 1 else {**LAYERS, **EXPERT_ROWS}
    if model.ffn_rank is not None:
        rows = {name: row for name, row in rows.items() if name not in WHOLE} | LOW_RANK_ROWS
    if model.norm == "pre":
        rows |= FINAL_NORM
    rows |= HEAD
    if model.nsp:
        rows |= NSP
    for layer in filter(model.is_light, range(model.stored_layers)):
        rows |= {name.replace("{layer}", str(layer)): row for name, row in LIGHT_ROWS.items()}
    for layer in range(0, model.stored_layers, model.thin_every) if model.thin_ffn is not None else ():
        for name, row in THIN_ROWS.items():
            rows[name.replace("{layer}", str(layer))] = row
    return rows


def sizes(model: Model) -> dict[str, int]:
    """Axis name -> units, the fixed axes included."""
    return {**model.sizes(), **FIXED}


def parameter_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape, nothing allocated."""
    return shapes(layout(model), sizes(model))


def check(model: Model, actual: dict[str, tuple[int, ...]]) -> None:
    """Prove that the table and a module agree.

    `actual` is parameter name -> shape as the module has it. Raises ValueError that names the first parameter without
    a row, row without a parameter, shape that differs, or edge that not exactly one tensor pays for.
    """
    expected = parameter_shapes(model)
    for name, shape in actual.items():
        if name not in expected:
            raise ValueError(f"layout has no row for '{name}'; add it to growth_ds/model/layout.py with its axes")
        if tuple(shape) != expected[name]:
            raise ValueError(f"'{name}' has shape {tuple(shape)}, its layout row says {expected[name]}")
    missing = sorted(set(expected) - set(actual))
    if missing:
        raise ValueError(f"the module has no parameter '{missing[0]}' that the layout lists")
    check_edges(layout(model))


def check_edges(rows: Layout) -> None:
    """Every edge has one payer and every `/` belongs to an edge. Raises ValueError."""
    paying: set[tuple[str, str]] = set()
    for axis, path in EDGES:
        present = [name for name in path if name in rows]
        if len(present) < len(path):
            continue
        payers = [name for name in path if _splits(rows[name], axis)]
        if len(payers) != 1:
            raise ValueError(f"edge {axis} -> {path[-1]} has {len(payers)} payers ({payers}), it needs exactly one")
        paying.add((axis, payers[0]))
    for name, row in rows.items():
        axes = parse(row)
        for axis, split in zip(axes.names, axes.split, strict=True):
            general = re.sub(r"\.\d+\.", ".{layer}.", name)  # a row of a thin layer stands on the edges of all layers
            known = (axis, name) in paying or ({THIN: "ffn"}.get(axis, axis), general) in paying
            if split and axis != "head_size" and not known:
                raise ValueError(f"'{name}' splits axis {axis}, but no edge says who it pays for; add it to EDGES")


def _splits(row: str, axis: str) -> bool:
    axes = parse(row)
    return any(name == axis and split for name, split in zip(axes.names, axes.split, strict=True))
