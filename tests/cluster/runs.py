"""What a run in the lab is started with, and what it has left behind."""

from __future__ import annotations

import sys
from pathlib import Path

from growth_ds.inspection import inspect
from growth_ds.run_folder import RunFolder
from tests.cluster.lab import Lab, wait_for
from tests.cluster.settings import HEAD

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
VENV = Path(sys.executable).parent.parent
# What a task of Slurm has to tell torch.
PLACE = """export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES)); exec "$@"
"""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


def train(config: Path, folder: Path) -> list[str]:
    """The command of one rank."""
    return [sys.executable, "-m", "growth_ds", "train", str(config), "--run-dir", str(folder)]


def losses(folder: Path) -> list[float]:
    """Of every step, in order; empty before the first. Fails if a step stands there twice or is missing."""
    metrics = folder / "metrics.jsonl"
    records = RunFolder(folder).records(metrics) if metrics.is_file() else []
    found = [(record["step"], record["loss"]) for record in records if "loss" in record]
    assert [step for step, _ in found] == list(range(1, len(found) + 1))
    return [loss for _, loss in found]


def steps(folder: Path) -> int:
    """Steps that have been recorded, read while others write."""
    metrics = folder / "metrics.jsonl"
    return sum('"loss"' in line for line in metrics.read_text().splitlines()) if metrics.is_file() else 0


def digest(folder: Path) -> str:
    """SHA-256 of the final state, after every byte was compared with the manifest."""
    return str(inspect(folder, digest=True, verify=True)["digest"])


def events(folder: Path) -> list[str]:
    """What the ledger tells, without its figures."""
    return [str(line["event"]) for line in RunFolder(folder).records(folder / "ledger.jsonl")]


def ranks_at_start(folder: Path) -> int:
    """The number of ranks that the ledger's first line tells."""
    return int(RunFolder(folder).records(folder / "ledger.jsonl")[0]["ranks"])


class Job:
    """A job of slurm/train.sbatch."""

    def __init__(self, lab: Lab, log: Path, *arguments: str, script: str = "slurm/train.sbatch", **env: str) -> None:
        """Submits it; `arguments` are options of sbatch, then, after "--", those of the script."""
        self.lab, self.log = lab, log
        cut = arguments.index("--")
        options = [*arguments[:cut], "--cpus-per-task=1", f"--output={log}"]
        command = ["sbatch", "--parsable", *options, str(ROOT / script), *arguments[cut + 1 :]]
        environment = {**ENVIRONMENT, "GROWTH_DS_VENV": str(VENV), **env}
        self.number = int(lab.on(HEAD, command, env=environment, cwd=log.parent).stdout.strip())

    def facts(self) -> dict[str, str]:
        """What scontrol says of it."""
        said = self.lab.on(HEAD, ["scontrol", "show", "job", "-o", str(self.number)]).stdout
        return dict(word.split("=", 1) for word in said.split() if "=" in word)

    def state(self) -> str:
        return self.facts()["JobState"]

    def wait(self, limit_s: float, release: Path | None = None) -> dict[str, str]:
        """Until it has ended by itself: scontrol's facts. Not `sbatch --wait`, which asks ever more seldom.

        `release`: the file at which a rank holds still; it is let go whenever it does.
        """

        def ended() -> bool:
            if release is not None:
                release.unlink(missing_ok=True)
            return self.state() in ENDED

        wait_for(ended, limit_s, f"the end of job {self.number} ({self.log})", 1.0)
        facts = self.facts()
        assert facts["JobState"] == "COMPLETED", self.log.read_text()
        return facts

    def accounted(self) -> list[str]:
        """The states in which it has ended, as accounting tells them, oldest first."""
        asked = ["sacct", "-c", "-n", "-P", "-j", str(self.number), "-o", "jobid,state"]
        return [line.split("|")[1] for line in self.lab.on(HEAD, asked).stdout.splitlines()]


TWO_HOSTS = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2", "--time=30")


def submit(lab: Lab, config: Path, folder: Path, *options: str, **env: str) -> Job:
    """Train in `folder`/run on two hosts; `options` of sbatch come last and win."""
    return Job(
        lab, folder / "job.log", *TWO_HOSTS, *options, "--", str(config), "--run-dir", str(folder / "run"), **env
    )
