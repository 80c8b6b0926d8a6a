"""A BERT whose feed-forward layers are experts, in plain torch. It opens the folder that growth-ds wrote it into:

    from expert_bert import load
    model = load(".")                        # config.json, model.safetensors, routing.safetensors
    mlm, nsp = model(ids)                    # logits (B, T, V), and (B, 2) of the next-sentence head or None

Needs torch and safetensors, and nothing of growth_ds. Which expert a position goes through is looked up by its token id
in the routing table, the same in every layer; its output is not scaled. An expert is its two projections and the
LayerNorm beside them. There is no dropout.

Shapes: B rows, T positions, H hidden, N heads, D head size, F ffn, E experts, V vocabulary, S positions of one expert.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

ACTIVATIONS: dict[str, Any] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class Stack(nn.Module):
    """The weight and the bias of every expert, one behind the other."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))
        self.bias = nn.Parameter(torch.zeros(shape[:2]))


class Layer(nn.Module):
    """Self-attention, and a feed-forward part of which each position goes through one expert."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, ffn, experts = config["hidden"], config["ffn"], config["experts"]
        inner = config["heads"] * config["head_size"]
        self.config, self.pre = config, config["norm"] == "pre"
        self.qkv, self.out = nn.Linear(hidden, 3 * inner), nn.Linear(inner, hidden)
        self.attention_norm = nn.LayerNorm(hidden, eps=config["norm_eps"])
        self.up, self.down = Stack(experts, ffn, hidden), Stack(experts, hidden, ffn)
        self.ffn_norm = Stack(experts, hidden)

    def forward(self, x: Tensor, mask: Tensor | None, experts: Tensor) -> Tensor:
        """x (B, T, H), mask (B, T) bool, True = token, experts (B, T) int64 -> (B, T, H)."""
        x = x + self.attention(self.attention_norm(x) if self.pre else x, mask)
        if not self.pre:
            x = self.attention_norm(x)
        y = torch.zeros_like(x)
        for expert in range(self.config["experts"]):
            here = experts == expert
            y[here] = self.expert(expert, x[here])
        return y

    def attention(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, H) -> (B, T, H)."""
        heads = self.config["heads"]
        q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=2))
        keys = None if mask is None else mask[:, None, None]
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=keys).transpose(1, 2).flatten(2))

    def expert(self, expert: int, x: Tensor) -> Tensor:
        """One expert, and the residual: (S, H) -> (S, H)."""
        norm, eps = self.ffn_norm, self.config["norm_eps"]
        normed = partial(F.layer_norm, normalized_shape=x.shape[-1:], weight=norm.weight[expert], eps=eps)
        y = normed(x, bias=norm.bias[expert]) if self.pre else x
        y = ACTIVATIONS[self.config["activation"]](F.linear(y, self.up.weight[expert], self.up.bias[expert]))
        y = x + F.linear(y, self.down.weight[expert], self.down.bias[expert])
        return y if self.pre else normed(y, bias=norm.bias[expert])


class Embeddings(nn.Module):
    """Word + learned position + segment, normalised in post-LN models."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden = config["hidden"]
        self.word = nn.Embedding(config["vocab_size"], hidden)
        self.position = nn.Embedding(config["positions"], hidden)
        self.segment = nn.Embedding(config["segments"], hidden)
        self.norm = nn.LayerNorm(hidden, eps=config["norm_eps"]) if config["norm"] == "post" else None

    def forward(self, ids: Tensor, segments: Tensor) -> Tensor:
        """ids, segments (B, T) int64 -> (B, T, H)."""
        x = self.word(ids) + self.position(torch.arange(ids.shape[1], device=ids.device)) + self.segment(segments)
        return x if self.norm is None else self.norm(x)


class Head(nn.Module):
    """The MLM head; its decoder is the word embedding."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.dense = nn.Linear(config["hidden"], config["hidden"])
        self.norm = nn.LayerNorm(config["hidden"], eps=config["norm_eps"])
        self.bias = nn.Parameter(torch.zeros(config["vocab_size"]))
        self.activation = ACTIVATIONS[config["activation"]]

    def forward(self, x: Tensor, word: Tensor) -> Tensor:
        """(B, T, H) and (V, H) -> (B, T, V)."""
        return F.linear(self.norm(self.activation(self.dense(x))), word, self.bias)


class ExpertBert(nn.Module):
    """The model. `routing` (V,) int64: the expert of each token id."""

    routing: Tensor

    def __init__(self, config: dict[str, Any], routing: Tensor) -> None:
        super().__init__()
        hidden = config["hidden"]
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["layers"]))
        self.norm = nn.LayerNorm(hidden, eps=config["norm_eps"]) if config["norm"] == "pre" else None
        self.head = Head(config)
        self.pooler = nn.Linear(hidden, hidden) if config["nsp"] else None
        self.nsp = nn.Linear(hidden, 2) if config["nsp"] else None
        self.register_buffer("routing", routing, persistent=False)

    def encode(self, ids: Tensor, segments: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Token ids (B, T), and if there are any: segments (B, T), mask (B, T), 1 = token -> states (B, T, H)."""
        x = self.embeddings(ids, torch.zeros_like(ids) if segments is None else segments)
        for layer in self.layers:
            x = layer(x, None if mask is None else mask.bool(), self.routing[ids])
        return x if self.norm is None else self.norm(x)

    def forward(
        self, ids: Tensor, segments: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The same -> MLM logits (B, T, V), and NSP logits (B, 2) or None."""
        x = self.encode(ids, segments, mask)
        nsp = None if self.nsp is None or self.pooler is None else self.nsp(torch.tanh(self.pooler(x[:, 0])))
        return self.head(x, self.embeddings.word.weight), nsp


def load(folder: str | Path) -> ExpertBert:
    """The model of a folder, in eval mode."""
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = ExpertBert(config, load_file(folder / "routing.safetensors")["expert_of_token"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()
