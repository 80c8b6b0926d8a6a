"""The run's folder: whose it is, what a run resumes from, and what is forgotten then."""

from __future__ import annotations

import errno
import itertools
import os
from contextlib import contextmanager
from pathlib import Path

import pytest

from growth_ds.errors import Unreadable, UserError
from growth_ds.run_folder import RunFolder
from tests.checkpoints import rewrite, write_random
from tests.distributed.corpus import small_run


@pytest.fixture
def folder(tmp_path, store):
    return RunFolder(tmp_path / "run")


def test_claim_twice_is_fine_and_keeps_the_config(folder):
    folder.claim(small_run(), "digest")
    folder.claim(small_run(engine={"precision": "bf16", "zero": 3}, checkpoint={"every": 7}), "digest")
    assert folder.run().engine.stage == 3


def test_another_configuration_is_refused_by_key(folder):
    folder.claim(small_run(), "digest")
    with pytest.raises(UserError, match=r"another configuration \(seed: 42 there, 1 here\)"):
        folder.claim(small_run(seed=1), "digest")
    with pytest.raises(UserError, match=r"stages\.0\.steps: 20 there, 19 here"):
        folder.claim(small_run(steps=(19, 20)), "digest")


def test_other_data_is_refused(folder):
    folder.claim(small_run(), "digest")
    folder.append(folder.ledger, {"event": "start", "step": 0, "stage": 0, "store": "digest"})
    folder.check(small_run(), "digest")
    with pytest.raises(UserError, match="other data"):
        folder.check(small_run(), "another")


def test_resume_never_refuses_a_run(folder):
    folder.check(small_run(), "digest", fresh=True)
    folder.claim(small_run(), "digest", fresh=True)
    with pytest.raises(UserError, match="has a run already"):
        folder.check(small_run(), "digest", fresh=True)


def test_a_folder_of_something_else_is_refused(tmp_path, store):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not a run folder"):
        RunFolder(tmp_path).claim(small_run(), "digest")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def was_at(folder, step, stage, every=5):
    """A folder whose run got so far."""
    folder.claim(small_run(checkpoint={"every": every}), "digest")
    folder.append(folder.ledger, {"event": "start", "step": 0, "stage": 0, "store": "digest"})
    folder.append(folder.metrics, {"step": step, "stage": stage, "loss": 1.0})


def contents(path):
    return {each.relative_to(path): each.read_bytes() if each.is_file() else None for each in path.rglob("*")}


@pytest.mark.parametrize("emptied", ["missing", "empty", "only latest"])
@pytest.mark.parametrize("place", [(6, 0), (3, 1)])
def test_checkpoints_that_are_gone_are_the_users_error(folder, place, emptied):
    """Nothing is forgotten: they may be put back."""
    was_at(folder, *place)
    if emptied == "missing":
        folder.checkpoints.rmdir()
    elif emptied == "only latest":
        folder.latest.write_text("step-00000005-stage-0\n")
    before = contents(folder.path)
    for use in (folder.check, folder.make, folder.claim):
        with pytest.raises(UserError, match="checkpoints: its checkpoints are gone; put them back, or give another"):
            use(small_run(checkpoint={"every": 1000}), "digest")
    assert contents(folder.path) == before


def test_a_run_that_was_killed_before_its_first_checkpoint_may_begin_anew(folder):
    was_at(folder, 5, 0)
    folder.claim(small_run(), "digest")
    folder.append(folder.ledger, {"event": "finish", "step": 5, "stage": 0})  # its line comes before its checkpoint
    folder.claim(small_run(checkpoint={"every": 5}), "digest")


def test_what_a_few_steps_have_left_shows_that_a_folder_or_latest_is_gone(folder):
    was_at(folder, 2, 0)
    folder.latest.write_text("step-00000002-stage-0\n")
    with pytest.raises(UserError, match="are gone"):
        folder.check(small_run(), "digest")
    folder.latest.unlink()
    folder.check(small_run(), "digest")
    folder.checkpoints.rmdir()
    with pytest.raises(UserError, match="are gone"):
        folder.check(small_run(), "digest")


def test_a_checkpoint_that_is_being_replaced_is_there(folder):
    was_at(folder, 6, 0)
    (folder.checkpoints / ".step-00000005-stage-0.old").mkdir()
    folder.check(small_run(), "digest")


