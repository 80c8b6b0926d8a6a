"""A run and its blocks: data, engine, checkpoints, logs, and its stages (`stage.py`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from growth_ds.config.base import Frozen, whole
from growth_ds.config.model import inherit_model
from growth_ds.config.splits import check_splits, planned
from growth_ds.config.stage import Optim, Stage


class StoreShare(Frozen):
    """One of several stores that are blended."""

    path: str
    weight: float = Field(default=1.0, gt=0.0)


class Data(Frozen):
    """Where the text comes from and what is asked of the model."""

    store: str | tuple[StoreShare, ...] | None = None
    """A folder made by `growth-ds prepare`, or several with weights."""
    objective: Literal["mlm", "mlm+nsp"] = "mlm"
    """What is predicted; next sentences only in stages whose model has the head (`nsp: true`)."""
    mask_prob: float = Field(default=0.15, gt=0.0, lt=1.0)
    """Share of each row that is predicted: round(mask_prob x length) positions."""
    whole_word: bool = False
    nsp_negative: Literal["swap", "random"] = "swap"
    """How the wrong second segment is made: A and B exchanged, or B from elsewhere (that B's text is then not read)."""
    chunk: int | None = Field(default=None, gt=0)
    """Tokens of text that stay together when documents are shuffled; the longest stage's row unless given."""
    verify: bool = True
    """Whether opening a store checks the SHA-256 of its files (about 1 s a GB)."""


class Elastic(Frozen):
    """What `growth-ds launch --hostfile` does when a host is lost. A run goes on with any ranks, whoever starts it."""

    on_loss: Literal["stop", "shrink", "wait"] = "stop"
    """`shrink`: go on with the hosts that are left; `wait`: with all, once the lost one answers; `stop`: neither."""
    max_restarts: int = Field(default=3, ge=0)
    wait_s: float = Field(default=600.0, ge=0.0)
    """How long `wait` waits for a host, in seconds."""


class Engine(Frozen):
    """How DeepSpeed runs it."""

    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """`auto`: bf16 where the processor multiplies it natively, else fp32."""
    zero: dict[str, Any] = Field(default_factory=lambda: {"stage": 2})
    """DeepSpeed's `zero_optimization` section; in YAML also a stage 0-3 or a JSON file."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Raw DeepSpeed JSON (a mapping or a file) for everything that has no key here."""
    activation_checkpointing: bool = False
    """Keep each layer's input alone, and compute the layer again in the backward: a third more FLOPs, less memory."""
    compile: bool = False
    """`torch.compile` each layer: needs a C++ compiler (and Triton on a GPU), and a minute at the start of a stage."""
    timeout_s: float = Field(default=1800.0, gt=0.0)
    """How long a collective may wait for the other ranks."""
    coordinator: Literal["auto", "rank0", "sharded"] = "auto"
    """How state gets into a new engine: through rank 0, or each rank computes its own slice; the same bits. `auto`:
    sharded where nothing grows, and where rank 0 has not the memory."""

    elastic: Elastic = Elastic()

    @field_validator("zero", mode="before")
    @classmethod
    def _zero(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            value = {"stage": value}
        if isinstance(value, dict):
            others = [key for key in value if key != "zero_optimization"] if "zero_optimization" in value else []
            if others:
                raise ValueError(f"'{others[0]}' stands beside zero_optimization; give such keys as engine.deepspeed")
            value = value.get("zero_optimization", value)
            stage = value.get("stage") if isinstance(value, dict) else value
            if isinstance(stage, bool) or stage not in (0, 1, 2, 3) or not isinstance(value, dict):
                raise ValueError(f"the ZeRO stage must be 0, 1, 2 or 3 as 'stage', not {stage!r}")
        return value

    @field_validator("deepspeed")
    @classmethod
    def _no_conflict(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key, ours in OWNED_BY_US.items():
            if key in value:
                raise ValueError(f"'{key}' is set by '{ours}' here; remove it from the DeepSpeed JSON")
        for key, reason in REFUSED.items():
            if key in value:
                raise ValueError(f"'{key}' {reason}")
        return value

    @model_validator(mode="after")
    def _compiled_whole(self) -> Engine:
        if self.compile and self.stage == 3:
            raise ValueError("compile: ZeRO-3 gathers weights inside a layer, which breaks its graph; use stage 0 to 2")
        return self

    @property
    def stage(self) -> int:
        """ZeRO stage, 0 to 3."""
        return int(self.zero["stage"])


OWNED_BY_US = {
    "train_batch_size": "stages[].batch.global",
    "train_micro_batch_size_per_gpu": "stages[].batch.micro",
    "gradient_accumulation_steps": "stages[].batch",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim",
    "scheduler": "optim",
    "bf16": "engine.precision",
    "fp16": "engine.precision",
    "data_types": "engine.precision",
    "zero_optimization": "engine.zero",
}
"""Keys of a DeepSpeed JSON that a run states elsewhere: given twice, one of the two would silently win."""


REFUSED = {
    "progressive_layer_drop": "drops layers inside DeepSpeed's own BERT only; give stages[].path_layers",
    "curriculum_learning": "hands a length to a model that cuts its own rows; give stages[].length",
    "expert_parallel": "makes layers of DeepSpeed's own experts, which growth cannot read; give stages[].model.experts",
    "moe": "is DeepSpeed's own mixture of experts, which growth cannot read; give stages[].model.experts",
    "use_data_before_expert_parallelism": "is of DeepSpeed's own experts; give stages[].model.experts",
    "data_efficiency": "replaces layers by DeepSpeed's random-LTD ones, which growth cannot read; give stages[].length",
}
"""Keys of a DeepSpeed JSON that do nothing, or harm, with our model: why, and what does it here."""


class Checkpoint(Frozen):
    """When state goes to disk."""

    every: int = Field(default=500, gt=0)
    """Steps between two checkpoints; one is always written before and after a growth and at the end."""
    keep: int = Field(default=2, gt=0)
    """Newest checkpoints that stay on disk."""
    keep_every_tokens: int | None = Field(default=None, gt=0)
    """Besides, the first checkpoint past each multiple of so many tokens stays for ever."""
    keep_before_growth: bool = False
    """Besides, the last checkpoint of every stage stays for ever."""
    background: bool = False
    """Write while training goes on, from a copy of the state in memory; published when all ranks have written. Begun a
    tenth of `every` early, and waited for after `every` steps: a kill costs no more than those in either way."""
    _whole = field_validator("keep_every_tokens", mode="before")(whole)


class Log(Frozen):
    """What is written while the run goes on."""

    every: int = Field(default=10, gt=0)
    """Steps between two lines on the terminal; `metrics.jsonl` has every step."""
    tensorboard: bool = True
    wandb: str | None = None
    """A project of Weights & Biases; its package must be there."""
    mlflow: str | None = None
    """An experiment of MLflow; its package must be there."""
    profile: str | None = Field(default=None, pattern=r"^[0-9]+:[0-9]+$")
    """`10:13`: steps 10, 11 and 12 of every rank as a Chrome trace, in the run's folder `profile`."""

    @field_validator("profile")
    @classmethod
    def _some_steps(cls, value: str | None) -> str | None:
        if value is not None and not 0 <= int(value.split(":")[0]) < int(value.split(":")[1]):
            raise ValueError(f"'{value}' has no steps; give first:end, as in 10:13")
        return value


class Evaluation(Frozen):
    """Validation during the run: MLM loss and accuracy, masks fixed."""

    every: int = Field(default=0, ge=0)
    """Steps between two validations; 0: only at the end of each stage."""
    tokens: int = Field(default=65536, gt=0)
    """Tokens of the validation split that are read, at the length of the last stage."""


def _is_file(value: Any) -> bool:
    return isinstance(value, str) and ".py@" in value


_SAYS_NOTHING: dict[str, dict[str, Any]] = {
    "": {
        "until": None, "path_layers": None, "submodel_layers": None, "pool": 1, "frozen_layers": 0,
        "attention_window": None, "depth_up_to": None,
    },
    "model": {"shared_gradient": "sum", "ffn_rank": None, "light_every": None, "shared_runs": None, "family": "bert"},
    "grow": {"rank_noise": 0.0, "experts": None, "shared_units": None, "learn": None},
}  # fmt: skip
"""Keys of a stage, and of blocks in it, that came later, and what they are where they change nothing."""


class Run(Frozen):
    """A whole run, every default and derived size written out."""

    name: str
    seed: int = 42
    start: str | None = None
    """A checkpoint whose weights the run begins with, grown where the first stage is larger; None: initial weights."""
    data: Data = Data()
    engine: Engine = Engine()
    optim: Optim = Optim()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    evaluation: Evaluation = Evaluation()
    stages: tuple[Stage, ...] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, data: Any) -> Any:
        """Write out what a stage leaves unsaid: its model from the stage before, its optimizer from the run."""
        if not isinstance(data, dict):
            return data
        previous, data = data.get("model") or {}, {key: value for key, value in data.items() if key != "model"}
        if not isinstance(previous, dict):
            raise ValueError(f"model: holds {type(previous).__name__}, not a mapping of keys; give layers, hidden, ...")
        if not isinstance(data.get("stages"), (list, tuple)):
            return data
        stages, until = [], None
        for number, stage in enumerate(data["stages"]):
            if isinstance(stage, dict):
                stage = dict(stage)
                if isinstance(stage.get("model") or {}, dict):
                    given = planned(number, stage.get("model") or {}, previous, until)
                    stage["model"] = previous = inherit_model(previous, given)
                if isinstance(stage.get("optim") or {}, dict) and isinstance(data.get("optim") or {}, dict):
                    stage["optim"] = {**(data.get("optim") or {}), **(stage.get("optim") or {})}
                until = stage.get("until")
            stages.append(stage)
        data["stages"] = stages
        return data

    @model_validator(mode="after")
    def _last_ends_with_the_run(self) -> Run:
        if self.stages[-1].until is not None:
            raise ValueError(f"stages.{len(self.stages) - 1}.until: nothing comes after the last stage; remove it")
        return self

    @model_validator(mode="after")
    def _splits(self) -> Run:
        check_splits(self.stages)
        return self

    @model_validator(mode="after")
    def _objective(self) -> Run:
        if self.data.objective == "mlm+nsp" and not self.stages[-1].model.nsp:
            raise ValueError(f"data.objective is mlm+nsp but stages.{len(self.stages) - 1}.model.nsp is false")
        return self

    @model_validator(mode="after")
    def _compiled_experts(self) -> Run:
        if self.engine.compile and any(stage.model.experts > 1 for stage in self.stages):
            raise ValueError("engine.compile: the shapes in layers with experts follow the tokens; leave it out")
        return self

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.total_steps for stage in self.stages)

    def tokens_at(self, step: int) -> int:
        """Tokens, special ones included, that the first `step` optimizer steps read."""
        return sum(done * stage.batch.global_ * stage.length for stage, done in self.done_at(step))

    def done_at(self, step: int) -> Iterator[tuple[Stage, int]]:
        """Each stage with its part of the first `step` optimizer steps."""
        for stage in self.stages:
            done = min(step, stage.total_steps)
            yield stage, done
            step -= done

    def stage_at(self, step: int) -> tuple[int, int]:
        """(stage index, steps done in it) when `step` optimizer steps are done; (len(stages), 0) at the end."""
        for index, stage in enumerate(self.stages):
            if step < stage.total_steps:
                return index, step
            step -= stage.total_steps
        return len(self.stages), 0

    def identity(self) -> dict[str, Any]:
        """What must not change when a run goes on: all but where and how fast it is computed."""
        dropped: Any = dict.fromkeys(("name", "start", "engine", "checkpoint", "log"), True)
        dropped |= {"data": {"store", "verify"}, "stages": {"__all__": {"batch": {"micro"}}}}
        dumped = self.model_dump(mode="json", by_alias=True, exclude=dropped)
        for written, stage in zip(dumped["stages"], self.stages, strict=True):
            written["model"] = stage.planned_model.model_dump(mode="json", by_alias=True)
            written["grow"] = {key: value for key, value in written["grow"].items() if key not in stage.grow.unsaid()}
        for stage in dumped["stages"]:  # a key that says nothing is left out: runs of before it was there have the same
            for block, keys in _SAYS_NOTHING.items():
                own = stage[block] if block else stage
                for key in [key for key, plain in keys.items() if own[key] == plain]:
                    del own[key]
            if stage["model"]["experts"] == 1:  # without experts nothing is routed, whatever the seed
                del stage["model"]["experts"], stage["model"]["routing_seed"]
        for stage in dumped["stages"]:  # a recipe file is what it holds, not where it lies: `path@digest`
            grow = stage["grow"]
            stage["grow"] = {k: v.rpartition("/")[2] if _is_file(v) else v for k, v in grow.items()}
        return dumped

    def digest(self) -> str:
        """SHA-256 of `identity()`."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()
