"""How long a training step takes on GPUs that are not here: a roofline of matrix products, memory traffic and messages.

A micro-batch on one GPU: its FLOPs at `MATRIX` of the peak, and then the bytes that its kernels move at `MEMORY` of the
memory's bandwidth, or the time to launch the kernels, whichever is longer. An optimizer step: its micro-batches, the
bytes that the optimizer moves, and all bytes that the ZeRO stage sends, at `LINKS` of the bandwidth, none of it hidden
behind the backward. Four shares for all GPUs, all sizes and all software: typical of what libraries reach on large
shapes, taken before any point was compared, and not fitted. `benchmarks/forecast.py` compares with published runs.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from growth_ds.config import Model, Run, Stage
from growth_ds.errors import UserError
from growth_ds.hardware import Cluster
from growth_ds.model import cost
from growth_ds.planning import learn_flops, stage_flops

MATRIX = 0.7
"""Share of the peak that large matrix products reach."""
MEMORY = 0.8
"""Share of the memory's bandwidth that streaming kernels reach."""
LINKS = 0.8
"""Share of a link's bandwidth that large messages reach."""
LAUNCH_S = 5e-6
"""Seconds from one kernel's start to the next at the least."""
HOP_S = 10e-6
"""Seconds of latency for each doubling of the ranks, for each message."""
OPTIMIZER_BYTES = {"adamw": 28, "lamb": 44}
"""Bytes that a step moves for each parameter: fp32 gradient, master and moments, 16-bit copy; LAMB in two passes."""
RESERVED = 2 * 10**9
"""Bytes of a GPU that are neither state nor activations: its context, the libraries' workspaces, ZeRO's buckets."""
HEAD_PASSES = 6
"""Times that logits go through memory: written, normalised, turned into their gradient, read by two products."""


@dataclass(frozen=True)
class Software:
    """What a program's kernels keep out of memory. The default is growth_ds on a GPU."""

    fused: bool = True
    """Bias, dropout, residual and norm in one kernel."""
    attention: str = "flash"
    """`flash`: probabilities stay on the chip; `fused`: scale, mask, softmax, dropout in one kernel; `eager`: each its
    own."""
    fp8: bool = False
    """Products of the layers in 8 bits, their operands cast by kernels of their own."""

    @property
    def kernels(self) -> int:
        """Launches of a layer's forward and backward."""
        return 40 if self.fused else 80


OURS = Software()
SCORES = {"flash": 0.0, "fused": 5 + 7.5, "eager": 10.5 + 11.5}
"""Times that the scores of a forward and a backward are read or written; a mask of dropout counts half."""


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step."""

    products: float
    traffic: float
    launches: float
    """What launching takes longer than the two above."""
    optimizer: float
    messages: float

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.products + self.traffic + self.launches + self.optimizer + self.messages


def layer_bytes(model: Model, length: int, software: Software = OURS, width: int = 2) -> float:
    """Bytes that one layer's forward and backward move for one token, weights left out: a batch reads them once."""
    hidden, inner, ffn = model.hidden, model.heads * model.head_size, model.ffn
    products = 3 * (4 * hidden + 4 * inner + 2 * ffn)  # operands and results: forward, and two backwards
    heads = 12 * inner if software.attention == "flash" else 14 * inner  # by the kernel, or copies for the products
    scores = SCORES[software.attention] * model.heads * length
    norms = 2 * hidden * (4 + 4 if software.fused else 7.5 + 10.5)
    activation = 5 * ffn
    biases = 3 * inner + 2 * hidden + (0 if software.fused else ffn)
    moved = width * (products + heads + scores + norms + activation + biases)
    if software.fp8:  # operands read in 8 bits, after a kernel that reads 16 and writes 8 twice, also transposed
        moved += 4 * (2 * hidden + inner + ffn + 3 * inner + 2 * hidden + ffn) - products / 2
    return moved


def row_bytes(model: Model, length: int, predicted: int, software: Software = OURS, width: int = 2) -> float:
    """Bytes that forward and backward of one row of `length` tokens move, of which `predicted` are."""
    layers = model.layers * length * layer_bytes(model, length, software, width)
    return layers + width * (HEAD_PASSES * predicted * model.vocab + 20 * length * model.hidden)


def collective(size: float, on: Cluster, messages: int) -> float:
    """Seconds of a reduce-scatter or an all-gather of `size` bytes in so many messages: in the node, then beyond."""
    seconds = size * (on.per_node - 1) / on.per_node / (LINKS * on.gpu.link)
    if on.nodes > 1:
        seconds += size / on.per_node * (on.nodes - 1) / on.nodes / (LINKS * on.network)
    return seconds + messages * HOP_S * math.ceil(math.log2(on.ranks)) if on.ranks > 1 else 0.0