def checkpoints(folder, *places):
    for step, stage in places:
        folder.publish(write_random(folder.checkpoint_path(step, stage)).path, keep=10)


def test_newest_is_what_latest_names(folder):
    folder.claim(small_run(), "digest")
    assert folder.newest() is None
    checkpoints(folder, (10, 0), (20, 0), (20, 1))
    assert folder.newest().path.name == "step-00000020-stage-1"
    folder.latest.write_text("step-00000010-stage-0\n")
    assert folder.newest().path.name == "step-00000010-stage-0"


def test_a_damaged_one_is_named_and_the_one_before_it_taken(folder):
    folder.claim(small_run(), "digest")
    checkpoints(folder, (10, 0), (20, 0), (20, 1))
    path = folder.checkpoint_path(20, 1) / "rank-00000.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 4
    path.write_bytes(damaged)
    said: list[str] = []
    assert folder.newest(said.append).path.name == "step-00000020-stage-0"
    assert len(said) == 1
    assert str(path) in said[0]
    assert "falling back" in said[0]


def test_latest_follows_a_fallback(folder):
    """Else a checkpoint of that name, written again, would be the newest before it is published."""
    folder.claim(small_run(), "digest")
    checkpoints(folder, (20, 0), (20, 1))
    newer = folder.checkpoint_path(20, 1)
    (newer / "manifest.json").write_text("{}")
    newest = folder.newest(lambda line: None)
    folder.point_at(newest.path)
    folder.trim(20, 0)
    write_random(newer)
    assert folder.newest().path == newest.path == folder.checkpoint_path(20, 0)
    folder.point_at(None)
    assert not folder.latest.exists()


def test_what_cannot_be_read_now_is_not_damaged(folder):
    """Nothing older is taken for it, and nothing is lost: the disk or the server may come back."""
    folder.claim(small_run(), "digest")
    checkpoints(folder, (10, 0), (20, 0))
    path = folder.checkpoint_path(20, 0)
    places = (path / "manifest.json", path / "rank-00000.safetensors", folder.latest, folder.checkpoints)
    for place, trouble in itertools.product(places, (errno.EIO, errno.ESTALE, errno.EACCES)):
        with unreadable(trouble, place), pytest.raises(Unreadable, match=f"^{place}: cannot be read now \\("):
            folder.newest(lambda line: pytest.fail(line))
    assert folder.newest().path == path


@contextmanager
def unreadable(number, *paths):
    """Opening these paths, or listing them, fails."""

    def failing(right):
        def use(self, *args, **options):
            if self in paths:
                raise OSError(number, os.strerror(number), str(self))
            return right(self, *args, **options)

        return use

    with pytest.MonkeyPatch.context() as patch:
        for name in ("open", "iterdir"):
            patch.setattr(Path, name, failing(getattr(Path, name)))
        yield


def test_another_versions_checkpoint_is_not_damaged(folder):
    folder.claim(small_run(), "digest")
    checkpoints(folder, (10, 0), (20, 0))
    rewrite(folder.checkpoint_path(20, 0), lambda content: content.update(format=3))
    with pytest.raises(Unreadable, match="is of format 3, this version reads 2; read it with the version that wrote"):
        folder.newest(lambda line: pytest.fail(line))


def test_a_file_that_is_not_there_is_damage(folder):
    folder.claim(small_run(), "digest")
    checkpoints(folder, (10, 0), (20, 0), (30, 0))
    (folder.checkpoint_path(30, 0) / "manifest.json").unlink()
    (folder.checkpoint_path(20, 0) / "rank-00000.safetensors").unlink()
    said: list[str] = []
    assert folder.newest(said.append).path.name == "step-00000010-stage-0"
    assert len(said) == 2


