"""A stage of a run, its batch and its optimizer."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field, PrivateAttr, field_validator, model_validator

from growth_ds.config.base import Frozen, whole
from growth_ds.config.grow import Grow
from growth_ds.config.model import Model
from growth_ds.config.until import Until


class Optim(Frozen):
    """The optimizer and its learning rate. The rate is a pure function of the step counter."""

    name: Literal["adamw", "lamb"] = "adamw"
    """`lamb`: trust ratios of whole parameters, under any ZeRO stage; for batches of thousands of rows."""
    nvlamb: bool = False
    """Under `lamb`: a trust ratio for biases and norms too, which are not decayed (NVIDIA's variant)."""
    lr: float = Field(default=1e-4, gt=0.0)
    """Peak learning rate."""
    warmup: float = Field(default=0.01, ge=0.0)
    """Below 1: fraction of the schedule's steps; else whole steps."""
    decay: Literal["linear", "cosine", "constant"] = "linear"
    final: float = Field(default=0.0, ge=0.0, le=1.0)
    """The rate at the end of the decay as a fraction of the peak."""
    schedule: Literal["run", "stage"] = "run"
    """One warm-up and decay through all stages, or one for each stage."""
    weight_decay: float = Field(default=0.01, ge=0.0)
    """For matrices; biases and LayerNorm are never decayed."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-6, gt=0.0)
    clip: float = Field(default=1.0, ge=0.0)
    """Largest global gradient norm; 0 switches clipping off."""

    @model_validator(mode="after")
    def _warmup_whole(self) -> Optim:
        if self.warmup >= 1 and not float(self.warmup).is_integer():
            raise ValueError(f"warmup {self.warmup} is neither a fraction below 1 nor whole steps")
        if self.nvlamb and self.name != "lamb":
            raise ValueError("nvlamb is a variant of lamb; give name: lamb, or leave it out")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas {list(self.betas)} must lie in [0, 1)")
        return self


class Batch(Frozen):
    """Sequences per step."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    global_: int = Field(alias="global", gt=0)
    """Sequences of one optimizer step, over all ranks."""
    micro: int = Field(gt=0)
    """Sequences of one forward on one rank."""

    def accumulation(self, ranks: int) -> int:
        """Micro-batches a step on each rank. Raises ValueError if the global batch cannot be split that way."""
        if self.global_ % (self.micro * ranks):
            share = f"batch.micro {self.micro} x {ranks} rank(s)"
            raise ValueError(f"batch.global {self.global_} is not a multiple of {share}")
        return self.global_ // (self.micro * ranks)


class Stage(Frozen):
    """A part of the run with one model, one length, one batch."""

    model: Model
    length: int = Field(gt=3)
    """Tokens of one row, special tokens included."""
    batch: Batch
    optim: Optim
    steps: int | None = Field(default=None, gt=0)
    tokens: int | None = Field(default=None, gt=0)
    grow: Grow = Grow()
    pool: int = Field(default=1, gt=0)
    """Neighbouring positions that the layers see as one, masked ones apart (CompoundGrow); 1: each by itself."""
    attention_window: int | None = Field(default=None, gt=0)
    """Each position attends to no more than so many on either side, by blocks, which costs less; else to all."""
    path_layers: int | None = Field(default=None, gt=1)
    """Layers that a training step runs: the first, the last, and a random choice of the others (RaPTr); else all."""
    frozen_layers: int = Field(default=0, ge=0)
    """The lowest so many layers, and the embeddings below them, learn nothing and have no backward (MSLT)."""
    submodel_layers: int | None = Field(default=None, gt=0)
    """Train sub-models of the bottom 1, 2, 3, ... times so many layers in turns, of each its top ones (bert2BERT)."""
    depth_up_to: int | None = Field(default=None, gt=1)
    """Train at random depths from `model.layers` to this many: the layers there are run several times (Apollo)."""
    until: Until | None = None
    """When it ends before its steps are done; the last stage ends with the run."""
    _whole = field_validator("steps", "tokens", "length", mode="before")(whole)
    _lasts: int | None = PrivateAttr(default=None)
    """Steps that were decided on while it ran: no part of the configuration."""
    _planned: Model | None = PrivateAttr(default=None)
    """The configured model, where runs of shared layers were decided on."""

    @model_validator(mode="after")
    def _consistent(self) -> Stage:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give exactly one of 'steps' and 'tokens'")
        if self.length > self.model.positions:
            raise ValueError(f"length {self.length} exceeds model.positions {self.model.positions}")
        if self.pool > 1 and (self.model.layers == 1 or self.pool >= self.length):
            raise ValueError(
                f"pool {self.pool} needs two layers at least, and more than {self.pool} positions in a row"
            )
        if self.attention_window is not None and 3 * self.attention_window >= self.length:
            raise ValueError(
                f"attention_window {self.attention_window}: three blocks of that many keys are no fewer than the "
                f"length {self.length}; give at most {(self.length - 1) // 3}, or leave it out"
            )
        if self.attention_window is not None and self.pool > 1:
            raise ValueError("attention_window and pool: windows of pooled positions are not computed; give one")
        self._check_layers()
        if self.until is not None and self.until.policy == "correlation" and not self.model.shares_layers:
            raise ValueError("until.policy correlation needs shared layers; give model.stored_layers")
        if self.until is not None and self.until.policy == "split" and self.model.shared_runs is None:
            raise ValueError(f"until.policy split needs runs to split; give model.shared_runs: [{self.model.layers}]")
        return self

    def _check_layers(self) -> None:
        """Raises ValueError where the layers that run or learn cannot be those."""
        layers = self.model.layers
        keys = ("path_layers", "frozen_layers", "submodel_layers", "depth_up_to")
        chosen = [key for key in keys if getattr(self, key)]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)}: one of them says which layers run; give one")
        if self.model.light_every is not None and (self.pool > 1 or self.attention_window is not None):
            key = "pool" if self.pool > 1 else "attention_window"
            raise ValueError(f"{key} and model.light_every: probabilities of one layer do not fit the next; give one")
        alike = self.model.thin_ffn is None and self.model.light_every is None
        if chosen and (self.model.shares_layers or not alike):
            raise ValueError(f"{chosen[0]} needs layers that are alike and share nothing")
        if self.model.experts > 1 and (chosen or self.pool > 1):
            raise ValueError(f"{(*chosen, 'pool')[0]} does not go with model.experts; leave one of them out")
        if self.path_layers is not None and self.path_layers > layers:
            raise ValueError(f"path_layers {self.path_layers} exceeds model.layers {layers}")
        if self.frozen_layers >= layers:
            raise ValueError(f"frozen_layers {self.frozen_layers} leaves none of {layers} layers to learn")
        if self.submodel_layers is not None and layers % self.submodel_layers:
            raise ValueError(f"submodel_layers {self.submodel_layers} does not divide model.layers {layers}")
        if self.depth_up_to is not None and self.depth_up_to <= layers:
            raise ValueError(
                f"depth_up_to {self.depth_up_to} is no more than model.layers {layers}; give more, or remove it"
            )
        if self.pool > 1 and self.submodel_layers == 1:
            raise ValueError("pool needs two layers at least, and submodel_layers 1 runs one; give 2 or more")

    def sharing(self, runs: tuple[int, ...]) -> Stage:
        """The same stage, and by its digest the same configuration, with other runs of shared layers."""
        if self.model.shared_runs == runs:
            return self
        keys = {**self.model.model_dump(), "shared_runs": runs, "stored_layers": len(runs)}
        stage = self.model_copy(update={"model": Model.model_validate(keys)})
        stage._planned = self.planned_model
        return stage

    @property
    def planned_model(self) -> Model:
        """The model that the configuration has."""
        return self._planned or self.model

    def lasting(self, steps: int) -> Stage:
        """The same stage, and by its digest the same configuration, with another number of steps."""
        stage = self.model_copy()
        stage._lasts = steps
        return stage

    @property
    def total_steps(self) -> int:
        """Optimizer steps of this stage."""
        return self._lasts or self.steps or -(-(self.tokens or 0) // (self.batch.global_ * self.length))
