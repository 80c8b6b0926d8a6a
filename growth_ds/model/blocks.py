"""The parts of BERT: embeddings, a layer with its attention and its feed-forward, norms, the MLM head.

Shapes: B rows, T positions, H hidden, N heads, D head size, F ffn, V vocabulary, M predicted positions, Q positions of
each row that a layer is asked for. `ramp`: see `growth_ds.model.bert.Bert.ramp`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growth_ds.config import Model
from growth_ds.model.experts import Down, ExpertNorm, Routes, Up, by_expert
from growth_ds.ops.attention import attention
from growth_ds.ops.bias_dropout_residual_layer_norm import bias_dropout_residual_layer_norm
from growth_ds.ops.bias_gelu import bias_gelu
from growth_ds.ops.light_attention import Lending, weighted
from growth_ds.ops.local_attention import Local
from growth_ds.ops.masked_lm_loss import masked_lm_loss
from growth_ds.ops.ragged import Ragged

Ramp = Mapping[str, Tensor]
Seen = Ragged | Local | Lending | None
"""What attends to what, where it is not everything to everything in its row."""


def activated(x: Tensor, bias: Tensor, activation: str) -> Tensor:
    """The activation of x (..., units) + bias (units,)."""
    if activation == "relu":
        return F.relu(x + bias)
    return bias_gelu(x, bias, "tanh" if activation == "gelu_new" else "none")


class Activated(nn.Linear):
    """A projection and its activation: the bias is added where the activation is computed."""

    def __init__(self, inputs: int, outputs: int, activation: str) -> None:
        super().__init__(inputs, outputs)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """x (..., inputs) -> (..., outputs)."""
        if self.activation == "relu":
            return F.relu(F.linear(x, self.weight, self.bias))
        return activated(F.linear(x, self.weight), self.bias, self.activation)


class LowRank(nn.Module):
    """A projection, and for `Activated` its activation, by two factors with nothing between them."""

    def __init__(self, inputs: int, rank: int, outputs: int, activation: str | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, rank, bias=False)
        self.second = nn.Linear(rank, outputs, bias=False)
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """x (..., inputs) -> (..., outputs)."""
        x = self.second(self.first(x))
        return x + self.bias if self.activation is None else activated(x, self.bias, self.activation)


class Norm(nn.LayerNorm):
    """LayerNorm of a sum, with weighted statistics and masked outputs; all but the norm optional.

    A module that uses its own parameters in its own forward: ZeRO-3 gathers them for no one else.
    """

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        dropout: float = 0.0,
        weights: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The norm of residual + dropout(x), both (..., H).

        dropout: a probability, in training; weights (H,) of the elements in mean and variance; mask (H,) that
        multiplies the output.
        """
        p = dropout if self.training else 0.0
        x = bias_dropout_residual_layer_norm(
            x, self.weight, self.bias, self.eps, residual=residual, p=p, weights=weights
        )
        return x if mask is None else x * mask.to(x)


def normed(norm: nn.Module, x: Tensor, ramp: Ramp | None, own: str = "norm", **added: Any) -> Tensor:
    """x, with what is `added`, through the norm; `own` is the key of its weights, in place of those of all norms."""
    if ramp is None:
        return norm(x, **added)
    # By keyword, here and wherever a ramp is handed on: ZeRO-3's hooks rewrite the tensors of positional arguments.
    return norm(x, weights=ramp.get(own, ramp.get("norm")), mask=ramp.get("hidden"), **added)


class Embeddings(nn.Module):
    """Word + learned position + segment, normalised in post-LN models."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.word = nn.Embedding(model.vocab, model.hidden)
        self.position = nn.Embedding(model.positions, model.hidden)
        self.segment = nn.Embedding(model.segments, model.hidden)
        self.norm = Norm(model.hidden, eps=model.norm_eps) if model.norm == "post" else None
        self.dropout = model.dropout
        self.counts_real = model.family != "bert"

    def forward(self, ids: Tensor, segments: Tensor, ramp: Ramp | None = None, ragged: Ragged | None = None) -> Tensor:
        """ids, segments (B, T) -> (B, T, H), or (1, S, H) of the positions that are real."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        if ragged is not None:
            positions = ragged.ranks() if self.counts_real else positions.expand(ids.shape)
            ids, segments, positions = map(ragged.pack, (ids, segments, positions))
        x = self.word(ids) + self.position(positions) + self.segment(segments)
        if self.norm is not None:
            x = normed(self.norm, x, ramp)
        return F.dropout(x, self.dropout, self.training)


class QueryKeyValue(nn.Linear):
    """The three projections of attention in one product; the queries for fewer positions in a product of their own."""

    def forward(self, x: Tensor, kept: Tensor | None = None) -> tuple[Tensor, ...]:  # type: ignore[override]
        """x (B, T, H) -> (qkv (B, T, 3*N*D),), or for kept (B, Q, H) (q (B, Q, N*D), k and v (B, T, 2*N*D))."""
        if kept is None:
            return (F.linear(x, self.weight, self.bias),)
        inner = self.out_features // 3
        queries = F.linear(kept, self.weight[:inner], self.bias[:inner])
        return queries, F.linear(x, self.weight[inner:], self.bias[inner:])