def passes(zero: int, accumulation: int) -> int:
    """Reduce-scatters and all-gathers of all parameters in one optimizer step, as DeepSpeed makes them.

    Stages 0 and 1 reduce once and gather once; stage 2 reduces every micro-batch; stage 3 gathers for the forward and
    for the backward of every micro-batch, and reduces.
    """
    return {0: 2, 1: 2, 2: accumulation + 1, 3: 3 * accumulation}[zero]


def forecast(
    model: Model, length: int, micro: float, accumulation: int, flops_per_row: float, on: Cluster, *,
    predicted: int, zero: int = 0, optimizer: str = "adamw", precision: str = "bf16", software: Software = OURS,
    run_share: float = 1.0,
) -> Step:  # fmt: skip
    """One optimizer step of `accumulation` micro-batches of `micro` rows a rank.

    `flops_per_row`: of forward and backward of one row; `predicted`: positions of a row that the head sees;
    `run_share`: of the model's work that a step does, where it runs some layers, or pooled rows, alone.
    """
    width, parameters = (4 if precision == "fp32" else 2), cost.parameters(model)
    peak = on.gpu.matrix["fp8" if software.fp8 else precision]
    products = micro * flops_per_row / (MATRIX * peak)
    moved_by_rows = run_share * micro * row_bytes(model, length, predicted, software, width)
    traffic = moved_by_rows / (MEMORY * on.gpu.memory_bandwidth)
    launches = max(0.0, run_share * model.layers * software.kernels * LAUNCH_S - products - traffic)
    share = on.ranks if zero else 1
    moved = OPTIMIZER_BYTES[optimizer] * parameters / share / (MEMORY * on.gpu.memory_bandwidth)
    sent = passes(zero, accumulation) * collective(width * parameters, on, model.layers + 1)
    return Step(accumulation * products, accumulation * traffic, accumulation * launches, moved, sent)


def activation_bytes(model: Model, length: int, micro: int, predicted: int, checkpointing: bool, width: int = 2) -> int:
    """Bytes that a micro-batch keeps for its backward, as our layers save them.

    `checkpointing`: the inputs of layers alone, and what one layer keeps.
    """
    inner = model.heads * model.head_size
    layer = 5 * model.hidden + 4 * inner + 2 * model.ffn
    kept = model.layers * model.hidden + layer if checkpointing else model.layers * layer
    return width * micro * (length * kept + 3 * predicted * model.vocab)


def forecast_run(run: Run, on: Cluster, price: float | None = None) -> dict[str, Any]:
    """A run on a cluster: seconds of a step and of each stage, memory under each ZeRO stage, energy, price.

    `price`: of a GPU and hour, in any currency. Raises UserError for a batch that the ranks cannot share.
    """
    stages = [_stage(run, index, on) for index in range(len(run.stages))]
    seconds = sum(stage["seconds"] for stage in stages)
    last = stages[-1]["tokens_per_s"]
    hours = on.ranks * seconds / 3600
    return {
        "hardware": on.name,
        "nodes": on.nodes,
        "gpus_per_node": on.per_node,
        "network_bytes_per_s": on.network,
        "memory_bytes": on.gpu.memory,
        "watts": on.gpu.watts,
        "zero": run.engine.stage,
        "stages": stages,
        "seconds": seconds,
        "seconds_from_scratch": run.tokens_at(run.total_steps) / last,
        "gpu_hours": hours,
        "kwh": hours * on.gpu.watts / 1000,
        "price": None if price is None else hours * price,
        "assumed": assumed(),
    }


def accumulation_of(run: Run, index: int, ranks: int) -> int:
    """Micro-batches of a rank in a step of stage `index`. Raises UserError for a batch that the ranks cannot share."""
    try:
        return run.stages[index].batch.accumulation(ranks)
    except ValueError as error:
        raise UserError(f"stages.{index}.{error}; change batch.global, batch.micro, or the number of ranks") from None


def assumed() -> str:
    """What a forecast takes for given."""
    return (
        f"Assumed: {MATRIX:.0%} of the peak in products, {MEMORY:.0%} of the memory's and {LINKS:.0%} of the links' "
        "bandwidth, no message hidden behind the backward; validation, checkpoints and hosts not counted."
    )


