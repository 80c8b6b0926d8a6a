"""Every recipe on several shapes and both norms, and what is expected of it: the table of `test_recipes.py`.

`benchmarks/exactness.py` runs the same cases. A source is a randomised transformers model with hidden 48, 3 heads of
16, ffn 40, 61 words and 12 positions (`transformers_models.SIZES`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

OLD = {"hidden": 48, "heads": 3, "ffn": 40, "vocab_size": 61, "positions": 12, "segments": 2, "experts": 1}
BOTH = ("post", "pre")


@dataclass(frozen=True)
class Case:
    """One growth. `grow` may name other recipes for some axes."""

    recipe: str
    norm: str
    change: Mapping[str, int] = field(default_factory=dict)
    """Config key -> size after the growth."""
    exact: bool = True
    """Whether the function is kept right after the growth, by measurement and by the plan."""
    ramp: bool = False
    """Whether it is kept by a ramp: then the plain weights are another function."""
    layers: int = 2
    """Depth of the source."""
    stored: int | None = None
    """Stored layers of a source that shares them; it is a model of ours, exported first."""
    head: str = "nsp"
    """Heads of the source: `mlm` is one without next-sentence head."""
    grow: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> str:
        """What grows, in words."""
        old = {**OLD, "layers": self.layers, "stored_layers": self.stored or self.layers}
        parts = [f"{key} {old[key]}->{new}" if key in old else f"+{key}" for key, new in self.change.items()]
        if "layers" not in self.change and (self.layers != 2 or not self.change):
            parts.append(f"{self.layers} layers")
        if self.head == "mlm" and "nsp" not in self.change:
            parts.append("no NSP head")
        parts += [f"{key}={value}" for key, value in self.grow.items()]
        return ", ".join(parts)

    @property
    def in_transformers(self) -> bool:
        """Whether transformers holds the grown model; else our own forward is the judge."""
        fits = self.change.get("heads", OLD["heads"]) * 16 == self.change.get("hidden", OLD["hidden"])
        return fits and "experts" not in self.change

    def __str__(self) -> str:
        return f"{self.recipe}-{self.norm}-{self.shape}".replace(" ", "_")


def width(hidden: int, ffn: int) -> dict[str, int]:
    """Hidden, as many heads of 16 as fill it, and FFN."""
    return {"hidden": hidden, "heads": hidden // 16, "ffn": ffn}


DOUBLE, TRIPLE, FOURFOLD = width(96, 80), width(144, 120), width(192, 160)
UNEVEN = (width(64, 57), width(80, 97))
WIDTHS = {
    # recipe: is it exact at (whole multiples, uneven sizes)? None: it refuses them
    "tile": (True, False),
    "interleave": (True, False),
    "fpi": (True, False),
    "net2net": (True, False),
    "aki": (False, False),
    "tile-edge": (False, False),
    "tile-center": (False, False),
    "center": (False, False),
    "zero-pad": (False, False),
    "hyperclone": (True, None),
    "staged": (True, None),
    "staged-published": (True, None),
    "msg": (True, True),
    "lemon": (True, False),
    "weighted": (True, True),
}
DEPTHS = ((2, 4), (2, 3), (3, 5), (3, 6))
DEPTH_ALONE = {
    # recipe: is it exact? All four depths
    "stack": False,
    "gradual": False,
    "midas": False,
    "insert-identity": True,
    "insert-gated": True,
}
DEPTH_TOO = {
    # recipes that grow widths too: two depths
    "tile": False,
    "interleave": False,
    "fpi": False,
    "aki": False,
    "staged": False,
    "staged-published": False,
    "tile-edge": False,
    "tile-center": False,
    "center": False,
    "net2net": True,
    "zero-pad": True,
    "lemon": True,
    "msg": True,
}
GATED = ("msg", "insert-gated")
"""Recipes that grow nothing without a ramp."""
OTHERS: dict[str, dict[str, Any]] = {"weighted": {"heads": "tile", "ffn": "tile"}}
"""Recipes for the axes that a recipe leaves out."""


def cases() -> list[Case]:
    """All of them."""
    return [
        case
        for norm in BOTH
        for some in (_widths, _parts, _depths, _ramps, _lookup, _compositions)
        for case in some(norm)
    ]


def _widths(norm: str) -> Iterator[Case]:
    for recipe, (even, uneven) in WIDTHS.items():
        grow, ramp = OTHERS.get(recipe, {}), recipe in GATED
        yield Case(recipe, norm, DOUBLE, even, ramp, grow=grow)
        yield Case(recipe, norm, TRIPLE, even, ramp, layers=3, grow=grow)
        if uneven is None:
            yield Case(recipe, norm, DOUBLE, even, ramp, layers=3, grow=grow)
            yield Case(recipe, norm, FOURFOLD, even, ramp, grow=grow)
        elif recipe != "lemon" or norm == "pre":
            for change in UNEVEN:
                yield Case(recipe, norm, change, uneven, ramp or recipe == "weighted", grow=grow)


def _parts(norm: str) -> Iterator[Case]:
    """Heads alone, which transformers does not hold; FFN alone at uneven ratios; noise that sums to zero."""
    for recipe in WIDTHS:
        if recipe == "weighted":
            yield Case(recipe, norm, {"hidden": 72}, ramp=True)
            continue
        exact, ramp = recipe not in ("aki", "tile-edge", "tile-center", "center"), recipe in GATED
        whole = WIDTHS[recipe][1] is None
        yield Case(recipe, norm, {"heads": 6 if whole else 5}, exact, ramp)
        yield Case(recipe, norm, {"ffn": 120 if whole else 57}, exact, ramp, layers=3)
    yield Case("aki", norm, {"hidden": 96})
    yield Case("net2net", norm, DOUBLE, grow={"noise": 0.1})
    yield Case("hyperclone", norm, DOUBLE, grow={"noise": 0.0})
    for ffn in (80, 120, 160, 200):
        yield Case("ffn-share", norm, {"ffn": ffn}, layers=3 if ffn == 120 else 2)


def _depths(norm: str) -> Iterator[Case]:
    for recipe, exact in DEPTH_ALONE.items():
        for old, new in DEPTHS:
            grow = {"block": 1} if (recipe, old, new) == ("midas", 3, 5) else {}  # whole blocks
            yield Case(recipe, norm, {"layers": new}, exact, recipe in GATED, old, grow=grow)
    yield Case("stack", norm, {"layers": 7}, exact=False)
    for recipe, exact in DEPTH_TOO.items():
        for old, new in ((2, 4), (3, 5)):
            yield Case(recipe, norm, {"layers": new}, exact, recipe in GATED, old)
    for stored, layers, new in ((1, 4, 4), (2, 4, 4), (2, 6, 6), (3, 6, 6), (1, 4, 2)):
        yield Case("unshare", norm, {"stored_layers": new}, layers=layers, stored=stored)


def _ramps(norm: str) -> Iterator[Case]:
    """Recipes that are exact only if a ramp is asked for."""
    for change in (*UNEVEN, DOUBLE):
        yield Case("zero-pad", norm, change, ramp=True, grow={"ramp": 100})
        if norm == "pre" and change is not DOUBLE:
            yield Case("lemon", norm, change, ramp=True, grow={"ramp": 100})
    yield Case("tile", norm, UNEVEN[0], ramp=True, grow={"ramp": 100})
    yield Case("interleave", norm, UNEVEN[1], ramp=True, grow={"ramp": 100})


def _lookup(norm: str) -> Iterator[Case]:
    for recipe in ("pad-vocab", "extend-vocab"):
        for size in (62, 64, 96, 128):
            yield Case(recipe, norm, {"vocab_size": size}, layers=3 if size == 96 else 2)
    for size in (13, 16, 24, 50):
        yield Case("extend-positions", norm, {"positions": size}, layers=3 if size == 24 else 2)
    for size in (3, 4, 5, 8):
        yield Case("extend-segments", norm, {"segments": size}, layers=3 if size == 4 else 2)
    for experts, width_ in ((2, {}), (3, {}), (4, {}), (2, {"ffn": 57}), (3, DOUBLE)):
        layers, grow = 3 if experts == 4 else 2, dict.fromkeys(width_, "tile")
        yield Case("upcycle", norm, {"experts": experts, **width_}, layers=layers, grow=grow)
    yield Case("interleave", norm, {"positions": 24}, exact=False)
    for layers, head in ((2, "nsp"), (3, "nsp"), (1, "nsp"), (2, "mlm")):
        yield Case("identity", norm, {}, layers=layers, head=head)
    yield Case("add-nsp", norm, {"nsp": True}, head="mlm")
    yield Case("add-nsp", norm, {"nsp": True}, layers=3, head="mlm")


def _compositions(norm: str) -> Iterator[Case]:
    """Several recipes, or one on axes that have to agree."""
    axes = {"hidden": "tile", "heads": "tile", "ffn": "tile"}
    yield Case("add-nsp", norm, {"nsp": True, **DOUBLE}, head="mlm", grow=axes)
    yield Case("add-nsp", norm, {"nsp": True, "layers": 3}, head="mlm", grow={"layers": "insert-identity"})
    yield Case("compound", norm, {"ffn": 80})
    yield Case("compound", norm, {"ffn": 120, "positions": 24}, layers=3)
    yield Case("compound", norm, {"layers": 4, "ffn": 80, "positions": 24}, exact=False)
    yield Case("compound", norm, {"layers": 6}, exact=False, layers=3)
    yield Case("tile", norm, {**DOUBLE, "positions": 24})
    yield Case("tile", norm, {**DOUBLE, "layers": 4}, exact=False)
    yield Case("fpi", norm, {**DOUBLE, "layers": 4}, grow={"layers": "insert-identity"})
    yield Case("net2net", norm, {**TRIPLE, "layers": 5}, layers=3)
    yield Case("hyperclone", norm, {**DOUBLE, "layers": 4}, exact=False, grow={"layers": "stack"})
    yield Case("hyperclone", norm, {**DOUBLE, "layers": 4}, grow={"layers": "insert-identity"})
    yield Case("staged", norm, {**DOUBLE, "layers": 3}, grow={"layers": "net2net"})
    yield Case("lemon", norm, {**DOUBLE, "layers": 4})
    if norm == "pre":
        yield Case("lemon", norm, {**UNEVEN[0], "layers": 3}, ramp=True, grow={"ramp": 100})
        yield Case("lemon", norm, {**width(112, 97), "layers": 3}, ramp=True, grow={"ramp": 100})
        yield Case("lemon", norm, width(112, 97), exact=False)
    yield Case("msg", norm, {**UNEVEN[0], "layers": 3}, ramp=True)
    yield Case("msg", norm, {**DOUBLE, "layers": 4, "positions": 16}, ramp=True, grow={"positions": "tile"})
    yield Case("zero-pad", norm, {**UNEVEN[0], "layers": 3}, ramp=True, grow={"ramp": 100})
    yield Case("zero-pad", norm, {"ffn": 57, "layers": 4})
    mixed = {"heads": "fpi", "ffn": "net2net", "layers": "insert-gated"}
    yield Case("weighted", norm, {**UNEVEN[0], "layers": 4}, ramp=True, grow=mixed)
    still = {"heads": "lemon", "ffn": "zero-pad", "layers": "insert-identity"}
    yield Case("weighted", norm, {**UNEVEN[1], "layers": 3}, ramp=True, grow=still)
    behind = {"heads": "msg", "ffn": "msg", "layers": "lemon"}
    yield Case("interleave", norm, {**DOUBLE, "layers": 4}, ramp=True, grow=behind)
    tables = {"vocab_size": "extend-vocab", "positions": "extend-positions", "segments": "extend-segments"}
    yield Case("interleave", norm, {**DOUBLE, "vocab_size": 64, "positions": 20, "segments": 3}, grow=tables)
    once = {"stored_layers": "unshare", "ffn": "tile"}
    yield Case("unshare", norm, {"stored_layers": 4, "ffn": 57}, layers=4, stored=2, grow=once)