class Layer(nn.Module):
    """Self-attention and feed-forward, each with its residual."""

    def __init__(self, model: Model, ffn: int, light: bool = False) -> None:
        super().__init__()
        inner = model.heads * model.head_size
        # A light layer has values alone.
        self.qkv = nn.Linear(model.hidden, inner) if light else QueryKeyValue(model.hidden, 3 * inner)
        self.out = nn.Linear(inner, model.hidden)
        self.attention_norm = Norm(model.hidden, eps=model.norm_eps)
        self.ffn_norm: nn.Module = Norm(model.hidden, eps=model.norm_eps)
        if model.experts > 1:
            self.up: nn.Module = Up(model.experts, model.hidden, ffn, model.activation)
            self.down: nn.Module = Down(model.experts, ffn, model.hidden)
            self.ffn_norm = ExpertNorm(model.experts, model.hidden, eps=model.norm_eps)
        elif model.ffn_rank is not None:
            self.up = LowRank(model.hidden, model.ffn_rank, ffn, model.activation)
            self.down = LowRank(ffn, model.ffn_rank, model.hidden)
        else:
            self.up = Activated(model.hidden, ffn, model.activation)
            self.down = nn.Linear(ffn, model.hidden)
        self.model = model

    def forward(
        self, x: Tensor, ramp: Ramp | None = None, kept: Tensor | None = None, ragged: Seen = None,
        routes: Routes | None = None, lent: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """x (B, T, H) -> (B, T, H), or for `kept` (B, Q, H), which alone ask and go on, (B, Q, H).

        Where `ragged` is `Lending`, the probabilities (B, N, T, T) beside it; `lent` (B, N, Q, T): those of the layer
        before, for a light layer.

        With padding: x (1, S, H) of the positions that are real, as `ragged` says, and kept (1, B*Q, H) of them.
        `routes`: the experts of the positions that go on, in a model that has experts.
        """
        residual, p = x if kept is None else kept, self.model.dropout
        if self.model.norm == "pre":
            asking = None if kept is None else normed(self.attention_norm, kept, ramp)
            mixed, lending = self._attention(normed(self.attention_norm, x, ramp), ramp, asking, ragged, lent)
            x, by = by_expert(residual + F.dropout(mixed, p, self.training), routes)
            x = x + F.dropout(self._ffn(normed(self.ffn_norm, x, ramp, **by), ramp, by), p, self.training)
        else:
            mixed, lending = self._attention(x, ramp, kept, ragged, lent)
            x, by = by_expert(normed(self.attention_norm, mixed, ramp, residual=residual, dropout=p), routes)
            x = normed(self.ffn_norm, self._ffn(x, ramp, by), ramp, residual=x, dropout=p, **by)
        x = x if routes is None else routes.restore(x)
        return x if lending is None else (x, lending)

    def _attention(
        self, x: Tensor, ramp: Ramp | None, kept: Tensor | None, ragged: Seen, lent: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        dropout, heads = self.model.attention_dropout if self.training else 0.0, self.model.heads
        packed = self.qkv(x, kept=kept) if lent is None else (self.qkv(x),)
        lending: Tensor | None = None
        if lent is not None:
            mixed = weighted(lent, packed[0], dropout)
        elif isinstance(ragged, Lending):
            lending = ragged.probabilities(packed, heads)
            mixed = weighted(lending, packed[-1][..., -heads * self.model.head_size :], dropout)
        elif ragged is None:
            mixed = attention(packed, heads, None, dropout)  # (B, Q, N*D)
        else:
            mixed = ragged.attention(packed, heads, dropout)
        if ramp is not None and "head" in ramp:
            by_head = mixed.unflatten(2, (heads, -1))
            mixed = (by_head * ramp["head"].to(mixed)[:, None]).flatten(2)
        return self.out(mixed), lending

    def _ffn(self, x: Tensor, ramp: Ramp | None, by: Mapping[str, Any]) -> Tensor:
        x = self.up(x, **by)  # (B, T, F)
        if ramp is not None and "ffn" in ramp:
            x = x * ramp["ffn"].to(x)
        return self.down(x, **by)


class Head(nn.Module):
    """The MLM head: transform, norm, and the word embedding as decoder."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.dense = Activated(model.hidden, model.hidden, model.activation)
        self.norm = Norm(model.hidden, eps=model.norm_eps)
        self.bias = nn.Parameter(torch.zeros(model.vocab))

    def forward(self, x: Tensor, word: Tensor, ramp: Ramp | None = None, labels: Tensor | None = None) -> Any:
        """x (..., H) -> logits (..., V); with labels (M,) for x (M, H): sum of the losses, and of the right answers."""
        x = normed(self.norm, self.dense(x), ramp, own="head.norm")
        return F.linear(x, word, self.bias) if labels is None else masked_lm_loss(x, word, self.bias, labels)