def _stage(run: Run, index: int, on: Cluster) -> dict[str, Any]:
    stage, accumulation = run.stages[index], accumulation_of(run, index, on.ranks)
    step = _step(run, stage, accumulation, on)
    learned = learn_flops(run, index) / (MATRIX * on.gpu.matrix[_precision(run, on)] * on.ranks)
    memory, fits = _memory(run, stage, on)
    return {
        "accumulation": accumulation,
        "step": asdict(step),
        "step_seconds": step.seconds,
        "tokens_per_s": stage.batch.global_ * stage.length / step.seconds,
        "utilisation": step.products * MATRIX / step.seconds,
        "seconds": stage.total_steps * step.seconds + learned,
        "bytes_per_rank": memory,
        "recommended_zero": fits,
    }


def _step(run: Run, stage: Stage, accumulation: int, on: Cluster) -> Step:
    model, nsp = stage.model, run.data.objective == "mlm+nsp" and stage.model.nsp
    flops = stage_flops(run, stage) / stage.batch.global_
    whole = cost.train_flops_per_row(model, stage.length, run.data.mask_prob, nsp)
    return forecast(
        model, stage.length, stage.batch.micro, accumulation, flops, on,
        predicted=round(run.data.mask_prob * stage.length), zero=run.engine.stage, optimizer=stage.optim.name,
        precision=_precision(run, on), run_share=flops / whole,
    )  # fmt: skip


def _precision(run: Run, on: Cluster) -> str:
    wanted = "bf16" if run.engine.precision == "auto" else run.engine.precision
    return "fp16" if wanted == "bf16" and on.name == "v100" else wanted


def _memory(run: Run, stage: Stage, on: Cluster) -> tuple[dict[str, int], int | None]:
    """Bytes of a rank under each ZeRO stage with activations, and the lowest stage that the GPU has room for."""
    low, model = _precision(run, on) != "fp32", stage.model
    kept = activation_bytes(
        model, stage.length, stage.batch.micro, round(run.data.mask_prob * stage.length),
        run.engine.activation_checkpointing, 2 if low else 4,
    )  # fmt: skip
    needed = {str(zero): cost.bytes_per_rank(model, zero, on.ranks, low) + kept + RESERVED for zero in range(4)}
    fits = [zero for zero in range(4) if needed[str(zero)] <= on.gpu.memory]
    return needed, fits[0] if fits else None


def print_forecast(record: dict[str, Any]) -> None:
    """The forecast as a table on the terminal, and what it assumes."""
    from rich.table import Table

    from growth_ds.progress import clock
    from growth_ds.terminal import console, show

    on, here = console(), "machine" in record
    table = Table("stage", "step, ms", "products", "memory", "messages", "tokens/s", "time", "GiB", "fits from")
    if not here:
        table.add_column("of peak")
    table.title = title_of(record)
    for number, stage in enumerate(record["stages"]):
        step, needed = stage["step"], stage["bytes_per_rank"][str(record["zero"])] / 2**30
        memory = step["traffic"] + step["launches"] + step["optimizer"]
        shown = [f"{1000 * part:.1f}" for part in (step["products"], memory, step["messages"])]
        table.add_row(
            str(number), f"{1000 * stage['step_seconds']:.1f}", *shown, f"{stage['tokens_per_s']:,.0f}",
            clock(stage["seconds"]), f"{needed:.1f}", fits_from(stage),
            *([] if here else [f"{stage['utilisation']:.0%}"]),
        )  # fmt: skip
    show(on, table)
    share = record["seconds"] / record["seconds_from_scratch"]
    scratch = f"the last model on all these tokens {clock(record['seconds_from_scratch'])} (ratio {share:.3f})"
    on.print(f"time {clock(record['seconds'])}; {scratch}", highlight=False)
    if not here:
        bill = f"{record['gpu_hours']:,.1f} GPU-hours, {record['kwh']:,.1f} kWh at the boards' limit"
        on.print(bill + ("" if record["price"] is None else f", price {record['price']:,.2f}"), highlight=False)
    on.print(record["assumed"], highlight=False)


def title_of(record: dict[str, Any]) -> str:
    """On what the forecast is."""
    ranks = record["nodes"] * record["gpus_per_node"]
    if "machine" in record:
        return f"{ranks:,} rank(s) here ({record['machine']['processor']}), ZeRO-{record['zero']}: a forecast"
    return f"{ranks:,} x {record['hardware']}, {record['nodes']} node(s), ZeRO-{record['zero']}: a forecast"


def fits_from(stage: dict[str, Any]) -> str:
    """The lowest ZeRO stage that there is room for."""
    lowest = stage["recommended_zero"]
    return "none" if lowest is None else f"ZeRO-{lowest}"
