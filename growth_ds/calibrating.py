"""Rates of this machine for `growth-ds plan --hardware here`, measured by as many processes as the run has ranks.

All ranks measure at once, as they train at once: they share the memory's bandwidth, and each has its own cores.
Nothing of the run to be planned is measured; what is, are sizes of our own, between which a plan interpolates:

    products     forward and both backwards of a projection, by tokens and width
    attention    forward and backward of a row and a head, by the row's length
    norm, gelu, add, embed   forward and backward of the kernels, and of the embeddings, by elements
    layer        one layer on next to no tokens: what Python and the dispatch of its operations take
    links        an all-reduce of few and of many bytes
    engine       DeepSpeed's step of small models: its bookkeeping, the optimizer's pass, gradients, messages
    memory       resident bytes of short runs (`calibrating_memory`)

Run as `python -m growth_ds.calibrating` by `calibrate`, once for each rank.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from growth_ds.calibrating_memory import TINY, in_processes
from growth_ds.calibration import SIZES
from growth_ds.config import Model, Run
from growth_ds.engine import distributed
from growth_ds.model import cost

WIDTHS, TOKENS = (128, 256, 512, 1024), (64, 512, 4096)
LENGTHS, ATTENDED = (16, 64, 256, 512), 2048
ELEMENTS, ROW = (2**14, 2**17, 2**20, 2**23), 256
MESSAGES, SENT = (2**12, 2**24), 9
"""Bytes; how many of each."""
HEAD_SIZE = 64
SECONDS, LEAST, MOST = 0.1, 3, 50
"""One figure is the median of so many seconds of repetitions, but at least and at most so many."""
ENGINES = (SIZES[0], (8, 64, 512), *SIZES[1:])
"""(layers, hidden, vocabulary) of the models whose steps are taken; the first two tell what a layer adds."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WARM, STEPS, LARGE = 2, 5, 10**7
"""Steps of each before those that count, and those; two of models of so many parameters. A rank has a row of `TINY`."""
ROUNDS = 3
"""How often the operations are measured."""


def median_seconds(work: Callable[[], Any], times: int | None = None) -> float:
    """Of one call, without the first; the mean of the ranks, which begin together.

    `times`: exactly so many calls, for work that the ranks do with each other.
    """
    work()
    distributed.barrier()
    found = list[float]()
    least, most = (times, times) if times else (LEAST, MOST)
    begun = time.perf_counter()
    while len(found) < least or (time.perf_counter() - begun < SECONDS and len(found) < most):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return mean_of_ranks(statistics.median(found))


def mean_of_ranks(value: float) -> float:
    """The same on all ranks."""
    return distributed.reduce_floats([value])[0] / distributed.world_size()


def products(dtype: torch.dtype) -> list[list[float]]:
    """[tokens, width, floating-point operations a second] of x W^T, its two gradients, and the bias's."""
    found = []
    for width in WIDTHS:
        for tokens in TOKENS:
            x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((tokens, width), (width, width), (width,)))

            def work(x: Tensor = x, weight: Tensor = weight, bias: Tensor = bias) -> None:
                gradient = torch.nn.functional.linear(x, weight, bias)
                _ = gradient @ weight, gradient.mT @ x, gradient.sum(0)

            found.append([tokens, width, 6 * tokens * width**2 / median_seconds(work)])
    return found


def attended(packed: Tensor, gradient: Tensor, heads: int) -> None:
    """Forward and backward of attention."""
    from growth_ds.ops.attention import attention as op

    op((packed,), heads, None, 0.0).backward(gradient)


def attention(dtype: torch.dtype) -> list[list[float]]:
    """[length, seconds of a row and head of size `HEAD_SIZE`]."""
    found, heads = [], 4
    for length in LENGTHS:
        rows = ATTENDED // length
        packed = torch.randn(rows, length, 3 * heads * HEAD_SIZE).to(dtype).requires_grad_()
        gradient = torch.randn(rows, length, heads * HEAD_SIZE).to(dtype)
        seconds = median_seconds(partial(attended, packed, gradient, heads))
        found.append([length, seconds / (rows * heads)])
    return found


