"""What `engine.compile` gains: `python benchmarks/compiled.py --json OUT`.

The same engine with its layers compiled and as they are, each at its best micro-batch, in turns in every round (see
`train_throughput.py`, whose cases these are). The record of a case:

    gain             median of (tokens/s compiled / tokens/s plain in the same round)
    spread           interquartile range of that ratio
    compile_seconds  the first step of all micro-batches tried, less as many later ones: what compiling takes
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import about, significant
from benchmarks.peers import COMPILED, OURS, Case
from benchmarks.train_throughput import measure_all, options, rounds, search
from benchmarks.workers import Failed

COLUMNS = ("case", "tokens_per_s", "compiled_tokens_per_s", "gain", "spread", "compile_seconds")


def measure(case: Case, device: str, count: int, limit: float) -> dict[str, Any]:
    """The record of one case. Raises Failed when one of the two ways does."""
    print(f"{case.name}:", flush=True)
    found, failures = search(case, [OURS, COMPILED], device, limit)
    if len(found) < 2:
        raise Failed(f"{case.name}: {failures}")
    plain, compiled = found
    rates = rounds(case, found, device, count, seconds=1.5)
    gains = [a / b for a, b in zip(rates[COMPILED.name], rates[OURS.name], strict=True)]
    low, _, high = statistics.quantiles(gains, n=4, method="inclusive")
    return {
        "case": case.name,
        "tokens_per_s": significant(statistics.median(rates[OURS.name])),
        "compiled_tokens_per_s": significant(statistics.median(rates[COMPILED.name])),
        "gain": significant(statistics.median(gains)),
        "spread": significant(high - low),
        "compile_seconds": significant(compiled.first_seconds - plain.first_seconds),
        "rows": {each.way.name: each.rows for each in found},
        "rounds": {name: [significant(rate) for rate in values] for name, values in rates.items()},
        "device": device,
        **about(),
    }


def main() -> None:
    args = options(__doc__).parse_args()
    measure_all(args, lambda case: measure(case, args.device, args.rounds, args.limit), COLUMNS)


if __name__ == "__main__":
    main()
