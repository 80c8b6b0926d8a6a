"""How fast this machine multiplies matrices: a large square, and the products of one training step alone.

In bf16, or in fp32 where the processor has no bf16 of its own and emulates it a hundred times slower (`DTYPE`). The
square (4096 x 4096 x 4096) is the ceiling of record. The step's own products, forward and both of the backward, are
smaller and mostly slower: their rate says what is left for everything that is not a product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.common import seconds_of
from benchmarks.peers import Case
from growth_ds.engine.ds_config import resolve_precision

SIDE = 4096
DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32}[resolve_precision("auto")]
Product = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    """`count` products of (m, k) by (k, n) in one forward, each `batch` times."""

    m: int
    k: int
    n: int
    count: int = 1
    batch: int = 1

    @property
    def flops(self) -> int:
        """Of all of them in forward and backward."""
        return 3 * 2 * self.m * self.k * self.n * self.count * self.batch


def shapes(case: Case, rows: int) -> list[Shape]:
    """The products of a forward over `rows` rows; the last layer's at the masked positions, but for keys and values."""
    model, length, masked = case.model, case.length, case.masked
    inner, heads = model.heads * model.head_size, rows * model.heads
    found = [Shape(rows * length, model.hidden, 2 * inner)]  # the last layer's keys and values
    queries = [(length, model.layers - 1, 3 * inner), (masked, 1, inner)]
    for count, layers, first in queries if model.layers > 1 else queries[1:]:
        tokens = rows * count
        found += [
            Shape(tokens, model.hidden, first, layers),
            Shape(tokens, inner, model.hidden, layers),
            Shape(tokens, model.hidden, model.ffn, layers),
            Shape(tokens, model.ffn, model.hidden, layers),
            Shape(count, model.head_size, length, layers, heads),  # q k^T
            Shape(count, length, model.head_size, layers, heads),  # weights v
        ]
    return [
        *found,
        Shape(rows * masked, model.hidden, model.hidden),
        Shape(rows * masked, model.hidden, model.vocab),
    ]


def _products(shape: Shape, device: str) -> list[Product]:
    """Forward x w^T, and in the backward g w and g^T x; one batch of them where `batch` > 1."""
    lead = () if shape.batch == 1 else (shape.batch,)
    options: dict[str, Any] = {"dtype": DTYPE, "device": device}
    x = torch.randn(*lead, shape.m, shape.k, **options)
    w = torch.randn(*lead, shape.n, shape.k, **options)
    g = torch.randn(*lead, shape.m, shape.n, **options)
    wt, gt = w.transpose(-1, -2), g.transpose(-1, -2)
    return [lambda: x @ wt, lambda: g @ w, lambda: gt @ x]


def _seconds(product: Product, about: float) -> float:
    """Mean seconds of one product, over about `about` seconds."""
    count = max(1, round(about / seconds_of(product)))

    def many() -> None:
        for _ in range(count):
            product()

    return seconds_of(many) / count


class Ceiling:
    """Both rates, a little at a time, so that they can take turns with what they are compared with."""

    def __init__(self, device: str) -> None:
        self.device = device
        a, b = (torch.randn(SIDE, SIDE, dtype=DTYPE, device=device) for _ in range(2))
        bt = b.t()
        forms: list[Product] = [lambda: a @ b, lambda: a @ bt]
        for form in forms:
            form()
        self.square = min(forms, key=lambda form: _seconds(form, 0.5))
        """The faster of b as it lies and b transposed."""

    def square_rate(self, seconds: float) -> float:
        """FLOP/s of the square."""
        return 2 * SIDE**3 / _seconds(self.square, seconds)

    def shapes_rate(self, case: Case, rows: int, seconds: float) -> float:
        """FLOP/s of one step's products, each weighted by the time it takes; measured for about `seconds`."""
        flops, taken = 0, 0.0
        every = shapes(case, rows)
        for shape in every:
            for product in _products(shape, self.device):
                product()
                taken += shape.count * _seconds(product, seconds / len(every) / 3)
            flops += shape.flops
        return flops / taken
