"""The notation for named axes: `"hidden (head head_size)/"` says what each dimension of a tensor counts.

A dimension is one axis name, or several in parentheses (outermost first, as in einops). A `/` behind a dimension marks
the *split* side: this tensor reads the units of that axis, so growing the axis divides its weights among the copies.
Without the mark the side is *copied*: the tensor makes the units. The model's table of such rows is its layout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Literal

LAYER = "stored_layer"
"""The axis that stands in the parameter's name, as `{layer}`, and not in its shape."""


@dataclass(frozen=True)
class Axes:
    """The axes of one tensor in row-major order, one entry for each named axis."""

    names: tuple[str, ...]
    split: tuple[bool, ...]
    """Whether the tensor reads (True) or makes (False) the units of each axis."""
    dims: tuple[tuple[str, ...], ...]
    """The axes that each tensor dimension is composed of."""

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of the tensor for the given axis sizes (units)."""
        return tuple(prod(sizes[name] for name in dim) for dim in self.dims)

    def unfolded(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Shape with one dimension for each named axis."""
        return tuple(sizes[name] for name in self.names)


@cache
def parse(row: str) -> Axes:
    """Read one layout row. Raises ValueError if it is not of the form `name (name name)/ name/`."""
    names: list[str] = []
    split: list[bool] = []
    dims: list[tuple[str, ...]] = []
    for text in re.findall(r"\([^)]*\)/?|\S+", row):
        reads = text.endswith("/")
        parts = tuple(text.rstrip("/").strip("()").split())
        if not parts or not all(part.isidentifier() for part in parts):
            raise ValueError(f"layout row {row!r}: {text!r} is not an axis name or a group of them")
        dims.append(parts)
        names.extend(parts)
        split.extend([reads] * len(parts))
    if not dims:
        raise ValueError("a layout row needs at least one axis")
    return Axes(tuple(names), tuple(split), tuple(dims))


Layout = Mapping[str, str]
"""Parameter name, with `{layer}` for the index of a stored layer, -> axes row. A row with the index written out counts
for that layer in place of the general one."""


def expand(layout: Layout, sizes: Mapping[str, int]) -> dict[str, tuple[str, int | None]]:
    """Every parameter name -> (name in the layout, index of its stored layer or None), in the layout's order."""
    names: dict[str, tuple[str, int | None]] = {}
    per_layer = [pattern for pattern in layout if "{layer}" in pattern]
    for layer in range(sizes[LAYER]):
        for pattern in per_layer:
            name = pattern.replace("{layer}", str(layer))
            names[name] = (name if name in layout else pattern, layer)
    alone: dict[str, tuple[str, int | None]] = {
        pattern: (pattern, None) for pattern in layout if "{layer}" not in pattern and pattern not in names
    }
    return alone | names


def role(name: str) -> Literal["matrix", "norm", "bias"]:
    """What a parameter is by its name, for its initial value and its decay; a norm's bias is a bias."""
    if name.endswith("bias"):
        return "bias"
    return "norm" if "norm" in name else "matrix"


def shapes(layout: Layout, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Every parameter name -> shape."""
    return {name: parse(layout[pattern]).shape(sizes) for name, (pattern, _) in expand(layout, sizes).items()}
