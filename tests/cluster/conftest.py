"""The lab and the runs that all cluster tests share, and the table of what was really run."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from growth_ds.config import Run
from growth_ds.config_file import dump_run
from tests.cluster.lab import Lab, alone, unable
from tests.cluster.runs import digest, losses, ranks_at_start, submit
from tests.distributed.corpus import SMALL, small_run
from tests.ranks import forked

RAN: list[tuple[str, str, float]] = []
"""(launcher, hosts x ranks, seconds) of the runs that were looked at and found right."""

SUFFERED: list[tuple[str, str, float, list[int | None], str]] = []
"""(launcher, fault, seconds, exit codes, sentence) of every fault, also where it was not as it should be."""


def two_stages(name: str, first: int, second: int) -> Run:
    """A small BERT that grows in depth, FFN and length; its batches can be cut into four, for two ranks a host."""
    batch = {"global": 8, "micro": 2}
    return small_run(
        name,
        engine={"precision": "fp32", "zero": 2, "timeout_s": 30},
        checkpoint={"every": 20},
        stages=[
            {"model": SMALL, "length": 16, "batch": batch, "steps": first},
            {"model": {"layers": 4, "ffn": 82}, "length": 32, "batch": batch, "steps": second},
        ],
    )


@pytest.fixture(scope="session")
def machine() -> Iterator[None]:
    """This machine can have a lab, and no other process has one; else skipped, or waited for."""
    if reason := unable():
        pytest.skip(reason)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which pytest answers by taking everything down
    with alone():
        yield


@pytest.fixture(scope="session")
def lab(machine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Two nodes and a head with Slurm; taken down whatever happens."""
    with Lab(tmp_path_factory.mktemp("lab")) as made:
        yield made


@pytest.fixture(autouse=True)
def both_nodes_are_free(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that fails leaves no job to the next one, and no host without power."""
    yield
    if "lab" in request.fixturenames:
        request.getfixturevalue("lab").tidy()


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    """Forty steps in two stages, depth and FFN grown between them."""
    path = tmp_path_factory.mktemp("configs") / "forty.yaml"
    path.write_text(dump_run(two_stages("forty", 10, 30)))
    return path


@pytest.fixture(scope="session")
def long_config(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    """The same with a second stage that is long enough to be cut off."""
    path = tmp_path_factory.mktemp("configs") / "long.yaml"
    path.write_text(dump_run(two_stages("long", 10, 300)))
    return path


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    """Longer than any test, and with the timeout of half an hour that a run has by itself."""
    run = two_stages("endless", 10, 20_000)
    path = tmp_path_factory.mktemp("configs") / "endless.yaml"
    path.write_text(dump_run(run.model_copy(update={"engine": run.engine.model_copy(update={"timeout_s": 1800.0})})))
    return path


@pytest.fixture(scope="session")
def on_one_host(tmp_path_factory: pytest.TempPathFactory, config: Path) -> list[float]:
    """Losses of the forty steps on one rank, without launcher or lab."""
    folder = tmp_path_factory.mktemp("one-host")
    command = ["growth_ds", "train", str(config), "--run-dir", str(folder / "run")]
    assert forked().run(command, 1, folder / "log", 180) == [0], (folder / "log.0").read_text()
    return losses(folder / "run")


@pytest.fixture(scope="session")
def undisturbed(lab: Lab, long_config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], str]:
    """Losses and final digest of the long run as a job that nothing disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    facts = submit(lab, long_config, folder).wait(300)
    assert facts["Restarts"] == "0"
    assert ranks_at_start(folder / "run") == 2
    assert len(losses(folder / "run")) == 310
    return losses(folder / "run"), digest(folder / "run")


@pytest.fixture
def ran() -> Callable[[str, str], None]:
    """To be called at a test's end: it stands in the table then, with the seconds since the test began."""
    started = time.monotonic()
    return lambda launcher, shape: RAN.append((launcher, shape, time.monotonic() - started))


@pytest.fixture
def suffered() -> Callable[[str, str, float, list[int | None], str], None]:
    """To be called when all is over, before it is looked at: a row of the table of faults."""
    return lambda *row: SUFFERED.append(row)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Launchers and hosts, from the runs that ended as they should; and what faults led to."""
    if RAN:
        terminalreporter.section("launchers x hosts really run")
        for launcher, shape, seconds in RAN:
            terminalreporter.write_line(f"{launcher:<44} {shape:<20} {seconds:6.1f} s")
    if SUFFERED:
        terminalreporter.section("faults: seconds until nothing was left, exit codes, what was said")
        for launcher, fault, seconds, codes, said in SUFFERED:
            ends = ", ".join("-" if code is None else str(code) for code in codes)
            terminalreporter.write_line(f"{launcher:<28} {fault:<17} {seconds:5.1f} s  {ends:<7}  {said}")
