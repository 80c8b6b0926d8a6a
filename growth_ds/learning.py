"""A growth whose operator is learned on data (LiGO, Mango): the small model stays, the operator is trained, and what it
makes is a source of state like a checkpoint.

    train    the operator's numbers are what the engine optimises: each forward makes all grown weights by it
    keep     its numbers and what learning them took go into the run folder, whole and durably
    give     `LearnedSource`: the grown weights, no moments, steps counted from 0

The rows are those that the stage itself begins with; it reads them again, so a run sees no text that it does not count.
Nothing is learned twice: a run that was killed after "keep" takes the file, if it was made from the same checkpoint.

Every rank holds the small model and all grown weights while it learns. So ZeRO stages go up to 2: the third would cut
the operator, whose weights are not what fills the memory, and gather nothing of the weights that are made in a forward.
Activations are kept: `engine.activation_checkpointing` would compute a layer again when its weights are gone. Nor is
anything compiled.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from growth_ds import faults
from growth_ds.checkpoint import Checkpoint
from growth_ds.config import Model, Optim, Run, Stage
from growth_ds.data.batch import Batch
from growth_ds.engine import distributed
from growth_ds.engine.ds_config import resolve_precision
from growth_ds.engine.memory import release_memory
from growth_ds.engine.zero import ZeroEngine
from growth_ds.errors import UserError
from growth_ds.files import sha256, sync
from growth_ds.growth.learned.operator import Operator, stacked, unstacked
from growth_ds.growth.learned.plan import operator_of
from growth_ds.growth.plan import GrowthPlan
from growth_ds.model import layout
from growth_ds.model.bert import without_weights
from growth_ds.ops.depth_blend import depth_blend
from growth_ds.optim.schedule import shape
from growth_ds.planning import learn_bytes, learn_flops
from growth_ds.run_folder import RunFolder
from growth_ds.saving import agreed

Rows = Callable[[Run, int, int], Iterator[list[Batch]]]
"""(run, first optimizer step, steps) -> for each step this rank's micro-batches, of the stage of the first."""
MAX_STAGE = 2
"""ZeRO stage up to which an operator is learned."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SAY_EVERY = 10
"""Steps between two lines on the terminal."""
_SALT = 1_000_003  # dropout while an operator learns is not that of the stage's own steps


class Student(nn.Module):
    """The grown model as a function of the operator: a module by the contract of `ZeroEngine`."""

    def __init__(
        self, model: Model, operator: Operator, small: Mapping[str, Tensor], pool: int = 1, window: int | None = None
    ) -> None:
        """`small`: tables of the small model (`operator.stacked`), which are held and get no gradient."""
        super().__init__()
        self.operator, self.patterns = operator, list(small)
        self.rows, self.sizes = layout.layout(model), layout.sizes(model)
        for number, table in enumerate(small.values()):
            self.register_buffer(f"small_{number}", table.detach(), persistent=False)
        bert = without_weights(model)
        bert.pool, bert.attention_window = pool, window
        self._bert = (bert,)  # no submodule: it has no weights of its own

    def weights(self) -> dict[str, Tensor]:
        """Name -> grown weight, differentiable in the operator's numbers."""
        small = {pattern: getattr(self, f"small_{number}") for number, pattern in enumerate(self.patterns)}
        return unstacked(self.rows, self.sizes, self.operator(small))

    def forward(self, batch: Batch) -> Any:
        """As `Bert.forward`."""
        return functional_call(self._bert[0].train(self.training), self.weights(), (batch,))


class LearnedSource:
    """The grown weights as a `Source` of a state that needs no further growth: made when the first is asked for."""

    moments = False

    def __init__(self, plan: GrowthPlan, source: Checkpoint, values: Mapping[str, Tensor]) -> None:
        self.plan, self.source, self.values = plan, source, values
        self.steps: Mapping[str, int] = dict.fromkeys(plan.parameters, 0)
        self._made: dict[str, Tensor] = {}

    @torch.no_grad()
    def tensor(self, kind: str, name: str) -> Tensor:
        """A grown weight, float32."""
        if not self._made:
            operator = operator_of(self.plan, depth_blend)
            operator.load_state_dict(dict(self.values))
            tables = operator(_tables(self.source))
            made = unstacked(self.plan.layout, self.plan.new, tables)
            self._made = {key: each.contiguous() for key, each in made.items()}
        return self._made[name]

    def range(self, kind: str, name: str, begin: int, end: int) -> Tensor:
        return self.tensor(kind, name).reshape(-1)[begin:end]


def learned_source(
    run: Run, index: int, step: int, plan: GrowthPlan, source: Checkpoint, folder: RunFolder, rows: Rows,
    interrupted: Callable[[], bool], say: Callable[[str], None],
) -> tuple[LearnedSource, dict[str, Any], float]:  # fmt: skip
    """The grown weights of stage `index`, the ledger's `learn` record, and the seconds of learning before a restart.

    Collective; no engine may be alive. Raises UserError on all ranks for what cannot be written or learned, Stopped
    when a stop is asked for on any.
    """
    main = distributed.rank() == 0
    with agreed(folder.growths) as outcome:
        if main:
            key = _key(run, step, plan, source)
            path = folder.growths / f"stage-{index}-{key[:16]}.safetensors"
            outcome["path"], outcome["known"] = str(path), _is_whole(path)
    path, known = Path(outcome["path"]), outcome["known"]
    if not known:
        record, values = _learned(run, index, step, plan, source, rows, interrupted, say)
        with agreed(path):
            if main:
                _write(path, record, values)
    faults.point("growth.learned")
    problem: Exception | None = None
    record, values = {}, {}
    try:
        record, values = _read(path)
    except (OSError, ValueError) as error:
        problem = UserError(f"{path}: cannot be read on rank {distributed.rank()} ({error}); is it on a shared disk?")
    distributed.settle(problem)
    return LearnedSource(plan, source, values), {**record, "file": path.name}, record["seconds"] if known else 0.0