def elementwise(dtype: torch.dtype, kind: str) -> list[list[float]]:
    """[elements, seconds of one] of one of `KINDS`, forward and backward, on rows of `ROW`."""
    found = []
    for elements in ELEMENTS:
        work = KINDS[kind](elements // ROW, dtype)
        found.append([elements, median_seconds(work) / elements])
    return found


def norm_of_sum(rows: int, dtype: torch.dtype) -> Callable[[], None]:
    """The kernel for the norm of x + residual."""
    from growth_ds.ops.bias_dropout_residual_layer_norm import bias_dropout_residual_layer_norm as op

    x, residual, weight, bias, gradient = _tensors(rows, dtype)

    def work() -> None:
        op(x, weight, bias, 1e-12, residual=residual, p=0.0, weights=None).backward(gradient)
        x.grad = residual.grad = None

    return work


def gelu_with_bias(rows: int, dtype: torch.dtype) -> Callable[[], None]:
    """The kernel for gelu(x + bias)."""
    from growth_ds.ops.bias_gelu import bias_gelu

    x, _, _, bias, gradient = _tensors(rows, dtype)

    def work() -> None:
        bias_gelu(x, bias, "none").backward(gradient)
        x.grad = None

    return work


def addition(rows: int, dtype: torch.dtype) -> Callable[[], Any]:
    """x + residual into new memory: autograd does so where two gradients meet."""
    x, residual, *_ = (tensor.detach() for tensor in _tensors(rows, dtype))
    return lambda: x + residual


def embedding(rows: int, dtype: torch.dtype) -> Callable[[], None]:
    """The three tables on rows of `LONG` tokens, and their norm."""
    from growth_ds.model.blocks import Embeddings

    sizes = {"layers": 1, "hidden": ROW, "heads": 4, "ffn": ROW, "vocab_size": 512, "positions": LONG}
    module = Embeddings(Model.model_validate(sizes)).to(dtype)
    ids = torch.arange(rows).remainder(512).view(-1, min(LONG, rows))
    gradient = torch.randn(*ids.shape, ROW).to(dtype)
    return lambda: module(ids, torch.zeros_like(ids)).backward(gradient)


KINDS = {"norm": norm_of_sum, "gelu": gelu_with_bias, "add": addition, "embed": embedding}
LONG = 64


def _tensors(rows: int, dtype: torch.dtype) -> list[Tensor]:
    """x, residual, weight, bias, gradient."""
    shapes = ((rows, ROW), (rows, ROW), (ROW,), (ROW,), (rows, ROW))
    return [torch.randn(*shape).to(dtype).requires_grad_(at < 4) for at, shape in enumerate(shapes)]


def layer(dtype: torch.dtype) -> float:
    """Seconds of a layer's forward and backward on a row of `TINY` tokens."""
    from growth_ds.model.blocks import Layer

    module = Layer(Model.model_validate({"layers": 1, "hidden": 64, "heads": 1, "ffn": 256}), 256).to(dtype)
    x, gradient = (torch.randn(1, TINY, 64).to(dtype).requires_grad_() for _ in range(2))
    return median_seconds(lambda: module(x).backward(gradient))


def links() -> list[list[float]]:
    """[bytes, seconds of an all-reduce]; empty for one rank."""
    if distributed.world_size() == 1:
        return []
    tensors = [torch.ones(size // 4) for size in MESSAGES]
    return [[tensor.nbytes, median_seconds(partial(distributed.sum_in_place, tensor), SENT)] for tensor in tensors]


def engine(zero: int, precision: str, of_a_layer: float) -> list[list[float]]:
    """[parameters, layers, seconds, seconds that a second micro-batch adds] of each of `ENGINES`; the layers' own are
    taken off."""
    found = []
    for layers, hidden, vocab in ENGINES:
        sizes = {"layers": layers, "hidden": hidden, "heads": hidden // 64, "ffn": 4 * hidden, "vocab_size": vocab}
        model = Model.model_validate({**sizes, "positions": TINY})
        one, two = (engine_step(model, zero, precision, accumulation) for accumulation in (1, 2))
        own = layers * of_a_layer
        found.append([cost.parameters(model), layers, max(0.0, one - own), max(0.0, two - one - own)])
    return found


def engine_step(model: Model, zero: int, precision: str, accumulation: int) -> float:
    """Median seconds of a step of `accumulation` micro-batches of one row."""
    from growth_ds.coordinator import Coordinator, Position
    from growth_ds.fit import random_rows
    from growth_ds.run_folder import RunFolder

    batch = {"global": accumulation * distributed.world_size(), "micro": 1}
    options = {"precision": precision, "zero": zero}
    stage = {"length": TINY, "batch": batch, "steps": STEPS}
    run = Run.model_validate({"name": "calibration", "model": model.model_dump(), "engine": options, "stages": [stage]})
    made = Coordinator(run, RunFolder(Path(os.devnull)), lambda engine, length: {}, None, lambda line: None)
    started, _ = made.enter(0, Position())
    rows = [random_rows(run, 0, 1).to(started.device)] * accumulation
    for _ in range(WARM):
        started.step(rows, lr=1e-6)
    seconds = []
    for _ in range(STEPS if cost.parameters(model) < LARGE else 2):
        distributed.barrier()
        begun = time.perf_counter()
        started.step(rows, lr=1e-6)
        seconds.append(time.perf_counter() - begun)
    started.close()
    return mean_of_ranks(statistics.median(seconds))


def measure(wanted: Sequence[tuple[int, str]], precisions: Sequence[str]) -> dict[str, Any]:
    """The record of this number of ranks: operations of the precisions, engines of each (ZeRO stage, precision).

    Operations are medians of rounds: a shared machine is slow for seconds, which would be all of one figure. Engines
    come last: after one of ZeRO-3 this process' small operations take several times as long.
    """
    rounds = [{each: operations_in(DTYPES[each]) for each in precisions} for _ in range(ROUNDS)]
    operations = medians(rounds)
    engines = {
        f"zero-{zero} {precision}": engine(zero, precision, operations[precision]["layer"])
        for zero, precision in wanted
    }
    return {"threads": torch.get_num_threads(), "links": links(), "operations": operations, "engine": engines}


def operations_in(dtype: torch.dtype) -> dict[str, Any]:
    """The rates of a precision."""
    found = {"products": products(dtype), "attention": attention(dtype), "layer": layer(dtype)}
    return {**found, **{kind: elementwise(dtype, kind) for kind in KINDS}}


def medians(records: Sequence[Any]) -> Any:
    """Number by number, of dictionaries and lists of one shape."""
    first = records[0]
    if isinstance(first, dict):
        return {key: medians([record[key] for record in records]) for key in first}
    if isinstance(first, list):
        return [medians(items) for items in zip(*records, strict=True)]
    return statistics.median(records)


def main() -> None:
    """One rank: the job as JSON in an argument, the record written by rank 0."""
    job = json.loads(sys.argv[1])
    wanted = [(zero, precision) for zero, precision in job["wanted"]]
    memory = in_processes(wanted, job["ports"], job["store"])
    info = distributed.init_distributed(timeout_s=120)
    torch.manual_seed(0)
    record = {**measure(wanted, job["precisions"]), "memory": memory}
    if info.rank == 0:
        Path(job["out"]).write_text(json.dumps(record))
    distributed.barrier()
    distributed.shutdown()


if __name__ == "__main__":
    main()
