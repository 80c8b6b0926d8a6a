"""BERT-Large is real: 12 -> 24 layers of width 1024 on two CPU ranks (`make test-large`: minutes, 20 GiB)."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from growth_ds.config_file import shipped
from growth_ds.run_folder import RunFolder

GIB = 2**30
LIMIT = 20 * GIB


class Peak(threading.Thread):
    """Largest sum of the memory of a process tree; shared pages (mapped files) are divided among who maps them."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.process, self.bytes = psutil.Process(pid), 0
        self.start()

    def run(self) -> None:
        while self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE:
            total = 0
            for member in [self.process, *self.process.children(recursive=True)]:
                try:
                    total += member.memory_full_info().pss
                except psutil.Error:
                    continue
            self.bytes = max(self.bytes, total)
            time.sleep(0.5)


@pytest.mark.large
def test_bert_large_grows_within_20_gib(store: Path, tmp_path: Path) -> None:
    overrides = ["model.vocab_size=30522", f"data.store={store}", "evaluation.tokens=512", "evaluation.every=0"]
    for stage in range(3):
        overrides += [f"stages.{stage}.steps=2", f"stages.{stage}.batch={{global: 2, micro: 1}}"]
    command = [sys.executable, "-m", "growth_ds", "train", str(shipped("run/bert-large-stack.yaml")), "--ranks", "2"]
    command += ["--run-dir", str(tmp_path / "run")]
    for override in overrides:
        command += ["--set", override]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak = Peak(process.pid)
    out, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, out
    folder = RunFolder(tmp_path / "run")
    growths = [record for record in folder.records(folder.ledger) if record["event"] == "growth"]
    assert [record["axes"][0]["new"] for record in growths] == [12, 24]
    assert folder.newest().model.layers == 24
    seconds = [record["seconds"] for record in growths]
    print(json.dumps({"peak_gib": round(peak.bytes / GIB, 2), "growth_seconds": seconds}))
    assert peak.bytes < LIMIT
