"""convert: DeepSpeed's folders that somebody made up. One line, whatever stands in them."""

from __future__ import annotations

import pytest
import torch

from growth_ds.engine.state import TensorState
from tests.checkpoints import TINY, random_states
from tests.deepspeed_folders import write_plain, write_zero3
from tests.test_convert import MODEL0, RANK1, refused, run

POINTERS = [b"x" * 300, b"x" * 100_000, b"a\nb", b"\0", b"\xff\xfe", b"", b".", b"..", b"/"]


@pytest.mark.parametrize("content", POINTERS, ids=lambda content: repr(content)[:20])
def test_a_tag_that_is_no_folder(tmp_path, content):
    tag = write_zero3(tmp_path / "run", random_states(TINY))
    (tag.parent / "latest").write_bytes(content)
    line = refused("latest: names .*give the tag folder itself", tag.parent, tmp_path / "out", model=TINY)
    assert len(line) < 400
    out = tmp_path / "universal"
    run(tag, out, "universal")
    (out / "latest_universal").write_bytes(content)
    refused("latest_universal: names ", out, tmp_path / "out", model=TINY)
    with pytest.raises(Exception, match="is not just a universal folder"):
        run(tag, out, "universal", force=True)


NO_COUNTS = [float("inf"), float("nan"), -1, (1 << 2000), 1 << 63, "many", None, torch.ones(3)]


@pytest.mark.parametrize("value", NO_COUNTS, ids=lambda value: str(type(value).__name__))
def test_counts_that_are_none(tmp_path, value):
    def change(file, key, *path):
        held = inner = torch.load(file)
        for step in path:
            inner = inner[step]
        inner[key] = value
        torch.save(held, file)

    tag = write_zero3(tmp_path / "a", random_states(TINY))
    run(tag, tmp_path / "universal", "universal")
    change(tag / MODEL0, "global_steps")
    refused(f"{MODEL0}: not laid out", tag, tmp_path / "out", model=TINY)
    common = tmp_path / "universal/global_step7/zero/head.bias/step.pt"
    torch.save(value, common)
    refused("head.bias: not laid out", tmp_path / "universal", tmp_path / "out", model=TINY)
    model = tmp_path / "universal/global_step7/mp_rank_00_model_states.pt"
    change(model, "global_steps")
    refused(f"{model.name}: not laid out", tmp_path / "universal", tmp_path / "out", model=TINY)
    tag = write_zero3(tmp_path / "b", random_states(TINY))
    change(tag / RANK1, "step", "optimizer_state_dict", "optimizer_state_dict", "state", 0)
    refused("not laid out", tag, tmp_path / "out", model=TINY)


@pytest.mark.parametrize("ranks", [0, -1, -(1 << 2000), (1 << 2000), 1 << 40, float("inf")], ids=lambda value: "")
@pytest.mark.parametrize("zero", [0, 3])
def test_numbers_of_ranks_that_are_none(tmp_path, ranks, zero):
    states = random_states(TINY)
    write = write_zero3 if zero else lambda root, states: write_plain(root, states, [list(states)])
    tag = write(tmp_path / "run", states)
    file = tag / (MODEL0 if zero else "mp_rank_00_model_states.pt")
    held = torch.load(file) | {"dp_world_size": ranks}
    torch.save(held, file)
    refused(f"{file.name}: not laid out", tag, tmp_path / "out", model=TINY)


def _nested(depth=60):
    """A tuple that is small in memory and has no end when it is written out."""
    found = ()
    for _ in range(depth):
        found = (found, found)
    return found


SHAPES = [
    ("\ud800", (3,)),
    ("a\nb", (3,)),
    (7, (3,)),
    ("a", _nested()),
    ("a", ((1 << 2000),)),
    ("a", (-1,)),
    ("a", 3),
]


@pytest.mark.parametrize(("name", "shape"), SHAPES, ids=range(len(SHAPES)))
def test_shapes_and_names_that_are_none(tmp_path, name, shape):
    tag = write_zero3(tmp_path / "run", random_states(TINY))
    run(tag, tmp_path / "universal", "universal")
    for file in (tag / MODEL0, tmp_path / "universal/global_step7/mp_rank_00_model_states.pt"):
        held = torch.load(file)
        held["param_shapes"][0] = {name: shape}
        torch.save(held, file)
        refused("not laid out", file.parent, tmp_path / "out", model=TINY)
        refused("not laid out", file.parent, tmp_path / "out", to="universal")
    if not isinstance(shape, tuple) or shape != (3,):
        return
    plain = write_plain(
        tmp_path / "plain", random_states(TINY), [list(random_states(TINY))], **{str(name): torch.ones(3)}
    )
    held = torch.load(plain / "mp_rank_00_model_states.pt")
    held["module"][name] = held["module"].pop(str(name))
    torch.save(held, plain / "mp_rank_00_model_states.pt")
    refused("not laid out", plain, tmp_path / "out", model=TINY)


def test_a_vocabulary_without_rows(tmp_path):
    states = random_states(TINY)
    one = torch.ones(())
    states["embeddings.word.weight"] = TensorState(one, one, one, 7)
    write_zero3(tmp_path / "run", states)
    open_vocabulary = TINY.model_copy(update={"vocab_size": None})
    refused("'embeddings.word.weight' has shape", tmp_path / "run", tmp_path / "out", model=open_vocabulary)
