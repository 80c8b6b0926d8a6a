"""Folders that replace others, and what a kill in between leaves."""

from __future__ import annotations

import pytest

from growth_ds import convert, faults, files, offline
from growth_ds.checkpoint import Checkpoint
from growth_ds.engine import universal
from growth_ds.errors import UserError
from tests.checkpoints import TINY, random_states, write_random


class Killed(BaseException):
    pass


@pytest.fixture
def killed(monkeypatch):
    """Ends a call where a kill would leave an older folder under its hidden name."""

    def die(point):
        if point == "checkpoint.aside":
            raise Killed

    def run(call):
        with monkeypatch.context() as patch:
            patch.setattr(faults, "point", die)
            with pytest.raises(Killed):
                call()

    return run


def write(out, force=False):
    states = random_states(TINY)
    offline.write_checkpoint(
        out, TINY, states.__getitem__, {"step": 7, "stage": 0}, moments=True, tokenizer=None, force=force
    )


def to_universal(source, out, force=False):
    convert.convert(source, out, to="universal", model=None, zero=2, force=force, tokenizer=None)


def test_a_checkpoint_that_was_moved_aside_is_put_back(tmp_path, killed):
    out = tmp_path / "o[u]t"
    write(out)
    before = (out / "manifest.json").read_text()
    killed(lambda: write(out, force=True))
    assert not out.exists()
    with pytest.raises(UserError, match="exists; give another --out"):
        offline.check_free(out, force=False)
    assert (out / "manifest.json").read_text() == before
    killed(lambda: write(out, force=True))
    killed(lambda: write(out, force=True))
    write(out, force=True)
    Checkpoint(out).verify()
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_an_attempt_that_fails_leaves_it_put_back(tmp_path, killed):
    out = tmp_path / "out"
    write(out)
    killed(lambda: write(out, force=True))
    with pytest.raises(ValueError, match="stop"):
        offline.write_checkpoint(
            out, TINY, lambda name: int("stop"), {"step": 7}, moments=True, tokenizer=None, force=True
        )  # fmt: skip
    Checkpoint(out).verify()


@pytest.mark.parametrize("name", [".out.old", ".out.tmp-77.old"])
def test_a_universal_folder_that_was_moved_aside_is_put_back(tmp_path, killed, name):
    source, out = write_random(tmp_path / "source").path, tmp_path / "out"
    to_universal(source, out)
    killed(lambda: to_universal(source, out, force=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.old", "source"]
    (tmp_path / ".out.old").rename(tmp_path / name)  # the second is what 0.3 left
    with pytest.raises(UserError, match="exists; give another --out"):
        to_universal(source, out)
    to_universal(source, out, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_half_removed_folder_is_not_put_back(tmp_path, monkeypatch):
    """The kill comes while the older folder is removed; then the user removes the new one."""
    out = tmp_path / "out"
    write(out)

    def rmtree(path, **options):
        if path.exists() and not path.name.endswith(".tmp"):
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", rmtree)
        with pytest.raises(Killed):
            write(out, force=True)
    out.rename(tmp_path / "elsewhere")
    offline.check_free(out, force=False)
    assert not out.exists()
    write(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "out"]


def test_the_entries_of_a_universal_folder_are_durable(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(universal, "sync", synced.append)
    to_universal(write_random(tmp_path / "source").path, tmp_path / "out")
    [top] = [path for path in synced if path.parent == tmp_path]
    assert {path.relative_to(top) for path in synced if path != top} == {
        path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*")
    }
