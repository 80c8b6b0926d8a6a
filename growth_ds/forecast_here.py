"""The step of `growth_ds.forecast` on a machine that was measured: the same five parts, with rates that depend on size.

A processor is no GPU. Its products reach a share of the peak that depends on their size, its kernels wait for nothing
that runs beside them, so launching them is added, and DeepSpeed's own bookkeeping is a part of a small model's step.

    products     of projections and the head at the rate measured for their width and tokens; attention by rows, heads
    traffic      norms, gelus, and the other passes over activations, at the measured rate for so many elements
    launches     what Python and the dispatch of a layer's operations take
    optimizer    DeepSpeed's step beside its layers: gradients, the optimizer's pass, bookkeeping; without its messages
    messages     reduce-scatters and all-gathers, as `forecast.passes` counts them

Dropout, attention windows and experts are not counted.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from growth_ds.calibration import Rates, rates
from growth_ds.config import Model, Run
from growth_ds.data.masking import masked_per_row
from growth_ds.engine.ds_config import resolve_precision
from growth_ds.engine.memory import available_memory
from growth_ds.forecast import Step, accumulation_of, activation_bytes, passes
from growth_ds.model import cost
from growth_ds.ops.attention import PLAIN_LENGTH
from growth_ds.planning import learn_flops, stage_flops

HERE = "here"
ASSUMED = (
    "By rates that were measured on this machine; dropout, attention windows, experts, validation, checkpoints and "
    "other programs are not counted."
)


HEAD_GELUS = 1.0
"""Cross-entropy and its gradient over one logit, in gelus of it."""


def step_here(
    model: Model, length: int, micro: int, accumulation: int, on: Rates, *, predicted: int, asked: int, zero: int,
    precision: str, run_share: float = 1.0,
) -> Step:  # fmt: skip
    """One optimizer step of a rank.

    `predicted`: positions of a row that the head sees; `asked`: those that the last layer computes, at least as many;
    `run_share`: see `forecast.forecast`.
    """
    below, tokens = model.layers - 1, micro * length
    products = run_share * (
        below * layer_products(model, length, length, micro, on) + layer_products(model, length, asked, micro, on)
    )
    products += head_products(model, micro * predicted, on)
    traffic = run_share * (below * layer_passes(model, tokens, on) + layer_passes(model, micro * asked, on))
    traffic += on.elements("embed", tokens * model.hidden)
    traffic += HEAD_GELUS * on.elements("gelu", micro * predicted * model.vocab)
    launches = run_share * model.layers * on.operations["layer"]
    parameters = cost.parameters(model)
    first, further = on.engine(f"zero-{zero} {precision}", parameters, model.layers)
    sent = [passes(zero, each) * on.message(4 * parameters) / 2 for each in (1, accumulation)]
    spent = first + (accumulation - 1) * further
    return Step(
        accumulation * products, accumulation * traffic, accumulation * launches,
        max(0.0, spent - sent[1]), min(sent[1], spent),
    )  # fmt: skip


def layer_products(model: Model, length: int, asked: int, micro: int, on: Rates) -> float:
    """Seconds of one layer's projections and attention, of which `asked` positions of each row go on."""
    hidden, inner, ffn = model.hidden, model.heads * model.head_size, model.ffn
    tokens, going = micro * length, micro * asked
    if asked == length:
        found = on.product(tokens, hidden, 3 * inner)
    else:
        found = on.product(going, hidden, inner) + on.product(tokens, hidden, 2 * inner)
    found += on.product(going, inner, hidden)
    if model.ffn_rank is None:
        found += on.product(going, hidden, ffn) + on.product(going, ffn, hidden)
    else:
        found += 2 * (on.product(going, hidden, model.ffn_rank) + on.product(going, model.ffn_rank, ffn))
    return found + asked / length * on.attention(length, micro, model.heads, model.head_size)


def head_products(model: Model, predicted: int, on: Rates) -> float:
    """Seconds of the head's transform and decoder."""
    return on.product(predicted, model.hidden, model.hidden) + on.product(predicted, model.hidden, model.vocab)


