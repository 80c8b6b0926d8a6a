"""cases_disk.py on two ranks; a full disk under the real command; lines and folders without any engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from growth_ds.board import TensorBoard
from growth_ds.checkpoint import open_verified
from growth_ds.config_file import dump_run
from growth_ds.errors import UserError
from growth_ds.run_folder import RunFolder
from growth_ds.saving import Saver
from tests.checkpoints import TINY, write_random
from tests.cli import growth_ds
from tests.distributed.corpus import own_folder, small_run
from tests.distributed.test_launchers import LIMIT_S, environment, losses
from tests.engine.distributed_cases import case_names, check, run_cases
from tests.ranks import forked

CASES = "tests.distributed.cases_disk"


def _can_mount(path: Path) -> bool:
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(path)]
    try:
        done = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False
    if done:
        subprocess.run(["umount", str(path)], check=True)
    return done


@pytest.fixture(scope="module")
def can_mount(tmp_path_factory):
    if not _can_mount(tmp_path_factory.mktemp("try") / "disk"):
        pytest.skip("only root may mount a small disk")


@pytest.fixture(scope="module")
def results(can_mount, store, tmp_path_factory):
    with own_folder(store, tmp_path_factory, "disks"):
        return run_cases(CASES, ranks=2, limit_s=300)


@pytest.mark.parametrize("name", case_names(CASES))
def test_case(results, name):
    check(results, name)


@pytest.fixture
def disk(can_mount, tmp_path):
    """A disk of half a megabyte."""
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(path)], check=True)
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture
def command(tmp_path, store):
    """`growth_ds train` of six steps with a checkpoint after every second one, but for the run's folder."""
    config = tmp_path / "six.yaml"
    config.write_text(dump_run(small_run("six", steps=(6,), checkpoint={"every": 2})))
    return ["growth_ds", "train", str(config), "--resume", "auto", "--run-dir"]


def _forked(command: list[str], ranks: int, log: Path) -> tuple[list[int | None], str]:
    """Exit code of every rank, what rank 0 printed."""
    codes = forked().run(command, ranks, log, LIMIT_S)
    return codes, log.with_name(f"{log.name}.0").read_text()


def test_the_command_on_a_full_disk(disk, tmp_path, command):
    """Exit code 2 and one line; with more room the same command ends with the losses of a run that had it."""
    argv = [sys.executable, "-m", *command, str(disk / "run"), "--ranks", "2"]
    full = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=LIMIT_S)
    assert full.returncode == 2, full.stdout + full.stderr
    [line] = full.stderr.splitlines()
    assert "step-00000004-stage-0" in line
    assert "No space left on device" in line
    newest = RunFolder(disk / "run").newest()
    assert newest is not None
    assert newest.facts["step"] == 2
    assert [path.name for path in newest.path.parent.glob(".*")] == []
    subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
    codes, said = _forked([*command, str(disk / "run")], 2, tmp_path / "again")
    assert codes == [0, 0], said
    assert "going on from step 2 of 6" in said
    codes, said = _forked([*command, str(tmp_path / "roomy")], 2, tmp_path / "roomy-log")
    assert codes == [0, 0], said
    assert losses(disk / "run") == pytest.approx(losses(tmp_path / "roomy"), abs=1e-6)


def test_the_command_goes_on_from_the_newest_whole_checkpoint(tmp_path, command):
    """A flipped byte in the last one: named, and the steps after the one before it are computed again."""
    folder, seen = RunFolder(tmp_path / "run"), []
    for start in range(2):
        codes, said = _forked([*command, str(folder.path)], 1, tmp_path / f"log-{start}")
        assert codes == [0], said
        newest = open_verified(folder.checkpoint_path(6, 0))
        seen.append((said, losses(folder.path), newest.digest()))
        damaged = folder.checkpoint_path(6, 0) / "rank-00000.safetensors"
        data = bytearray(damaged.read_bytes())
        data[-7] ^= 16
        damaged.write_bytes(data)
    assert f"{damaged}: damaged in {newest.manifest.spans()[damaged.name][-1][3]} (" in seen[1][0]
    assert "falling back to an older checkpoint\ngoing on from step 4 of 6" in seen[1][0]
    assert seen[1][1:] == seen[0][1:], "the same losses, and the same state"


def test_lines_are_whole_or_not_there(disk):
    """Until the disk is full, and after there is room again."""
    folder = RunFolder(disk)
    (disk / "ballast").write_bytes(bytes(500_000))
    written = 0

    def append_for_ever() -> None:
        nonlocal written
        while written < 100_000:
            folder.append(folder.metrics, {"step": written + 1, "stage": 0, "loss": 1.5})
            written += 1

    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written \(No space left on device\)"):
        append_for_ever()
    assert written > 100
    assert [record["step"] for record in folder.records(folder.metrics)] == list(range(1, written + 1))
    assert folder.metrics.read_bytes().endswith(b"\n")
    (disk / "ballast").unlink()
    folder.append(folder.metrics, {"step": written + 1, "stage": 0, "loss": 1.5})
    assert folder.records(folder.metrics)[-1]["step"] == written + 1


@pytest.mark.parametrize(
    "rest", [b'{"step": 3, "sta', b'{"step": 3', b"\0\0\0\0", b"\xff\xfe{", b'{"step": 3, "stage": 0}']
)
def test_what_a_power_cut_leaves_is_forgotten(tmp_path, rest):
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    for step in (1, 2):
        folder.append(folder.metrics, {"step": step, "stage": 0})
    with folder.metrics.open("ab") as file:
        file.write(rest)
    folder.trim(2, 0)
    assert [json.loads(line) for line in folder.metrics.read_text().splitlines()] == [
        {"step": 1, "stage": 0},
        {"step": 2, "stage": 0},
    ]


def test_tensorboard_on_a_full_disk(disk, capfd):
    """One line from us, and nothing from its thread; closing it is quiet too."""
    board = TensorBoard(disk / "tensorboard")
    board.add("train", {"step": 0, "loss": 1.0})
    (disk / "ballast").write_bytes(bytes(480_000))

    def add_for_ever() -> None:
        for step in range(1, 100_000):
            board.add("train", {"step": step, "loss": 1.0})

    with pytest.raises(UserError, match=r"tensorboard: cannot be written \(No space left on device\); make room"):
        add_for_ever()
    board.close()
    assert capfd.readouterr().err == ""


def test_offline_work_on_a_full_disk(disk, tmp_path, monkeypatch, capsys):
    write_random(tmp_path / "c")
    (disk / "ballast").write_bytes(bytes(460_000))
    argv = ["grow", tmp_path / "c", "--times", "2", "--recipe", "tile", "--out", disk / "grown"]
    result = growth_ds(monkeypatch, capsys, *argv)
    assert result.code == 2
    assert (
        result.err == f"{disk}/grown: cannot be written (No space left on device); give a folder that can [GDS-O01]\n"
    )
    assert [path.name for path in disk.iterdir()] == ["ballast"]
    (disk / "ballast").unlink()
    assert growth_ds(monkeypatch, capsys, *argv).code == 0
    open_verified(disk / "grown")


def test_a_run_folder_that_is_gone_does_not_come_back(tmp_path, store):
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(UserError, match="checkpoints: is gone; put it back"):
        Saver(small_run(), folder, None)._begin(folder.checkpoint_path(3, 0), TINY, {})
    assert not folder.path.exists()
