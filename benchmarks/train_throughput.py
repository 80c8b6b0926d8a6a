"""Training throughput against transformers and DeepSpeed: `python benchmarks/train_throughput.py --json OUT`.

Ours is the engine of a run, on one rank with all cores. Peers are transformers' BertForMaskedLM (SDPA, fused AdamW) as
it is, compiled by `torch.compile`, and under DeepSpeed (ZeRO-1) with the AdamW that DeepSpeed makes; each in bf16, bf16
autocast and fp32, where it has them. `peers.py` says what they have in common and what not.

First every way is tried at three micro-batches, one after the other, each in its own process; its best one counts. Then
ours, the three fastest peers and the matrix products (`ceiling.py`) take turns: in every round each works for about a
second and a half while the others are blocked, and the order is reversed from round to round. Of the rounds it is:

    tokens_per_s              median of ours
    best_peer                 the peer with the highest median
    ratio_to_best_peer        median of (ours / that peer in the same round)
    spread                    interquartile range of that ratio: third quartile less first
    flops_per_s               useful FLOP/s of ours (`growth_ds.model.cost`: products only, the head where it is masked)
    share_of_matmul_ceiling   median of (flops_per_s / FLOP/s of the 4096 square in the same round; see `ceiling.py`)
    share_of_own_products     the same with the products of this very step, alone, in place of the square

`--json` gets an array, one record a case; what could not run is under `failures`, with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import about, significant, table, write_json
from benchmarks.peers import MASK_PROB, OURS, PEERS, Case, Way
from benchmarks.workers import Failed, Worker
from growth_ds.config import Model
from growth_ds.config_file import load_run, shipped
from growth_ds.model import cost

BERT = {"vocab_size": 30522, "positions": 512}
TRIALS = 2
"""Tries of each micro-batch after the first step, in turns; the fastest counts."""
SAME_LOSS = 0.05
"""Share by which first losses may differ: fresh weights of one distribution, but other draws of them."""
FINALISTS = 3
"""Peers that take turns with ours."""
COLUMNS = ("case", "goal", "tokens_per_s", "ratio_to_best_peer", "spread", "best_peer", "share_of_matmul_ceiling",
           "share_of_own_products")  # fmt: skip


def cases(device: str, quick: bool) -> list[Case]:
    """What is measured on a device."""
    small = Model.model_validate({**BERT, "layers": 4, "hidden": 256, "heads": 4, "ffn": 1024})
    base = Model.model_validate({**BERT, "layers": 4, "hidden": 768, "heads": 12, "ffn": 3072})
    large = Model.model_validate({**BERT, "layers": 24, "hidden": 1024, "heads": 16, "ffn": 4096})
    demo = load_run(shipped("run/demo.yaml")).stages[-1]
    published = {"dropout": 0.1, "attention_dropout": 0.1}
    if device == "cuda":
        found = [
            Case("BERT-Large, length 128", large, 128, (32, 64, 128), None),
            Case("BERT-Large, length 512", large, 512, (8, 16, 32), None),
        ]
        return found[:1] if quick else found
    found = [
        Case("4 x 256, vocabulary 30522, length 128", small, 128, (16, 32, 64), 3.0),
        Case(f"last model of the demo, length {demo.length}", demo.model, demo.length, (16, 32, 64), 2.0, 0.45),
        Case("BERT-Base width, 4 layers, length 512", base, 512, (4, 8, 16), 1.5, 0.60),
    ]
    dropped = replace(
        found[0], name=f"{found[0].name}, dropout 0.1", model=small.model_copy(update=published), goal=None
    )
    return found[:2] if quick else [*found, dropped]


@dataclass
class Tried:
    """A way at its best micro-batch."""

    way: Way
    rows: int
    steps_per_s: float
    tokens_per_s: dict[int, float]
    """Of every micro-batch that was tried."""
    first_loss: float
    first_seconds: float
    """Of the first step of every micro-batch, added up: compiling is in them."""
    unfinished: str | None = None
    """Why larger micro-batches are missing."""


def tried(way: Way, case: Case, device: str, limit: float) -> Tried:
    """The best of the micro-batches that are done within `limit` seconds. Raises Failed when none is."""
    deadline, rates, first_loss, first_seconds, unfinished = time.monotonic() + limit, {}, 0.0, 0.0, None
    with Worker(way.name, device, {"case": case.to_json(), "way": asdict(way)}) as worker:
        try:
            worker.start(limit)
            for rows in case.rows:
                left = max(1.0, deadline - time.monotonic())
                first = worker.ask({"rows": rows, "steps": 1}, left)  # compiles here
                first_loss, first_seconds = first_loss or first["loss"], first_seconds + first["seconds"]
                rates[rows] = _steps_per_s(worker, rows, 0.0)
            for rows in case.rows * TRIALS:
                rates[rows] = max(rates[rows], _steps_per_s(worker, rows, 1.0, rates[rows]))
        except Failed as failed:
            if not rates:
                raise
            unfinished = f"{rows} rows: {failed}"
    tokens = {rows: rate * rows * case.length for rows, rate in rates.items()}
    best = max(tokens, key=lambda rows: tokens[rows])
    return Tried(way, best, rates[best], tokens, first_loss, first_seconds, unfinished)


def _steps_per_s(worker: Worker, rows: int, seconds: float, guess: float = 0.0) -> float:
    """Rate over about `seconds`, one step at least; `guess` is the rate expected."""
    steps = max(1, round(guess * seconds))
    return steps / float(worker.ask({"rows": rows, "steps": steps})["seconds"])


def search(case: Case, ways: list[Way], device: str, limit: float) -> tuple[list[Tried], dict[str, str]]:
    """Every way at its best micro-batch, and what failed."""
    found, failures = [], {}
    for way in ways:
        try:
            new = tried(way, case, device, limit)
            if found and abs(new.first_loss / found[0].first_loss - 1) > SAME_LOSS:
                raise Failed(
                    f"its first loss is {new.first_loss:.4f}, that of {found[0].way.name} {found[0].first_loss:.4f}"
                )
            found.append(new)
            each = ", ".join(f"{rows}: {rate:,.0f}" for rows, rate in new.tokens_per_s.items())
            print(f"  {way.name:20s} tokens/s at rows {each}", flush=True)
        except Failed as failed:
            failures[way.name] = str(failed)
            print(f"  {way.name:20s} failed: {failed}", flush=True)
    return found, failures


def rounds(case: Case, those: list[Tried], device: str, count: int, seconds: float) -> dict[str, list[float]]:
    """Tokens/s of each way, and FLOP/s of "square" and "shapes", in every round."""
    rates: dict[str, list[float]] = {name: [] for name in ("square", "shapes", *(each.way.name for each in those))}
    with contextlib.ExitStack() as alive:
        products = alive.enter_context(Worker("products", device, {"case": case.to_json(), "way": None})).start(300)
        turns: list[Callable[[], None]] = []

        def multiply() -> None:
            for name, rate in products.ask({"rows": those[0].rows, "seconds": seconds / 2}).items():
                rates[name].append(rate)

        turns.append(multiply)
        for each in those:
            worker = Worker(each.way.name, device, {"case": case.to_json(), "way": asdict(each.way)})
            alive.enter_context(worker).start(600)
            worker.ask({"rows": each.rows, "steps": 3}, 900)  # compiles once more, though much is cached

            def train(each: Tried = each, worker: Worker = worker) -> None:
                rate = _steps_per_s(worker, each.rows, seconds, each.steps_per_s)
                rates[each.way.name].append(rate * each.rows * case.length)

            turns.append(train)
        for number in range(count):
            for turn in turns if number % 2 == 0 else reversed(turns):
                turn()
    return rates


def measure(case: Case, ways: list[Way], device: str, count: int, limit: float) -> dict[str, Any]:
    """The record of one case. Raises Failed when ours, or every peer, does."""
    print(f"{case.name}:", flush=True)
    found, failures = search(case, [OURS, *ways], device, limit)
    if not found or found[0].way != OURS or len(found) < 2:
        raise Failed(f"{case.name}: nothing to compare; {failures}")
    fastest = sorted(found[1:], key=lambda each: -max(each.tokens_per_s.values()))[:FINALISTS]
    rates = rounds(case, [found[0], *fastest], device, count, seconds=1.5)
    ours = rates[OURS.name]
    medians = {each.way.name: statistics.median(rates[each.way.name]) for each in fastest}
    best = max(medians, key=lambda name: medians[name])
    ratio = _paired(ours, rates[best])
    flops_per_token = cost.train_flops_per_row(case.model, case.length, MASK_PROB) / case.length
    flops = [rate * flops_per_token for rate in ours]
    low, _, high = statistics.quantiles(ratio, n=4, method="inclusive")
    return {
        "case": case.name,
        "goal": case.goal,
        "share_goal": case.share_goal,
        "tokens_per_s": significant(statistics.median(ours)),
        "ratio_to_best_peer": significant(statistics.median(ratio)),
        "best_peer": best,
        "share_of_matmul_ceiling": significant(statistics.median(_paired(flops, rates["square"]))),
        "spread": significant(high - low),
        "flops_per_s": significant(statistics.median(flops)),
        "share_of_own_products": significant(statistics.median(_paired(flops, rates["shapes"]))),
        "peer_tokens_per_s": {name: significant(rate) for name, rate in medians.items()},
        "matmul_flops_per_s": {name: significant(statistics.median(rates[name])) for name in ("square", "shapes")},
        "rounds": {name: [significant(rate) for rate in values] for name, values in rates.items()},
        "search": [_searched(each) for each in found],
        "failures": failures,
        "model": case.model.model_dump(mode="json"),
        "length": case.length,
        "device": device,
        **about(),
    }


def _paired(upper: list[float], lower: list[float]) -> list[float]:
    return [above / below for above, below in zip(upper, lower, strict=True)]


def _searched(each: Tried) -> dict[str, Any]:
    rates = {rows: significant(rate) for rows, rate in each.tokens_per_s.items()}
    found = {"way": each.way.name, "rows": each.rows, "tokens_per_s": rates, "first_loss": significant(each.first_loss)}
    return found if each.unfinished is None else {**found, "unfinished": each.unfinished}


def options(doc: str | None) -> argparse.ArgumentParser:
    """The command line of a script that measures these cases."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="the two small cases")
    parser.add_argument("--json", type=Path, help="file for the records")
    parser.add_argument("--case", default="", help="only cases with this in their name")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument(
        "--limit", type=float, default=600.0, help="seconds for the trial of one way, compiling included"
    )
    return parser


def measure_all(args: argparse.Namespace, measure: Callable[[Case], dict[str, Any]], columns: Sequence[str]) -> None:
    """Measure the cases that `args` ask for, write all records after each, and print them."""
    records: list[dict[str, Any]] = []
    for case in cases(args.device, args.quick):
        if args.case in case.name:
            records.append(measure(case))
            if args.json:
                write_json(args.json, records)
    print(table(records, columns))


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--peers", default="", help="only peers with one of these words in their name, comma-separated")
    args = parser.parse_args()
    ways = [way for way in PEERS if any(word in way.name for word in args.peers.split(","))]
    measure_all(args, lambda case: measure(case, ways, args.device, args.rounds, args.limit), COLUMNS)


if __name__ == "__main__":
    main()
