"""The fused ops beside torch, torch.compile, apex and Liger, and beside what a copy of the same bytes takes.

python benchmarks/ops.py --device cpu --threads 1
python benchmarks/ops.py --device cuda --json benchmarks/results/ops.json

The sides of a case run in turns, forward and backward timed apart; medians over the rounds. "of copy": the bytes that
a perfect kernel would move, at the speed of torch's copy measured in the same turns, over the time taken. "kept": what
the forward saves for the backward besides its operands. A side that cannot be had here is left out, and said why.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import about, median_and_spread, seconds_of, significant, table, write_json
from growth_ds.ops import bias_dropout_residual_layer_norm as norm
from growth_ds.ops import bias_gelu, masked_lm_loss

Function = Callable[..., Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Op:
    """One op: its operands for a size, its sides, and the elements a perfect kernel moves forward and backward."""

    name: str
    sizes: dict[str, list[tuple[int, ...]]]  # by device; the first is that of --quick
    leaves: Callable[..., list[tuple[int, ...]]]  # shapes of the operands, all with gradients
    sides: dict[str, Callable[[tuple[int, ...]], Function]]
    moved: tuple[int, int]  # tensors of the first operand's size


def _norm_sides(p: float) -> dict[str, Callable[[tuple[int, ...]], Function]]:
    def ours(size: tuple[int, ...]) -> Function:
        return lambda x, gamma, beta, bias, residual: norm.bias_dropout_residual_layer_norm(
            x, gamma, beta, 1e-12, bias=bias, residual=residual, p=p
        )

    def eager(x: Tensor, gamma: Tensor, beta: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return F.layer_norm(residual + F.dropout(x + bias, p, p > 0), gamma.shape, gamma, beta, 1e-12)

    def apex(size: tuple[int, ...]) -> Function:
        from apex.normalization.fused_layer_norm import fused_layer_norm_affine

        return lambda x, gamma, beta, bias, residual: fused_layer_norm_affine(
            residual + F.dropout(x + bias, p, p > 0), gamma, beta, gamma.shape, 1e-12
        )

    def liger(size: tuple[int, ...]) -> Function:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        return lambda x, gamma, beta, bias, residual: LigerLayerNormFunction.apply(
            residual + F.dropout(x + bias, p, p > 0), gamma, beta, 1e-12
        )

    compiled = torch.compile(eager, dynamic=False)
    return {"growth_ds": ours, "torch": lambda _: eager, "compile": lambda _: compiled, "apex": apex, "liger": liger}


def _gelu_sides(approximate: bias_gelu.Approximation) -> dict[str, Callable[[tuple[int, ...]], Function]]:
    def eager(x: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(x + bias, approximate=approximate)

    compiled = torch.compile(eager, dynamic=False)
    return {
        "growth_ds": lambda _: lambda x, bias: bias_gelu.bias_gelu(x, bias, approximate),
        "torch": lambda _: eager,
        "compile": lambda _: compiled,
    }


def _labels(size: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.arange(size[0], device=like.device) * 7919 % size[2]


def _loss_sides() -> dict[str, Callable[[tuple[int, ...]], Function]]:
    def eager(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight, bias).float(), labels, reduction="sum")

    def liger(size: tuple[int, ...]) -> Function:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Fused

        return lambda x, weight, bias: Fused.apply(x, weight, _labels(size, x), bias, None, -100, 0.0, 0.0, "sum")[0]

    compiled = torch.compile(eager, dynamic=False)
    return {
        "growth_ds": lambda size: lambda x, w, b: masked_lm_loss.masked_lm_loss(x, w, b, _labels(size, x))[0],
        "torch": lambda size: lambda x, w, b: eager(x, w, b, _labels(size, x)),
        "compile": lambda size: lambda x, w, b: compiled(x, w, b, _labels(size, x)),
        "liger": liger,
    }


def _rows(cpu: list[tuple[int, ...]], cuda: list[tuple[int, ...]]) -> dict[str, list[tuple[int, ...]]]:
    return {"cpu": cpu, "cuda": cuda}


OPS = (
    Op(
        "bias_gelu",
        _rows([(2048, 1024), (4096, 256)], [(32768, 4096), (8192, 1024)]),
        lambda rows, width: [(rows, width), (width,)],
        _gelu_sides("none"),
        (2, 3),
    ),
    Op(
        "bias_gelu tanh",
        _rows([(2048, 1024), (4096, 256)], [(32768, 4096), (8192, 1024)]),
        lambda rows, width: [(rows, width), (width,)],
        _gelu_sides("tanh"),
        (2, 3),
    ),
    Op(
        "bias_dropout_residual_layer_norm p=0",
        _rows([(2048, 1024), (4096, 256)], [(32768, 1024), (32768, 4096)]),
        lambda rows, width: [(rows, width), (width,), (width,), (width,), (rows, width)],
        _norm_sides(0.0),
        (4, 3),
    ),
    Op(
        "bias_dropout_residual_layer_norm p=0.1",
        _rows([(2048, 1024), (4096, 256)], [(32768, 1024), (32768, 4096)]),
        lambda rows, width: [(rows, width), (width,), (width,), (width,), (rows, width)],
        _norm_sides(0.1),
        (4, 4),
    ),
    Op(
        "masked_lm_loss",
        _rows([(308, 256, 8192)], [(4915, 1024, 30528)]),
        lambda rows, hidden, vocab: [(rows, hidden), (vocab, hidden), (vocab,)],
        _loss_sides(),
        (0, 0),  # products: no copy is its measure
    ),
)
"""Add a row for every op with a kernel."""


def kept_bytes(function: Function, leaves: Sequence[Tensor]) -> int:
    """Bytes that autograd keeps from the forward, without the operands; a storage counts once."""
    own = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    sizes: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = function(*leaves)  # kept alive, so that no address is used twice
    del y
    return sum(sizes.values())


def prepare(op: Op, size: tuple[int, ...], device: str, dtype: torch.dtype, wanted: list[str]) -> tuple[Any, ...]:
    """(leaves, {side: function}, {side: why not})."""
    draw = torch.Generator().manual_seed(1)
    leaves = [torch.randn(shape, generator=draw).to(device, dtype).requires_grad_() for shape in op.leaves(*size)]
    there: dict[str, Function] = {}
    missing: dict[str, str] = {}
    for side in (side for side in op.sides if side in wanted):
        try:
            function = op.sides[side](size)
            y = function(*leaves)
            torch.autograd.grad(y, leaves, torch.ones_like(y))
            there[side] = function
        except Exception as error:  # absent, or of a version or device it does not run on
            missing[side] = (str(error).splitlines() or [repr(error)])[0]
    return leaves, there, missing


def forward_and_backward(function: Function, leaves: list[Tensor]) -> tuple[float, float]:
    """Seconds of each."""
    found: list[Tensor] = []
    forward = seconds_of(lambda: found.append(function(*leaves)))
    slope = torch.ones_like(found[0])
    return forward, seconds_of(lambda: torch.autograd.grad(found[0], leaves, slope))


def measure(op: Op, size: tuple[int, ...], device: str, name: str, rounds: int, wanted: list[str]) -> dict[str, Any]:
    """The record of one case, in milliseconds."""
    leaves, sides, missing = prepare(op, size, device, DTYPES[name], wanted)
    source, target = leaves[0].detach(), torch.empty_like(leaves[0])
    times: dict[str, tuple[list[float], list[float]]] = {side: ([], []) for side in sides}
    copies = []
    for _ in range(rounds):
        copies.append(seconds_of(lambda: target.copy_(source)) * 1e3)
        for side, function in sides.items():
            for kept, seconds in zip(times[side], forward_and_backward(function, leaves), strict=True):
                kept.append(seconds * 1e3)
    copy = statistics.median(copies)  # reads and writes one tensor each
    record: dict[str, Any] = {"op": op.name, "size": list(size), "dtype": name, "copy_ms": significant(copy)}
    record["sides"] = {}
    for side, (forward, backward) in times.items():
        facts: dict[str, Any] = {"forward_ms": median_and_spread(forward), "backward_ms": median_and_spread(backward)}
        facts["kept_bytes"] = kept_bytes(sides[side], leaves)
        for which, taken, moved in zip(("forward", "backward"), (forward, backward), op.moved, strict=True):
            if moved:
                facts[f"{which}_of_copy"] = significant(copy * moved / 2 / statistics.median(taken), 3)
        record["sides"][side] = facts
    record["missing"] = missing
    return record


def rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One line of the table for each side."""
    found = []
    for side, facts in record["sides"].items():
        row = {"op": record["op"], "size": "x".join(map(str, record["size"])), "dtype": record["dtype"], "side": side}
        row |= {f"{which} ms": facts[f"{which}_ms"]["median"] for which in ("forward", "backward")}
        row |= {f"{which} of copy": facts.get(f"{which}_of_copy") for which in ("forward", "backward")}
        found.append(row | {"kept MiB": facts["kept_bytes"] / 2**20})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ops", nargs="*", default=[op.name for op in OPS], help="names, or their beginnings")
    parser.add_argument("--dtypes", nargs="*", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--sides", nargs="*", default=["growth_ds", "torch", "compile", "apex", "liger"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, help="of torch, on the CPU")
    parser.add_argument("--quick", action="store_true", help="one size each, five rounds, no torch.compile")
    parser.add_argument("--json", help="file for the record")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    wanted = [side for side in args.sides if not (args.quick and side == "compile")]
    cases = []
    for op in (op for op in OPS if op.name.startswith(tuple(args.ops))):
        for size in op.sizes[args.device][: 1 if args.quick else None]:
            for name in args.dtypes:
                cases.append(measure(op, size, args.device, name, 5 if args.quick else args.rounds, wanted))
    print(table([row for case in cases for row in rows(case)]))
    for side, why in {side: why for case in cases for side, why in case["missing"].items()}.items():
        print(f"{side}: {why}")
    if args.json:
        write_json(args.json, {**about(), "device": args.device, "cases": cases})


if __name__ == "__main__":
    main()
