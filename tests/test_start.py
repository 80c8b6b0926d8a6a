"""`start:` before anything is trained: the plan out of the checkpoint, and what cannot be."""

from __future__ import annotations

import pytest

from growth_ds.config import Run
from growth_ds.data.store import Store
from growth_ds.errors import UserError
from growth_ds.planning import growths, plan_run, scratch_of
from growth_ds.start import check_start, start_digest
from tests.checkpoints import TINY, write_random

STAGE = {"length": 8, "batch": {"global": 4, "micro": 2}, "steps": 3}


def run_from(start, **model):
    shape = {**TINY.model_dump(exclude={"vocab_size", "stored_layers"}), **model}
    return Run.model_validate({"name": "r", "start": str(start), "stages": [{**STAGE, "model": shape}]})


def test_the_plan_leads_from_the_checkpoint_into_the_first_stage(tmp_path):
    write_random(tmp_path / "small")
    record = plan_run(run_from(tmp_path / "small", layers=4), ranks=1)
    (axis,) = record["stages"][0]["growth"]["axes"]
    assert (axis["axis"], axis["old"], axis["new"]) == ("layer", 2, 4)
    assert record["stages"][0]["growth_peak"]["rank0"] > 0


def test_it_is_not_asked_for_when_the_run_has_begun(tmp_path):
    run = run_from(tmp_path / "gone")
    assert growths(run, begun=True) == [None]
    assert start_digest(run) is None


def test_the_control_begins_with_nothing(tmp_path):
    write_random(tmp_path / "small")
    assert scratch_of(run_from(tmp_path / "small")).start is None


def test_another_checkpoint_has_another_digest_and_the_run_the_same(tmp_path):
    runs = []
    for seed in (0, 1):
        write_random(tmp_path / str(seed), seed=seed)
        runs.append(run_from(tmp_path / str(seed)))
    assert start_digest(runs[0]) != start_digest(runs[1])
    assert runs[0].digest() == runs[1].digest()


def test_what_cannot_be_a_start(tmp_path):
    write_random(tmp_path / "small")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"start: .*: not a checkpoint .*growth-ds import"):
            growths(run_from(path))
    with pytest.raises(UserError, match=r"start: .*small: stages\.0\.model\.layers"):
        growths(run_from(tmp_path / "small", layers=1))


def test_its_tokenizer_has_to_be_the_store_s(store, tmp_path, tmp_path_factory):
    opened = Store.open(store)
    same = run_from(write_random(tmp_path / "same", tokenizer=opened.tokenizer_folder).path)
    check_start(same, opened.tokenizer)
    from tests.distributed.corpus import make_store

    other = Store.open(make_store(tmp_path_factory.mktemp("other") / "store", vocab_size=100))
    with pytest.raises(UserError, match=r"has another tokenizer than data\.store"):
        check_start(same, other.tokenizer)


def test_every_byte_of_it_is_compared(store, tmp_path):
    path = write_random(tmp_path / "small").path
    (file,) = path.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=file.name):
        check_start(run_from(path), Store.open(store).tokenizer)
