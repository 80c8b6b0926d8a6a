"""docker/Dockerfile.cpu as it is: built, looked at, and run as one job of two containers on two hosts.

Of docker/Dockerfile the last stage alone, over the CPU image's environment. `make test-image`; what can be seen without
an image is in tests/test_image.py.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from growth_ds import __version__
from growth_ds.config_file import dump_run
from growth_ds.run_folder import RunFolder
from tests.cluster.conftest import two_stages
from tests.cluster.images import CACHE, Engine, unable
from tests.cluster.lab import Lab
from tests.cluster.runs import ROOT, events, losses, ranks_at_start
from tests.cluster.settings import ADDRESS, NODES

pytestmark = pytest.mark.image
BASE = "docker.io/library/python:3.11-slim-bookworm"
IMAGE = "localhost/growth-ds:cpu"
REVISION = "0123456789abcdef0123456789abcdef01234567"
GPUS = "localhost/growth-ds:last-stage"
LARGEST = 1.6e9
"""Bytes: the stand-in base (0.25e9) and ours; torch alone is 0.6e9."""
STRANGER = 4321
"""A user whom the image does not know, as `--user $(id -u)` makes one."""
LIMIT_S = 240
_ports = itertools.count(33000)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine with the stand-in base; nothing of it is left."""
    if reason := unable():
        pytest.skip(reason)
    cache_was_here = CACHE.exists()
    with Engine(tmp_path_factory.mktemp("engine")) as made:
        made.stand_in(BASE)
        yield made
    assert not made.folder.exists()
    assert made.mounts() == []
    assert CACHE.exists() == cache_was_here


@pytest.fixture(scope="module")
def image(engine: Engine) -> str:
    """The id of the built image."""
    return engine.build(ROOT / "docker/Dockerfile.cpu", IMAGE, f"--build-arg=REVISION={REVISION}")


def config_of(engine: Engine, name: str = IMAGE) -> dict[str, Any]:
    """What the image says of itself."""
    (found,) = json.loads(engine.podman("image", "inspect", name))
    return dict(found)


def test_it_is_small(engine, image, capsys):
    size, base = engine.size(IMAGE), engine.size(BASE)
    with capsys.disabled():
        print(f"\n{IMAGE}: {size / 1e9:.2f} GB, {base / 1e9:.2f} of them the stand-in base")
    assert size < LARGEST


def test_labels_and_user(engine, image):
    config = config_of(engine)
    labels = config["Labels"]
    assert labels["org.opencontainers.image.version"] == __version__
    assert labels["org.opencontainers.image.revision"] == REVISION
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert config["User"] == "1000:1000"


def test_its_kernels_are_taken(engine, image):
    record = json.loads(engine.run(IMAGE, "doctor", "--json"))
    assert {row["takes"] for row in record["ops"]} == {"cpu"}
    assert record["image"]["revision"] == REVISION
    assert record["image"]["contents"].startswith("sha256:")


def test_it_has_no_compiler_and_nothing_of_the_builds(engine, image):
    left = "command -v gcc c++ ninja; ls /src /root/.cache /var/lib/apt/lists/* 2>/dev/null; true"
    assert engine.run(IMAGE, "-c", left, options=("--entrypoint=sh", "--user=0")) == ""


def test_health_check(engine, image):
    """The engine's own: asked by hand, as there is no systemd here that would ask."""
    command = engine.command(IMAGE, "60", options=("--detach", "--entrypoint=sleep", "--name=ill"))
    command.remove("--no-healthcheck")
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    engine.podman("healthcheck", "run", "ill")
    engine.podman("rm", "--force", "--time=0", "ill")


def test_the_last_stage_of_the_image_for_gpus(engine, image, tmp_path):
    """What follows the compiling, line by line as it stands; on Debian, where the file means Ubuntu."""
    text = (ROOT / "docker/Dockerfile").read_text()
    before = f"ARG BASE={BASE}\nARG CUDA=none\nARG APEX=none\nFROM {IMAGE} AS build\n"
    (tmp_path / "Dockerfile").write_text(before + text[text.rindex("FROM ${BASE}") :])
    engine.build(tmp_path / "Dockerfile", GPUS, f"--build-arg=REVISION={REVISION}")
    config = config_of(engine, GPUS)
    assert config["User"] == "2000:2000"
    assert config["Labels"]["growth_ds.sm"] == "80 90"
    programs = "id -u && command -v ssh pdsh mpirun growth-ds >/dev/null && ls /etc/libibverbs.d/mlx5.driver"
    assert engine.run(GPUS, "-c", programs, options=("--entrypoint=sh",)).split()[0] == "2000"
    assert json.loads(engine.run(GPUS, "doctor", "--json"))["image"]["revision"] == REVISION


@pytest.fixture
def place(tmp_path, store):
    """A folder for runs that a stranger may write, with a config of twenty steps and one growth."""
    run = two_stages("twenty", 10, 10)
    run = run.model_copy(update={"data": run.data.model_copy(update={"store": "/store"})})
    (tmp_path / "twenty.yaml").write_text(dump_run(run))
    os.chown(tmp_path, STRANGER, STRANGER)
    return tmp_path


def train_on_both_hosts(lab: Lab, engine: Engine, image: str, place: Path, store: Path, name: str) -> None:
    """docker/README.md's line for several hosts, on each of the two: one job of two ranks, one in each container."""
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=n1:{next(_ports)}"]
    started = []
    for host in NODES:
        options = [f"--network=ns:/run/netns/{lab.netns(host)}", f"--hostname={host}", f"--user={STRANGER}:{STRANGER}"]
        options += [f"--add-host={each}:{ADDRESS[each]}" for each in NODES]
        options += [f"--volume={place}:/work", f"--volume={store}:/store:ro", "--passwd=false"]
        options += [f"--env=GROWTH_DS_IMAGE_ID={image}", "--entrypoint=torchrun"]
        words = ["--nnodes=2", "--nproc-per-node=1", *rendezvous]
        words += ["-m", "growth_ds", "train", "twenty.yaml", "--run-dir", name]
        command = engine.command(IMAGE, *words, options=tuple(options))
        started.append(subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    said = [process.communicate(timeout=LIMIT_S)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said


def digest(engine: Engine, place: Path, name: str) -> str:
    """What `growth-ds inspect` in the image says of the last checkpoint."""
    options = (f"--volume={place}:/work:ro", f"--user={STRANGER}")
    return str(
        json.loads(engine.run(IMAGE, "inspect", name, "--digest", "--verify", "--json", options=options))["digest"]
    )


def test_two_containers_on_two_hosts(lab, engine, image, place, store, ran):
    digests = []
    for name in ("first", "second"):
        train_on_both_hosts(lab, engine, image, place, store, name)
        assert len(losses(place / name)) == 20
        assert ranks_at_start(place / name) == 2
        assert events(place / name).count("growth") == 1
        assert events(place / name)[-1] == "finish"
        assert {path.stat().st_uid for path in (place / name).rglob("*")} == {STRANGER}
        digests.append(digest(engine, place, name))
    assert digests[0] == digests[1]
    start = RunFolder(place / "first").records(place / "first/ledger.jsonl")[0]
    assert start["image"]["id"] == f"sha256:{image.removeprefix('sha256:')}"
    assert start["image"]["revision"] == REVISION
    ran("torchrun in containers of Dockerfile.cpu", "2 hosts x 1")
