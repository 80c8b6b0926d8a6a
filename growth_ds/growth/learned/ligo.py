"""LiGO (Wang et al., arXiv 2303.00980): vec(W_new) = depth mix x width maps x vec(W_old), both learned.

Width: B = [I; M], so that old units stay as they are and new ones are mixes of all old units. Ties (section 3.3): the
hidden stream has one M, for embeddings, norms, everything that writes into the stream and everything that reads it;
what attention reads is made as its values are (A_out = B_value), what the second FFN matrix reads as the first makes it
(A_down = B_up). A reader uses the same M, transposed and not normalised. Heads have no part in it: new rows of query,
key and value are mixes of all old rows.

As in the published code (VITA-Group/LiGO, `ligo.py`): layers are mixed first and then widened by M of the new layer
(query, key, value and FFN have one for each), the depth mix has coefficients of its own for each module type, and for
its biases, and the transform of the MLM head has an M of its own for what it makes. There the decoder is untied while
the operator learns; here it stays the word embedding, widened by the stream's M, and the transform's M learns to fit
it. The pooler, which LiGO does not have, is made and read by the stream's M. LiGO's optional residual term is left out.

An axis that does not grow has no numbers here: it stays as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from growth_ds.config import Model
from growth_ds.growth import draw
from growth_ds.growth.learned.operator import (
    Blend,
    Operator,
    Tables,
    columns,
    entries,
    noisy_stack,
    rows,
    uniform_rows,
)

KINDS = tuple(
    f"{module}.{part}"
    for module in ("query", "key", "value", "out", "attention_norm", "up", "down", "ffn_norm")
    for part in ("weight", "bias")
)
"""What has depth coefficients of its own, in the order of `Ligo.depth`."""


class Ligo(Operator):
    """The numbers of LiGO; each is None where its axis does not grow."""

    depth: Tensor | None
    """[16, layers, old layers], as in KINDS."""
    hidden: Tensor | None
    """[added, old]: M of the stream."""
    transform: Tensor | None
    """[added, old]: M of what the MLM head's transform makes."""
    heads: Tensor | None
    """[layers, 3, added, old]: M of query, key and value."""
    ffn: Tensor | None
    """[layers, added, old]."""

    def __init__(self, old: Model, new: Model, rank: int = 1, blend: Blend | None = None) -> None:
        super().__init__(old, new, rank, blend)
        layers = new.stored_layers
        inner, added = old.heads * old.head_size, (new.heads - old.heads) * new.head_size
        wide = (new.hidden - old.hidden, old.hidden)
        self._make("depth", new.layers > old.layers, len(KINDS), layers, old.stored_layers)
        self._make("hidden", wide[0] > 0, *wide)
        self._make("transform", wide[0] > 0, *wide)
        self._make("heads", added > 0, layers, 3, added, inner)
        self._make("ffn", new.ffn > old.ffn, layers, new.ffn - old.ffn, old.ffn)

    def _make(self, name: str, grows: bool, *shape: int) -> None:
        self.register_parameter(name, nn.Parameter(torch.empty(shape)) if grows else None)

    @torch.no_grad()
    def draw(self, seed: int) -> Ligo:
        for name, parameter in self.named_parameters():
            stream = draw.key(seed, f"ligo/{name}")
            if name == "depth":
                parameter.copy_(noisy_stack(parameter.shape[1], parameter.shape[2], stream, len(KINDS)))
            else:
                parameter.copy_(uniform_rows(parameter.shape, stream))
        return self

    def forward(self, small: Tables) -> dict[str, Tensor]:
        grown = {pattern: self._alone(pattern, table) for pattern, table in small.items() if "{layer}" not in pattern}
        for module in ("attention_norm", "ffn_norm"):
            for part in ("weight", "bias"):
                table = self._mixed(f"{module}.{part}", small[f"layers.{{layer}}.{module}.{part}"])
                grown[f"layers.{{layer}}.{module}.{part}"] = entries(table, self.hidden)
        return grown | self._attention(small) | self._feed_forward(small)

    def _mixed(self, kind: str, table: Tensor) -> Tensor:
        """[layers, ...] of the old layers' [old layers, ...]."""
        return table if self.depth is None else self.blend(table, self.depth[KINDS.index(kind)])

    def _alone(self, pattern: str, table: Tensor) -> Tensor:
        """A tensor outside the layers."""
        if pattern == "head.dense.weight":
            return columns(rows(table, self.transform), self.hidden)
        if pattern in ("head.dense.bias", "head.norm.weight", "head.norm.bias"):
            return entries(table, self.transform)
        if pattern == "pooler.weight":
            return columns(rows(table, self.hidden), self.hidden)
        if pattern in ("head.bias", "nsp.bias"):
            return table
        return entries(table, self.hidden) if table.ndim == 1 else columns(table, self.hidden)

    def _attention(self, small: Tables) -> dict[str, Tensor]:
        weight, bias = (self._projections(small[f"layers.{{layer}}.qkv.{part}"], part) for part in ("weight", "bias"))
        out = self._mixed("out.weight", small["layers.{layer}.out.weight"])
        out = columns(rows(out, self.hidden), None if self.heads is None else self.heads[:, 2])
        return {
            "layers.{layer}.qkv.weight": columns(rows(weight, self.heads), self.hidden).flatten(1, 2),
            "layers.{layer}.qkv.bias": entries(bias, self.heads).flatten(1, 2),
            "layers.{layer}.out.weight": out,
            "layers.{layer}.out.bias": entries(self._mixed("out.bias", small["layers.{layer}.out.bias"]), self.hidden),
        }

    def _projections(self, table: Tensor, part: str) -> Tensor:
        """[layers, 3, inner, ...] mixed from a table of query, key and value behind each other."""
        apart = table.unflatten(1, (3, -1)).unbind(1)
        kinds = (f"{module}.{part}" for module in ("query", "key", "value"))
        return torch.stack([self._mixed(*each) for each in zip(kinds, apart, strict=True)], dim=1)

    def _feed_forward(self, small: Tables) -> dict[str, Tensor]:
        name = "layers.{{layer}}.{}".format
        up, down = (self._mixed(f"{each}.weight", small[name(f"{each}.weight")]) for each in ("up", "down"))
        up_bias, down_bias = (self._mixed(f"{each}.bias", small[name(f"{each}.bias")]) for each in ("up", "down"))
        return {
            name("up.weight"): columns(rows(up, self.ffn), self.hidden),
            name("up.bias"): entries(up_bias, self.ffn),
            name("down.weight"): columns(rows(down, self.hidden), self.ffn),
            name("down.bias"): entries(down_bias, self.hidden),
        }
