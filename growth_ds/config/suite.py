"""A suite: methods that are compared with training from scratch, on one text and with one evaluation."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, field_validator, model_validator

from growth_ds.config.base import Frozen

SCRATCH = "scratch"
"""The run that all others are compared with."""
NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


class Corpus(Frozen):
    """How the store is made where it is missing: the options of `growth-ds prepare`."""

    inputs: tuple[str, ...] = Field(min_length=1)
    """Files, folders, globs; relative to the working directory."""
    tokenizer: str = "sentencepiece"
    vocab_size: int = Field(default=8192, ge=16)
    valid: float = Field(default=0.02, gt=0.0, lt=1.0)


class Method(Frozen):
    """One way to the last model. A stage has the keys of a run's stage, and `share` in place of `steps` or `tokens`.

    `share` is the stage's part of the FLOPs that stages with a fixed length leave. What a stage leaves out it has from
    the stage before; the last one is the from-scratch run's in everything it does not say.
    """

    budget: float | None = Field(default=None, gt=0.0)
    """FLOPs, of the from-scratch run's; the suite's `budget` unless given."""
    optim: dict[str, Any] = Field(default_factory=dict)
    """Over the suite's `run.optim`."""
    start: str | None = None
    """A checkpoint whose weights it begins with, as of a published model; what they have cost is not counted."""
    stages: tuple[dict[str, Any], ...] = Field(min_length=1)
    summary: str = ""
    """What it is, for the page."""


class Suite(Frozen):
    """From-scratch training and the methods that are measured against it."""

    name: str
    corpus: Corpus | None = None
    run: dict[str, Any]
    """What all runs have in common: the keys of a run but `stages`."""
    scratch: dict[str, Any]
    """The one stage of the from-scratch run, with its whole model."""
    methods: dict[str, Method] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(default=(1, 2, 3), min_length=1)
    """Each is a run of every method: initial weights, order of the text and masks differ."""
    budget: float = Field(default=0.6, gt=0.0)
    """FLOPs of a method, of the from-scratch run's."""
    control: bool = True
    """Whether the last model is also trained from scratch at each budget below 1, its decay fitted to it."""

    @field_validator("methods")
    @classmethod
    def _names(cls, value: dict[str, Method]) -> dict[str, Method]:
        for name in value:
            if not NAME.fullmatch(name) or name.split("-")[0] in (SCRATCH, "store"):
                raise ValueError(f"'{name}' is no name for a method; use a-z, 0-9, '_', '-', not {SCRATCH}... or store")
        return value

    @model_validator(mode="after")
    def _once(self) -> Suite:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {list(self.seeds)} has one twice; list each seed once")
        for key in ("stages", "seed", "name"):
            if key in self.run:
                raise ValueError(f"run.{key}: is the suite's to say; remove it")
        for key in ("data", "optim", "model", "engine"):
            if not isinstance(self.run.get(key) or {}, dict):
                raise ValueError(f"run.{key}: holds no keys; write it as a mapping")
        if not isinstance((self.run.get("data") or {}).get("store") or "", str):
            raise ValueError("run.data.store: a comparison reads one store; give one path")
        for name, stage in self._stages():
            if not isinstance(stage.get("model") or {}, dict):
                raise ValueError(f"{name}.model: holds no keys; write it as a mapping")
        for key in ("share", "grow"):
            if key in self.scratch:
                raise ValueError(f"scratch.{key}: the from-scratch run has one stage, and its own length; remove it")
        return self

    def _stages(self) -> list[tuple[str, dict[str, Any]]]:
        """Every stage, with its place in the file."""
        found = [("scratch", self.scratch)]
        for name, method in self.methods.items():
            found += [(f"methods.{name}.stages.{number}", stage) for number, stage in enumerate(method.stages)]
        return found
