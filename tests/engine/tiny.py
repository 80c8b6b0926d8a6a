"""A tiny masked language model with everything that troubles ZeRO: tied embedding, shared layers, odd sizes, biases, a
one-element parameter. And batches, parameter groups, and plain torch AdamW as the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, HIDDEN, ROWS, LENGTH = 37, 15, 8, 6
OPTIMIZER = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-6}
LR, CLIP, DECAY = 1e-2, 1.0, 0.01


@dataclass
class Batch:
    """tokens (B, T) int64; labels (B, T) int64, -1 where nothing is asked; order (B,) int64."""

    tokens: Tensor
    labels: Tensor
    order: Tensor

    def counts(self) -> dict[str, int]:
        return {"mlm": int((self.labels >= 0).sum()), "nsp": int((self.order >= 0).sum())}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, 2 * HIDDEN + 1)
        self.down = nn.Linear(2 * HIDDEN + 1, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.gain * self.down(F.gelu(self.up(x))))


class Head(nn.Module):
    """Uses the word embedding, which it does not own: its owner is kept out of the module tree."""

    def __init__(self, owner: nn.Embedding) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(VOCAB))
        self.__dict__["owner"] = owner

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.__dict__["owner"].weight, self.bias)


class Tiny(nn.Module):
    """Two layers, the first executed twice. `declare` names the head's use of the embedding for ZeRO-3."""

    skips = False
    """Leave `nsp` out where no row has an order: then it has no gradient."""

    def __init__(self, seed: int = 0, declare: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.word = nn.Embedding(VOCAB, HIDDEN)
        self.position = nn.Embedding(LENGTH, HIDDEN)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = Head(self.word)
        self.nsp = nn.Linear(HIDDEN, 2)
        if declare:
            self.external_parameters = {"head": ["word.weight"]}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        x = self.word(batch.tokens) + self.position(torch.arange(LENGTH))  # (B, T, H)
        for index in (0, 1, 0):
            x = self.layers[index](x)
        logits = self.head(x).float().flatten(0, 1)  # (B*T, V)
        labels = batch.labels.flatten()
        left_out = self.skips and bool((batch.order < 0).all())
        order = x.new_zeros(len(x), 2) if left_out else self.nsp(x[:, 0]).float()
        return {
            "mlm": F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum"),
            "nsp": F.cross_entropy(order, batch.order, ignore_index=-1, reduction="sum"),
            "mlm_correct": (logits.argmax(-1) == labels).sum(),
        }


def groups(module: nn.Module) -> list[dict[str, Any]]:
    decay = [param for param in module.parameters() if param.ndim > 1]
    rest = [param for param in module.parameters() if param.ndim <= 1]
    return [
        {"params": decay, "weight_decay": DECAY, "name": "decay"},
        {"params": rest, "weight_decay": 0.0, "name": "no-decay"},
    ]


def batch(step: int) -> Batch:
    """The global batch of one step, with labels spread unevenly over the rows."""
    random = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=random)
    share = torch.rand(ROWS, 1, generator=random)
    labels = torch.where(torch.rand(ROWS, LENGTH, generator=random) < share, tokens, -1)
    return Batch(tokens, labels, torch.randint(-1, 2, (ROWS,), generator=random))


def micro_batches(step: int, rank: int, world: int, accumulation: int) -> list[Batch]:
    """This rank's part of `batch(step)`."""
    whole, rows = batch(step), ROWS // (world * accumulation)
    starts = [(rank * accumulation + index) * rows for index in range(accumulation)]
    parts = (whole.tokens, whole.labels, whole.order)
    return [Batch(*(part[start : start + rows] for part in parts)) for start in starts]


def reference(steps: int, seed: int = 0) -> tuple[list[float], list[float]]:
    """(losses, gradient norms) of plain torch AdamW on the global batch, in this process, fp32."""
    module = Tiny(seed)
    adamw = torch.optim.AdamW(groups(module), **OPTIMIZER, foreach=False)
    losses, norms = [], []
    for step in range(steps):
        whole = batch(step)
        output, counts = module(whole), whole.counts()
        loss = sum(output[key] / count for key, count in counts.items())
        adamw.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), CLIP)))
        adamw.step()
        losses.append(float(loss.detach()))
    return losses, norms


def engine(stage: int, precision: str = "fp32", accumulation: int = 2, seed: int = 0, **zero: Any) -> Any:
    """A ZeroEngine over a fresh Tiny."""
    from growth_ds.engine.zero import ZeroEngine

    declare, update_scale = zero.pop("declare", True), zero.pop("update_scale", None)
    if stage == 3:
        # 0: no parameter is too small to be partitioned. Without it this model would stay whole on every rank.
        zero = {"stage3_param_persistence_threshold": 0, **zero}
    return ZeroEngine(
        Tiny(seed, declare),
        groups,
        zero={"stage": stage, **zero},
        precision=precision,
        micro_batch=2,
        accumulation=accumulation,
        clip=CLIP,
        optimizer=OPTIMIZER,
        update_scale=update_scale,
    )


def train(engine: Any, first: int, last: int, accumulation: int = 2, lr: float = LR) -> list[float]:
    """Losses of steps first..last-1."""
    losses = []
    for step in range(first, last):
        parts = micro_batches(step, engine.rank, engine.world_size, accumulation)
        losses.append(engine.step(parts, lr).loss)
    return losses


def random_state(name: str, shape: tuple[int, ...], step: int) -> Any:
    """A state of noise, the same on every rank."""
    from growth_ds.engine.state import TensorState

    random = torch.Generator().manual_seed(sum(name.encode()))
    weight, first, second = (torch.randn(shape, generator=random) for _ in range(3))
    return TensorState(weight, 0.01 * first, 1e-4 * second.square(), step)
