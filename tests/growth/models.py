"""Small models whose every parameter is random, rows with padding, and a model grown in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from growth_ds.config import Grow, Model
from growth_ds.engine.state import TensorState
from growth_ds.growth.plan import GrowthPlan
from growth_ds.growth.planner import make_plan
from growth_ds.growth.state import grow_state
from growth_ds.model.bert import Bert
from growth_ds.model.layout import FIXED, layout, parameter_shapes

SMALL = {"layers": 2, "hidden": 12, "heads": 3, "ffn": 10, "vocab_size": 23, "positions": 9}


def small(**changes: Any) -> Model:
    """A model of a few thousand weights; a changed size keeps the head size."""
    return Model.model_validate({"head_size": 4, **SMALL, **changes})


def changed(model: Model, **changes: Any) -> Model:
    """The model with some keys replaced, as a later stage would state it."""
    keep = model.model_dump()
    if "stored_layers" not in changes and not model.shares_layers:
        del keep["stored_layers"]
    return Model.model_validate({**keep, **changes})


def plan_of(old: Model, new: Model, **grow: Any) -> GrowthPlan:
    """The plan between two models."""
    return make_plan(layout, old, new, Grow.model_validate(grow), FIXED)


def randomise(module: torch.nn.Module, seed: int, std: float = 0.3) -> None:
    """Draw every parameter at random, so that none is 0 or 1 and a forgotten one shows. Norm weights stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            is_scale = parameter.ndim == 1 and name.endswith("weight")
            # a width-aware size keeps activations near 1, so that float32 rounding stays far below the tolerance
            scale = std if parameter.ndim == 1 else std * min(1.0, (12 / parameter.shape[-1]) ** 0.5)
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
            parameter.copy_(drawn + 1.0 if is_scale else drawn)


def random_bert(model: Model, seed: int = 0, dtype: torch.dtype = torch.float64) -> Bert:
    """A randomised model in eval mode."""
    bert = Bert(model).to(dtype).eval()
    randomise(bert, seed)
    return bert


def grown_bert(bert: Bert, plan: GrowthPlan, model: Model) -> Bert:
    """The model that the plan makes of another."""
    weights = dict(bert.named_parameters())
    grown = Bert(model).to(bert.head.bias.dtype).eval()
    with torch.no_grad():
        for name, parameter in grown.named_parameters():
            state = grow_state(plan, name, lambda old: TensorState(weights[old].detach(), None, None, 0))
            parameter.copy_(state.weight)
    grown.ramp = ramp_of(plan, grown.head.bias.dtype)
    return grown


def ramp_of(plan: GrowthPlan, dtype: torch.dtype) -> dict[str, Tensor] | None:
    """The ramp at its start. It holds float32, in which a third is off by 1e-8; laws are measured with the shares."""
    if plan.ramp is None:
        return None
    start = plan.ramp.at(0.0) or {}
    if dtype == torch.float64:
        start |= {key: plan.maps["hidden"].share for key in ("norm", "head.norm") if key in start}
    return start


def states_of(model: Model, seed: int = 1, step: int = 7) -> dict[str, TensorState]:
    """Weights, moments and step of every parameter, drawn; the mean square is positive."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: TensorState(*(torch.rand(shape, generator=generator) for _ in range(3)), step=step)
        for name, shape in parameter_shapes(model).items()
    }


@dataclass
class Rows:
    """What `Bert.forward` reads: rows of different lengths, both token types, a few predicted positions."""

    ids: Tensor
    segments: Tensor
    attention_mask: Tensor | None
    positions: Tensor
    labels: Tensor
    nsp_labels: Tensor | None


def rows(model: Model, seed: int = 0, count: int = 3, length: int = 8, padded: bool = True) -> Rows:
    """Random rows; row i is padded from token `length - i` on, and each has both token types."""
    generator = torch.Generator().manual_seed(1000 + seed)
    ids = torch.randint(model.vocab, (count, length), generator=generator)
    kept = length - torch.arange(count)[:, None].clamp(max=length - 3)
    mask = torch.arange(length)[None, :] < kept
    segments = (torch.arange(length)[None, :] >= kept // 2).long() * mask
    positions = torch.arange(count) * length + 1 + torch.arange(count) % 2
    labels = torch.randint(model.vocab, (count,), generator=generator)
    nsp_labels = torch.randint(2, (count,), generator=generator) if model.nsp else None
    return Rows(ids, segments, mask if padded else None, positions, labels, nsp_labels)


def loss(bert: Bert, batch: Rows) -> Tensor:
    """The sum of the losses in the model's own precision (`Bert.forward` takes it in fp32)."""
    hidden = bert.encode(batch.ids, batch.segments, batch.attention_mask)
    logits = bert.head(hidden.flatten(0, 1)[batch.positions], bert.embeddings.word.weight, ramp=bert.ramp)
    total = F.cross_entropy(logits, batch.labels, reduction="sum")
    answers = bert.next_sentence(hidden[:, 0])
    if answers is not None and batch.nsp_labels is not None:
        total = total + F.cross_entropy(answers, batch.nsp_labels, reduction="sum")
    return total


def delta(one: tuple[Tensor, Tensor | None], two: tuple[Tensor, Tensor | None], mask: Tensor | None) -> float:
    """Largest difference of MLM logits (at real tokens) and NSP logits."""
    mlm = (one[0] - two[0]).abs()
    worst = float((mlm if mask is None else mlm[mask]).max())
    if one[1] is not None:
        assert two[1] is not None
        worst = max(worst, float((one[1] - two[1]).abs().max()))
    return worst