def _learned(
    run: Run, index: int, step: int, plan: GrowthPlan, source: Checkpoint, rows: Rows, interrupted: Callable[[], bool],
    say: Callable[[str], None],
) -> tuple[dict[str, Any], dict[str, Tensor]]:  # fmt: skip
    """Train the operator: (the ledger's record, its numbers in fp32 on rank 0)."""
    assert plan.learned is not None
    stage, learn, started = run.stages[index], plan.learned, time.monotonic()
    optim = Optim(lr=learn.lr, warmup=learn.warmup, decay=learn.decay)
    dropout = stage.model.dropout > 0 or stage.model.attention_dropout > 0
    engine = _engine(run, stage, plan, source)
    losses, rates = [], []
    try:
        for number, batches in enumerate(rows(run, step, learn.steps)):
            faults.point("growth.learn")
            kept = batches if stage.model.nsp else [batch.without_nsp() for batch in batches]
            if dropout:
                torch.manual_seed(hash((run.seed, _SALT, step + number, distributed.rank())) & (2**63 - 1))
            rates.append(learn.lr * shape(optim, number, learn.steps))
            result = engine.step([batch.to(engine.device) for batch in kept], rates[-1], interrupted())
            losses.append(result.loss)
            if (number + 1) % SAY_EVERY == 0 or number + 1 == learn.steps:
                say(f"learning {plan.grow.recipe}: step {number + 1}/{learn.steps}  loss {result.loss:.4f}")
        values = _values(engine)
    finally:
        engine.close()
        release_memory()
    finite = all(bool(value.isfinite().all()) for value in values.values())
    if distributed.agree(not finite):
        raise UserError(f"stages.{index}.grow.learn: the operator did not stay finite; give a smaller learn.lr")
    record = {
        "recipe": plan.grow.recipe, "steps": learn.steps, "flops": learn_flops(run, index),
        "seconds": round(time.monotonic() - started, 3), "loss_first": losses[0], "loss_last": losses[-1],
        "lr_peak": max(rates), "bytes": learn_bytes(plan, engine.precision != "fp32"),
    }  # fmt: skip
    return record, values


def _engine(run: Run, stage: Stage, plan: GrowthPlan, source: Checkpoint) -> ZeroEngine:
    assert plan.learned is not None
    options, learn = run.engine, plan.learned
    dtype = DTYPES[resolve_precision(options.precision)]  # DeepSpeed casts parameters, and no buffers
    small = {pattern: table.to(dtype) for pattern, table in _tables(source).items()}
    student = Student(stage.model, operator_of(plan, depth_blend), small, stage.pool, stage.attention_window)
    zero = {key: value for key, value in options.zero.items() if not key.startswith(("stage3_", "offload_param"))}
    return ZeroEngine(
        student,
        [{"params": list(student.parameters()), "weight_decay": learn.weight_decay, "name": "operator"}],
        zero={**zero, "stage": min(options.stage, MAX_STAGE)},
        precision=options.precision,
        micro_batch=stage.batch.micro,
        accumulation=stage.batch.accumulation(distributed.world_size()),
        clip=learn.clip,
        optimizer={"name": "adamw", "betas": stage.optim.betas, "eps": stage.optim.eps},
        extra=options.deepspeed,
    )


def _tables(source: Checkpoint) -> dict[str, Tensor]:
    """The small model's weights, float32, copied off the disk."""
    rows, sizes = layout.layout(source.model), layout.sizes(source.model)
    return stacked(rows, sizes, lambda name: source.tensor("weight", name).clone())


def _values(engine: ZeroEngine) -> dict[str, Tensor]:
    """The operator's numbers by name, float32, on rank 0; empty elsewhere. Collective."""
    values = {}
    for name in engine.state.shapes():
        state = engine.state.read(name)
        if state is not None:
            values[name.removeprefix("operator.")] = state.weight.detach().clone().cpu()
    return values


def _key(run: Run, step: int, plan: GrowthPlan, source: Checkpoint) -> str:
    """What an operator is learned from: another configuration, plan or checkpoint needs another one."""
    parts = [run.digest(), step, plan.digest(), sha256(source.manifest.path)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _digest(values: Mapping[str, Tensor]) -> str:
    """SHA-256 of an operator's numbers."""
    digest = hashlib.sha256()
    for name, value in sorted(values.items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _write(path: Path, record: Mapping[str, Any], values: Mapping[str, Tensor]) -> None:
    """Whole or not at all; an operator that the stage had before goes."""
    from safetensors.torch import save_file

    path.parent.mkdir(exist_ok=True)
    stage = "-".join(path.name.split("-")[:2])
    metadata = {"learn": json.dumps({**record, "digest": _digest(values)})}
    draft = path.with_name(f".{path.name}.tmp")
    try:
        save_file({name: value.contiguous() for name, value in values.items()}, draft, metadata)
        sync(draft)
        for old in path.parent.glob(f"{stage}-*.safetensors"):
            old.unlink()
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    sync(path.parent)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(the ledger's record with the digest, the numbers). Raises OSError, or ValueError for a damaged file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {}).get("learn", "{}"))
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    if record.get("digest") != _digest(values):
        raise ValueError("its numbers are not those that were written")
    return record, values


def _is_whole(path: Path) -> bool:
    """Whether an operator lies there as it was written."""
    try:
        _read(path)
    except (OSError, ValueError):
        return False
    return True