def layer_passes(model: Model, tokens: int, on: Rates) -> float:
    """Seconds of one layer's two norms, its gelu, and the two sums of gradients at its residuals, on some positions."""
    wide = tokens * model.hidden
    return 2 * (on.elements("norm", wide) + on.elements("add", wide)) + on.elements("gelu", tokens * model.ffn)


def forecast_run_here(run: Run, ranks: int, record: dict[str, Any]) -> dict[str, Any]:
    """A run on so many ranks of this machine, as `forecast.forecast_run` has it; energy and price are not known here.

    `record`: of `calibration.calibrated`. Raises UserError for a batch that the ranks cannot share.
    """
    on = rates(record, ranks, precision_here(run))
    stages = [_stage(run, index, on) for index in range(len(run.stages))]
    return {
        "hardware": HERE, "nodes": 1, "gpus_per_node": ranks, "network_bytes_per_s": 0.0,
        "memory_bytes": available_memory() // ranks, "watts": None, "zero": run.engine.stage,
        "stages": stages, "seconds": sum(stage["seconds"] for stage in stages),
        "seconds_from_scratch": run.tokens_at(run.total_steps) / stages[-1]["tokens_per_s"],
        "gpu_hours": None, "kwh": None, "price": None, "machine": record["machine"], "assumed": ASSUMED,
    }  # fmt: skip


def precision_here(run: Run) -> str:
    """What the run's precision is on this machine."""
    return resolve_precision(run.engine.precision)


def _stage(run: Run, index: int, on: Rates) -> dict[str, Any]:
    stage, nsp = run.stages[index], run.data.objective == "mlm+nsp" and run.stages[index].model.nsp
    predicted, accumulation = masked_per_row(stage.length, run.data.mask_prob), accumulation_of(run, index, on.ranks)
    flops = stage_flops(run, stage)
    whole = stage.batch.global_ * cost.train_flops_per_row(stage.model, stage.length, run.data.mask_prob, nsp)
    step = step_here(
        stage.model, stage.length, stage.batch.micro, accumulation, on, predicted=predicted,
        asked=min(stage.length, predicted + nsp), zero=run.engine.stage, precision=precision_here(run),
        run_share=flops / whole,
    )  # fmt: skip
    learned = learn_flops(run, index) / flops * step.seconds  # at the rate of the stage's own steps
    needed = rank_bytes(run, index, on)
    return {
        "accumulation": accumulation, "step": asdict(step), "step_seconds": step.seconds,
        "tokens_per_s": stage.batch.global_ * stage.length / step.seconds, "utilisation": None,
        "seconds": stage.total_steps * step.seconds + learned,
        "bytes_per_rank": {str(run.engine.stage): needed},
        "recommended_zero": run.engine.stage if on.ranks * needed <= available_memory() else None,
    }  # fmt: skip


def rank_bytes(run: Run, index: int, on: Rates) -> int:
    """Most resident bytes of a rank in a stage: of its steps, or of the growth into the stage beside an empty rank."""
    stage, zero, precision = run.stages[index], run.engine.stage, precision_here(run)
    low, parameters = precision != "fp32", cost.parameters(stage.model)
    accumulation = accumulation_of(run, index, on.ranks)
    key = f"zero-{zero} {precision}"
    each = cost.bytes_per_rank(stage.model, zero, on.ranks, low) / parameters
    training = on.resident(key, parameters, accumulation, kept_here(run, index), each)
    grown = 0.0
    if index:
        before = run.stages[index - 1].model
        grown = on.empty(key) + cost.growth_peak(before, stage.model, zero, on.ranks, low, "rank0")
    return round(max(training, grown))


def kept_here(run: Run, index: int) -> int:
    """Bytes that a micro-batch keeps for its backward on a CPU: of short rows the probabilities of attention too."""
    stage, width = run.stages[index], 4 if precision_here(run) == "fp32" else 2
    model, length, micro = stage.model, stage.length, stage.batch.micro
    predicted, saves = masked_per_row(length, run.data.mask_prob), run.engine.activation_checkpointing
    kept = activation_bytes(model, length, micro, predicted, saves, width)
    if length > PLAIN_LENGTH:
        return kept
    asked = length if saves else (model.layers - 1) * length + predicted
    return kept + width * micro * model.heads * length * asked
