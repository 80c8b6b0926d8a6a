"""Run many cases in one process group: one start per file, results by name.

A case is a function `case_<name>()` of a module. `run_cases(module, ranks)` starts the ranks once, each runs the cases
in order and notes how they went; pytest then asks for each by name:

    CASES = case_names("tests.engine.cases_state")

    @pytest.fixture(scope="module")
    def results(): return run_cases("tests.engine.cases_state", ranks=2)

    @pytest.mark.parametrize("name", CASES)
    def test_state(results, name): check(results, name)

After a failure the ranks no longer agree on where they are: the later cases are reported as not run.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

from tests.ranks import ROOT, forked

TIMEOUT_S = 60  # of one collective: a rank left alone fails then


def case_names(module: str) -> list[str]:
    """Names of the cases of a module, in the order they are written."""
    return [name.removeprefix("case_") for name in vars(importlib.import_module(module)) if name.startswith("case_")]


def without_other_stages(module: str) -> tuple[list[str], list[str]]:
    """The names of a module's cases: those for every `make test`, and those that repeat a run in other ZeRO stages."""
    names = case_names(module)
    others = [name for name in names if name.endswith("_under_every_stage")]
    return [name for name in names if name not in others], others


def run_cases(
    module: str, ranks: int, names: list[str] | None = None, limit_s: float = 240, fresh: bool = False
) -> dict[str, str]:
    """Case name -> "" or what went wrong on which rank. Starts `ranks` processes and waits for them.

    They are forked from one that has imported everything. `fresh`: they are processes from the start instead, for
    cases about a process itself; so is every rank where there is a GPU, which does not survive a fork.
    """
    names = names or case_names(module)
    with tempfile.TemporaryDirectory() as out:
        command = ["tests.engine.distributed_cases", module, out, *names]
        if fresh or torch.cuda.is_available():
            _run_fresh(command, ranks, Path(out), limit_s)
        else:
            forked().run(command, ranks, Path(out, "log"), limit_s)
        return {name: _outcome(Path(out), name, ranks) for name in names}


def _run_fresh(command: list[str], ranks: int, out: Path, limit_s: float) -> None:
    from growth_ds.engine.distributed import free_port

    port, processes, until = str(free_port()), [], time.monotonic() + limit_s
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        env = {**os.environ, **{key: str(value) for key, value in place.items()}}
        env["OMP_NUM_THREADS"] = "1"  # tiny matrices: a second thread only waits, 20 times longer on a busy machine
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(ROOT)}
        with open(out / f"log.{rank}", "w") as log:
            argv = [sys.executable, "-m", *command]
            processes.append(subprocess.Popen(argv, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT))
    try:
        for process in processes:
            process.wait(max(0.1, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _outcome(out: Path, name: str, ranks: int) -> str:
    problems = []
    for rank in range(ranks):
        path = out / f"{name}.{rank}"
        if not path.exists():
            log = (out / f"log.{rank}").read_text()[-3000:]
            problems.append(f"[rank {rank}] not run or not finished; end of its log:\n{log}")
        elif json.loads(path.read_text())["error"]:
            problems.append(f"[rank {rank}] " + json.loads(path.read_text())["error"])
    return "\n".join(problems)


def check(results: dict[str, str], name: str) -> None:
    """Fail the calling test with the case's report."""
    assert not results[name], f"case {name}:\n{results[name]}"


def main(module: str, out: str, names: list[str]) -> int:
    from growth_ds.engine import distributed

    info = distributed.init_distributed(timeout_s=TIMEOUT_S)
    cases = importlib.import_module(module)
    # Every close() collects garbage; 0.2 s each to walk over the modules of torch and DeepSpeed, none without them.
    gc.collect()
    gc.freeze()
    for name in names:
        error = ""
        try:
            getattr(cases, f"case_{name}")()
        except BaseException:  # a case may end the process: that is a failure with a name too
            error = traceback.format_exc()
        Path(out, f"{name}.{info.rank}").write_text(json.dumps({"error": error}))
        if error:
            return 1
    distributed.barrier()
    distributed.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