def test_all_damaged_is_the_users_error(folder):
    folder.claim(small_run(), "digest")
    checkpoints(folder, (10, 0))
    (folder.checkpoint_path(10, 0) / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        folder.newest(lambda line: None)


def test_retention_keeps_the_newest(folder):
    folder.claim(small_run(), "digest")
    for step in (10, 20, 30):
        folder.publish(write_random(folder.checkpoint_path(step, 0)).path, keep=2)
    assert [path.name for path in folder.newest_first()] == ["step-00000030-stage-0", "step-00000020-stage-0"]


def test_trim_forgets_what_came_after(folder):
    folder.claim(small_run(), "digest")
    for step in range(1, 6):
        folder.append(folder.metrics, {"step": step, "stage": 0, "loss": 1.0})
    folder.append(folder.ledger, {"event": "growth", "step": 3, "stage": 1})
    with folder.metrics.open("a") as file:
        file.write('{"step": 6, "sta')
    checkpoints(folder, (3, 0), (3, 1), (5, 0))
    folder.trim(3, 0)
    assert [record["step"] for record in folder.records(folder.metrics)] == [1, 2, 3]
    assert folder.records(folder.ledger) == []
    assert [path.name for path in folder.newest_first()] == ["step-00000003-stage-0"]


def test_measurements_of_an_unended_stage_are_forgotten(folder):
    folder.claim(small_run(), "digest")
    folder.append(folder.metrics, {"step": 3, "stage": 0, "loss": 1.0})
    folder.append(folder.metrics, {"step": 3, "stage": 0, "valid_loss": 1.0})
    folder.append(folder.ledger, {"event": "finish", "step": 3, "stage": 0})
    folder.trim(3, 0)
    assert len(folder.records(folder.metrics)) == 2
    folder.trim(3, 0, unended=True)
    assert folder.records(folder.metrics) == [{"step": 3, "stage": 0, "loss": 1.0}]
    assert folder.records(folder.ledger) == []


def test_recover_puts_back_and_cleans_up(folder):
    folder.claim(small_run(), "digest")
    checkpoints(folder, (3, 0), (4, 0))
    folder.checkpoint_path(3, 0).rename(folder.checkpoints / ".step-00000003-stage-0.old")
    for name in (".step-00000009-stage-0.1234abcd.tmp", ".step-00000001-stage-0.gone", ".step-00000004-stage-0.old"):
        (folder.checkpoints / name).mkdir()
    (folder.checkpoints / ".latest.77.tmp").write_text("half")
    folder.recover()
    names = {"latest", "step-00000003-stage-0", "step-00000004-stage-0"}
    assert {path.name for path in folder.checkpoints.iterdir()} == names
    assert folder.newest().path.name == "step-00000004-stage-0"


def test_recover_removes_drafts_of_its_own_files(folder):
    folder.claim(small_run(), "digest")
    for name in (".config.yaml.77.tmp", ".ledger.jsonl.77.tmp", ".metrics.jsonl.78.tmp", ".lock"):
        (folder.path / name).write_text("half")
    (folder.path / ".export.1234abcd.tmp").mkdir()
    folder.recover()
    names = {path.name for path in folder.path.iterdir()}
    assert names == {"config.yaml", "checkpoints", ".lock", ".export.1234abcd.tmp"}


def test_order_is_that_of_the_numbers(folder):
    folder.claim(small_run(), "digest")
    checkpoints(folder, (99999999, 9), (99999999, 10), (100000000, 2))
    names = [path.name for path in folder.newest_first()]
    assert names == ["step-100000000-stage-2", "step-99999999-stage-10", "step-99999999-stage-9"]


def test_what_is_to_be_kept_stays(folder):
    folder.claim(small_run(), "digest")
    for step in (10, 20, 30, 40):
        path = folder.checkpoint_path(step, 0)
        write_random(path, facts={"keep": ["before growth"]} if step == 10 else {})
        folder.publish(path, keep=2)
    assert [path.name[5:13] for path in folder.newest_first()] == ["00000040", "00000030", "00000010"]


def test_what_cannot_be_asked_whether_it_is_to_be_kept_stays(folder):
    folder.claim(small_run(), "digest")
    manifests = [folder.checkpoint_path(step, 0) / "manifest.json" for step in (10, 20)]
    for step in (10, 20, 30, 40):
        path = folder.checkpoint_path(step, 0)
        write_random(path, facts={"keep": ["before growth"]} if step == 10 else {})
        with unreadable(errno.EMFILE, *(manifests if step == 30 else ())):
            folder.publish(path, keep=2)
        if step == 30:
            assert len(folder.newest_first()) == 3
    assert [path.name[5:13] for path in folder.newest_first()] == ["00000040", "00000030", "00000010"]
