"""Ways to make a training step of one BERT: growth_ds, transformers (eager, compiled), DeepSpeed over transformers.

Every way gives a `Step`: a function of one batch that does forward, loss, backward, optimizer step and the clearing of
gradients, and returns the loss or a tensor of it. What is the same for all: sizes, batches, masked share, dropout,
AdamW with the same settings in two groups (biases and norms are not decayed), no padding and so no attention mask.

What each does its own way: growth_ds computes the head where tokens are masked and clips gradients as its runs do;
transformers computes logits for every token and gets labels of -100 elsewhere, and is not made to clip. Its attention
is SDPA, its AdamW the fused one. `bf16` is a model wholly in bf16, weights and moments too (less exact than ours, which
keep fp32 masters, and faster); `autocast` is bf16 products over fp32 weights.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from growth_ds.config import Model, Run
from growth_ds.data.batch import Batch

MASK_PROB = 0.15
OPTIM = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01}
Step = Callable[[Batch], Any]


@dataclass(frozen=True)
class Way:
    """How a step is made. `precision`: bf16, autocast or fp32."""

    name: str
    library: str
    precision: str = "bf16"
    compiled: bool = False


OURS = Way("growth_ds", "growth_ds")
COMPILED = Way("growth_ds compiled", "growth_ds", compiled=True)
"""`engine.compile`."""
PEERS = (
    Way("eager bf16", "transformers"),
    Way("eager autocast", "transformers", "autocast"),
    Way("eager fp32", "transformers", "fp32"),
    Way("deepspeed bf16", "deepspeed"),
    Way("deepspeed fp32", "deepspeed", "fp32"),
    Way("compiled bf16", "transformers", compiled=True),
    Way("compiled autocast", "transformers", "autocast", compiled=True),
    Way("compiled fp32", "transformers", "fp32", compiled=True),
)


@dataclass(frozen=True)
class Case:
    """One model at one length. `rows`: micro-batches that every way may choose from; `goal`: of the ratio."""

    name: str
    model: Model
    length: int
    rows: tuple[int, ...]
    goal: float | None
    share_goal: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "model": self.model.model_dump(mode="json")}

    @classmethod
    def of(cls, values: dict[str, Any]) -> Case:
        return cls(**{**values, "model": Model.model_validate(values["model"]), "rows": tuple(values["rows"])})

    @property
    def masked(self) -> int:
        """Predicted tokens of a row."""
        return round(MASK_PROB * self.length)


def make_batch(case: Case, rows: int, seed: int, device: str) -> Batch:
    """Random tokens, as many of each row masked as a run masks."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(case.model.vocab, (rows, case.length), generator=generator)
    columns = torch.rand(rows, case.length, generator=generator).topk(case.masked).indices.sort().values
    positions = (columns + case.length * torch.arange(rows)[:, None]).flatten()
    labels = ids.flatten()[positions].clone()
    ids.view(-1)[positions] = min(103, case.model.vocab - 1)
    return Batch(ids, torch.zeros_like(ids), None, positions, labels, None).to(device)


def build(way: Way, case: Case, device: str) -> Step:
    """The step of a fresh model."""
    torch.manual_seed(0)
    if way.library == "growth_ds":
        return _ours(case, way.compiled)
    if way.library == "deepspeed":
        return _deepspeed(way, case, device)
    return _transformers(way, case, device)


def _ours(case: Case, compiled: bool) -> Step:
    """The engine as a run gets it at its first stage, through the coordinator."""
    from growth_ds.coordinator import Coordinator, Position
    from growth_ds.engine import distributed
    from growth_ds.run_folder import RunFolder

    distributed.init_distributed()
    rows = max(case.rows)  # steps of other sizes go through the same engine: one micro-batch each
    stage = {"model": case.model.model_dump(), "length": case.length, "batch": {"global": rows, "micro": rows}}
    run = Run.model_validate(
        {"name": "benchmark", "engine": {"compile": compiled}, "optim": OPTIM, "stages": [{**stage, "steps": 10**6}]}
    )
    folder = RunFolder(Path(tempfile.gettempdir()) / "growth_ds-benchmark-is-never-written")
    coordinator = Coordinator(run, folder, lambda engine, length: {}, None)
    engine, _ = coordinator.enter(0, Position())

    def step(batch: Batch) -> float:
        coordinator.ramp_to(0)
        return engine.step([batch.to(engine.device)], OPTIM["lr"]).loss

    return step


def hugging_face(case: Case) -> torch.nn.Module:
    """transformers' BertForMaskedLM of the same sizes, in fp32."""
    from transformers import BertConfig, BertForMaskedLM

    from growth_ds.interop import names

    config = BertConfig(**names.config_of(case.model), attn_implementation="sdpa")
    return BertForMaskedLM(config).train()


class _Inputs(dict[int, dict[str, torch.Tensor]]):
    """What transformers is called with, made once for each batch: labels (B, T), -100 where nothing is predicted."""

    def of(self, batch: Batch) -> dict[str, torch.Tensor]:
        if id(batch) not in self:
            labels = torch.full_like(batch.ids, -100)
            labels.view(-1)[batch.positions] = batch.labels
            self[id(batch)] = {"input_ids": batch.ids, "labels": labels}
        return self[id(batch)]


def _groups(module: torch.nn.Module) -> list[dict[str, Any]]:
    named = list(module.named_parameters())
    decayed = [param for _, param in named if param.ndim > 1]
    others = [param for _, param in named if param.ndim <= 1]
    return [{"params": decayed, "weight_decay": OPTIM["weight_decay"]}, {"params": others, "weight_decay": 0.0}]


def _transformers(way: Way, case: Case, device: str) -> Step:
    dtype = torch.bfloat16 if way.precision == "bf16" else torch.float32
    model = hugging_face(case).to(device, dtype)
    optimizer = torch.optim.AdamW(_groups(model), **OPTIM, fused=True)
    forward: Any = torch.compile(model, dynamic=False) if way.compiled else model
    inputs = _Inputs()

    def step(batch: Batch) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=way.precision == "autocast"):
            loss = forward(**inputs.of(batch)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def _deepspeed(way: Way, case: Case, device: str) -> Step:
    """ZeRO-1 on one rank with the AdamW that DeepSpeed makes of its own JSON."""
    import deepspeed

    from growth_ds.engine import distributed

    distributed.init_distributed()
    model = hugging_face(case)
    config = {
        "train_micro_batch_size_per_gpu": max(case.rows),
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": way.precision == "bf16"},
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": dict(OPTIM)},
        "steps_per_print": None,
    }
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=_groups(model), config=config, dist_init_required=False
    )
    inputs = _Inputs()

    def step(batch: Batch) -> torch.Tensor:
        loss = engine(**inputs.of(batch)).loss
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step
