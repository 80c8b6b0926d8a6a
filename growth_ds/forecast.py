"""How long a training step takes on GPUs that are not here: a roofline of matrix products, memory traffic and messages.

A micro-batch on one GPU: its FLOPs at `MATRIX` of the peak, and then the bytes that its kernels move at `MEMORY` of the
memory's bandwidth, or the time to launch the kernels, whichever is longer. An optimizer step: its micro-batches, the
bytes that the optimizer moves, and all bytes that the ZeRO stage sends, at `LINKS` of the bandwidth, none of it hidden
behind the backward. Four shares for all GPUs, all sizes and all software: typical of what libraries reach on large
shapes, taken before any point was compared, and not fitted. `benchmarks/forecast.py` compares with published runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from growth_ds.config import Model
from growth_ds.hardware import Cluster
from growth_ds.model import cost

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
) -> Step:  # fmt: skip
    """One optimizer step of `accumulation` micro-batches of `micro` rows a rank.

    `flops_per_row`: of forward and backward of one row; `predicted`: positions of a row that the head sees.
    """
    width, parameters = (4 if precision == "fp32" else 2), cost.parameters(model)
    peak = on.gpu.matrix["fp8" if software.fp8 else precision]
    products = micro * flops_per_row / (MATRIX * peak)
    traffic = micro * row_bytes(model, length, predicted, software, width) / (MEMORY * on.gpu.memory_bandwidth)
    launches = max(0.0, model.layers * software.kernels * LAUNCH_S - products - traffic)
    share = on.ranks if zero else 1
    moved = OPTIMIZER_BYTES[optimizer] * parameters / share / (MEMORY * on.gpu.memory_bandwidth)
    sent = passes(zero, accumulation) * collective(width * parameters, on, model.layers + 1)
    return Step(accumulation * products, accumulation * traffic, accumulation * launches, moved, sent)
