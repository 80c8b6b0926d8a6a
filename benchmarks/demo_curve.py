"""The README's picture and table of the demo: `python benchmarks/demo_curve.py runs/demo` (after `make demo`).

Writes `benchmarks/results/demo_curve.png` and `demo.json` (figures, hardware, versions).
"""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.common import RESULTS, processor
from growth_ds.report.curves import save_png
from growth_ds.report.rows import events, summary
from growth_ds.report.series import read_curve
from growth_ds.run_folder import RunFolder


def main(folder: Path) -> None:
    runs = {"grown": RunFolder(folder), "from scratch": RunFolder(folder / "scratch")}
    curves = [read_curve(name, run) for name, run in runs.items()]
    save_png(RESULTS / "demo_curve.png", curves, summary(runs["grown"]).unigram_entropy, dpi=110)
    start = events(runs["grown"], "start")[0]
    record = {
        "hardware": {"processor": processor(), "cores": os.cpu_count(), "system": platform.platform()},
        **{key: start[key] for key in ("ranks", "zero", "precision", "versions")},
        "runs": {name: asdict(summary(run)) for name, run in runs.items()},
        "growths": events(runs["grown"], "growth"),
    }
    (RESULTS / "demo.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"))
