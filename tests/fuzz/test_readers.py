"""Damaged and changed files and arguments: no reader raises anything but UserError, hangs, or writes.

`make test-fuzz` tries new examples for 20 minutes (GROWTH_DS_FUZZ_S: seconds of each reader; 0: a few dozen, always the
same). What it once found stands in tests/test_refusals.py.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st

from growth_ds.checkpoint import MANIFEST, open_verified
from growth_ds.checkpoint.manifest import text_of
from growth_ds.config_file import dump_run, load_grow, load_model, load_run, shipped
from growth_ds.data import store as stores
from growth_ds.data.corpus import read_documents
from growth_ds.data.tokenizer import from_folder, from_vocab
from growth_ds.engine.hosts import expand_hosts, read_hostfile
from growth_ds.errors import UserError
from growth_ds.inspection import inspect
from growth_ds.interop.huggingface import read_huggingface
from growth_ds.offline import find_checkpoint
from growth_ds.suite.runs import load_suite
from tests.checkpoints import small_tokenizer, write_by_two
from tests.fuzz.harness import fuzz, reads_or_refuses
from tests.fuzz.mutations import ODD, changed, damaged

pytestmark = pytest.mark.fuzz

CONFIGS = {kind: sorted(shipped(kind).glob("*.yaml")) for kind in ("run", "suite", "grow", "model")}
LOADERS: dict[str, Callable[[Path], Any]] = {
    "run": load_run,
    "suite": load_suite,
    "grow": lambda path: load_grow(str(path)),
    "model": lambda path: load_model(path, load_run(shipped("run/demo.yaml")).stages[0].model),
}


@pytest.fixture
def file_fuzz(tmp_path):
    """fuzz_file(name, contents, path, read): write each content at `path`, let `fit` change others to fit, and read."""

    def fuzz_file(
        name: str,
        contents: st.SearchStrategy[bytes],
        path: Path,
        read: Callable[[Path], Any],
        fit: Callable[[], None] = lambda: None,
    ) -> None:
        def one(content: bytes) -> None:
            path.write_bytes(content)
            fit()
            reads_or_refuses(name, lambda: read(path), tmp_path)

        if path.exists():
            read(path)  # the whole one is read; and what a reader imports is not to count as its time
        fuzz(name, contents, one)

    return fuzz_file


def as_json(trees: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    return trees.map(lambda tree: json.dumps(tree).encode())


@pytest.mark.parametrize("kind", CONFIGS)
def test_yaml_of_damaged_bytes(file_fuzz, tmp_path, kind):
    bases = [path.read_bytes() for path in CONFIGS[kind]]
    file_fuzz(f"{kind} YAML, bytes", damaged(bases), tmp_path / "c.yaml", LOADERS[kind])


@pytest.mark.parametrize("kind", CONFIGS)
def test_yaml_of_changed_keys(file_fuzz, tmp_path, kind):
    bases = [yaml.safe_load(path.read_bytes()) for path in CONFIGS[kind]]
    contents = changed(bases).map(lambda tree: yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "replace"))
    file_fuzz(f"{kind} YAML, keys", contents, tmp_path / "c.yaml", LOADERS[kind])


def test_overrides(tmp_path):
    run = load_run(shipped("run/demo.yaml"))
    keys = [line.split(":")[0].strip(" -") for line in dump_run(run).splitlines()]
    part = st.sampled_from([*keys, "0", "1", "-1", "9", "", "x"])
    path = st.lists(part, min_size=1, max_size=5).map(".".join)
    value = st.sampled_from(ODD).map(str) | st.text(max_size=12) | damaged([b"{a: [1, 2], b: null}"]).map(
        lambda content: content.decode("latin-1")
    )  # fmt: skip
    override = st.tuples(path, value).map("=".join) | st.text(max_size=20)

    def one(overrides: list[str]) -> None:
        reads_or_refuses("--set", lambda: load_run(shipped("run/demo.yaml"), overrides), tmp_path)

    fuzz("--set", st.lists(override, min_size=1, max_size=3), one)


@pytest.mark.parametrize("file", ["manifest.json", "train.idx", "valid.idx", "tokenizer/tokenizer.json"])
def test_a_store(file_fuzz, tmp_path, store, file):
    mine = Path(shutil.copytree(store, tmp_path / "store"))
    whole = (mine / file).read_bytes()
    manifest = json.loads((mine / "manifest.json").read_text())

    def fit() -> None:  # as one does who makes the manifest fit: its sizes and digests are no protection then
        known = {"bytes": (mine / file).stat().st_size, "sha256": stores.sha256(mine / file)}
        (mine / "manifest.json").write_text(json.dumps({**manifest, "files": {**manifest["files"], file: known}}))

    def read(_: Path) -> Any:
        opened = stores.Store.open(mine)
        return [split.read(doc).sum() for split in opened.splits.values() for doc in range(split.documents)]

    contents = damaged([whole])
    if file.endswith(".json"):
        contents |= as_json(changed([json.loads(whole)]))
    if file.endswith(".idx"):  # its head is 34 bytes of a file of many: hit it as often as the rest
        contents |= damaged([whole[:34]]).map(lambda head: head + whole[34:])
    file_fuzz(f"store {file}", contents, mine / file, read, *([fit] if file != "manifest.json" else []))


def test_a_vocabulary(file_fuzz, tmp_path):
    whole = (small_tokenizer(tmp_path / "t") / "vocab.txt").read_bytes()
    file_fuzz("vocab.txt", damaged([whole]), tmp_path / "t" / "vocab.txt", from_vocab)


def test_a_tokenizer_configuration(file_fuzz, tmp_path):
    path = small_tokenizer(tmp_path / "t") / "tokenizer_config.json"
    base = {"do_lower_case": False, "model_max_length": 512}
    contents = damaged([json.dumps(base).encode()]) | as_json(changed([base]))
    file_fuzz("tokenizer_config.json", contents, path, lambda path: from_folder(path.parent))


def test_a_tokenizer_file(file_fuzz, tmp_path, store):
    unigram = (store / "tokenizer" / "tokenizer.json").read_bytes()
    words = from_vocab(small_tokenizer(tmp_path / "t") / "vocab.txt")
    words.save(tmp_path / "w")
    bases = [unigram, (tmp_path / "w" / "tokenizer.json").read_bytes()]
    contents = damaged(bases) | as_json(changed([json.loads(base) for base in bases]))
    file_fuzz(
        "tokenizer.json",
        contents,
        tmp_path / "w" / "tokenizer.json",
        lambda path: from_folder(path.parent).encode("the river"),
    )


@pytest.mark.parametrize("file", [MANIFEST, "rank-00000.safetensors", "rank-00001.safetensors"])
def test_a_checkpoint(file_fuzz, tmp_path, file):
    path = write_by_two(tmp_path / "c", tokenizer=small_tokenizer(tmp_path / "t")).path
    whole = (path / file).read_bytes()
    if file == MANIFEST:
        contents = changed([json.loads(whole)]).map(lambda tree: _sealed(tree, whole)) | damaged([whole])
    else:
        size = 8 + struct.unpack("<Q", whole[:8])[0]
        contents = damaged([whole[:size]]).map(lambda head: head + whole[size:]) | damaged([whole])

    def read(_: Path) -> None:
        for way in (open_verified, find_checkpoint, lambda path: inspect(path, True, True)):
            try:
                way(path)
            except UserError:
                continue

    file_fuzz(f"checkpoint {file}", contents, path / file, read)


def _sealed(tree: Any, whole: bytes) -> bytes:
    """A changed manifest whose own digest fits again."""
    try:
        return text_of(tree).encode("utf-8", "replace")
    except (AttributeError, TypeError, ValueError):  # no mapping any more, or a number that no manifest holds
        return whole


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "pytorch_model.bin"])
def test_a_hugging_face_folder(file_fuzz, tmp_path, file):
    import torch

    from tests.interop.transformers_models import save

    theirs = save(tmp_path / "hf", intermediate_size=8, hidden_size=12)
    if file.endswith(".bin"):
        (tmp_path / "hf" / "model.safetensors").unlink()
        torch.save(theirs.state_dict(), tmp_path / "hf" / file)
    whole = (tmp_path / "hf" / file).read_bytes()
    if file == "config.json":
        contents = damaged([whole]) | as_json(changed([json.loads(whole)]))
    else:
        head = whole[:4000]
        contents = damaged([head]).map(lambda start: start + whole[4000:]) | damaged([whole])

    def read(_: Path) -> None:
        imported = read_huggingface(tmp_path / "hf")
        for name in imported.weights:
            imported.weights[name]

    file_fuzz(f"Hugging Face {file}", contents, tmp_path / "hf" / file, read)


def test_a_hostfile(file_fuzz, tmp_path):
    base = b"# hosts\nn1 slots=2\n\nn2 slots=16 # two\nlogin-3.cluster slots=1\n"
    file_fuzz("hostfile", damaged([base]), tmp_path / "hosts", read_hostfile)


def test_a_slurm_host_list(tmp_path):
    text = damaged([b"a,n[1-2,07],x[1-9]y[001-120]"]).map(lambda content: content.decode("latin-1"))
    fuzz("host list", text, lambda text: reads_or_refuses("host list", lambda: expand_hosts(text), tmp_path))


@pytest.mark.parametrize("name", ["c.txt", "c.jsonl", "c.jsonl.gz", "c.txt.zst"])
def test_a_corpus(file_fuzz, tmp_path, name):
    import gzip

    import zstandard

    plain = (
        b'{"text": "A river.\\nStones."}\n{"text": "Two", "id": 3}\n' if "json" in name else b"A river.\n\nStones.\n"
    )
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    file_fuzz(name, damaged([pack(plain)]), tmp_path / name, lambda path: list(read_documents([path])))
