"""More of what every verb refuses, and the damaged files that fuzzing (tests/fuzz) once got a traceback from.

With test_bad_input.py, whose rows are of growing and training, more than a hundred inputs, each through the command
line: exit code 2, one line that names the file, key or option, nothing on stdout, nothing written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from growth_ds.data.store import sha256
from growth_ds.data.tokenizer import from_vocab
from tests.checkpoints import small_tokenizer
from tests.test_bad_input import home, refused  # noqa: F401

ROWS: list[tuple[str, str, str]] = [
    # command line after `growth-ds`; the words of its line; a file that is made before, as `name=content`
    ("prepare good.txt --out out --vocab-size 3", "--vocab-size", "good.txt=A river."),
    ("prepare good.txt --out out --workers 0", "--workers", "good.txt=A river."),
    ("prepare good.txt --out out --valid 2", "valid", "good.txt=A river."),
    ("prepare good.txt --out out --errors ignore", "--errors: 'ignore' is neither strict nor replace", "good.txt=A"),
    ("prepare good.txt --out out --tokenizer nowhere", "nowhere", "good.txt=A river."),
    ("prepare good.txt --out out --tokenizer v.txt", "v.txt: lacks the special tokens [PAD]", "v.txt=a\nb"),
    ("prepare good.txt --out out --tokenizer v.txt", "v.txt: the piece 'a' occurs twice", "v.txt=a\na"),
    ("prepare bad.jsonl --out out", "bad.jsonl", 'bad.jsonl={"text": 3}'),
    ("prepare bad.jsonl --out out", "bad.jsonl", "bad.jsonl={"),
    ("prepare bad.jsonl.gz --out out", "bad.jsonl.gz", "bad.jsonl.gz=no gzip"),
    ("prepare bad.txt.zst --out out", "bad.txt.zst", "bad.txt.zst=no zstandard"),
    ("prepare good.txt", "--out", "good.txt=A river."),
    ("prepare --out out", "argument 'inputs'", ""),
    ("plan", "argument 'config'", ""),
    ("plan b.yaml", "b.yaml: holds list, not a mapping of keys", "b.yaml=[1]"),
    ("plan b.yaml", "b.yaml: holds NoneType", "b.yaml="),
    ("plan b.yaml", "b.yaml:2: not valid YAML: key 'a' is given twice", "b.yaml=a: 1\na: 2"),
    ("plan b.yaml", "b.yaml:1: not valid YAML: a key must be a plain word", "b.yaml=? [1]\n: 2"),
    ("plan b.yaml", "b.yaml:1: not valid YAML", "b.yaml=" + "[" * 400),
    ("plan b.yaml", "b.yaml: stages: this key is required; add it", "b.yaml=data: {store: store}"),
    ("plan good.yaml --ranks x", "--ranks", ""),
    ("plan good.yaml --set stages.7.steps=1", "--set stages.7.steps=1: '7' is not an index below 2", ""),
    ("plan good.yaml --set seed.x=1", "good.yaml: seed", ""),
    ("plan good.yaml --set stages.0.steps=[", "--set stages.0.steps=[: the value is not valid YAML", ""),
    ("plan good.yaml --fitt", "--fitt", ""),
    ("plan store", "store: cannot be read", ""),
    ("train good.yaml --until soon", "--until: 'soon' is neither STAGE:end nor STAGE:start", ""),
    ("train good.yaml --until 5:end", "--until: 5:end: the run has stages 0 to 1", ""),
    ("train good.yaml --ranks 2 --set engine.zero=z.json", "z.json: not valid JSON", "z.json={"),
    ("train good.yaml --ranks 2 --set engine.zero=z.json", "z.json: holds list", "z.json=[]"),
    ("grow ckpt --recipe tile --out out", "grow: give either --to MODEL.yaml or --times N", ""),
    ("grow ckpt --recipe tile --times 1 --out out", "--times", ""),
    ("grow ckpt --recipe tile --to absent.yaml --out out", "absent.yaml: no such file", ""),
    ("grow ckpt --recipe tile --to m.yaml --out out", "m.yaml: hiden: unknown key", "m.yaml=hiden: 24"),
    ("grow ckpt --recipe tile --to m.yaml --out out", "hidden", "m.yaml=hidden: 6"),
    ("grow ckpt --recipe tile --times 2 --out out --set ramp", "--set ramp: not of the form key=value", ""),
    ("inspect absent", "absent", ""),
    ("inspect store", "store", ""),
    ("inspect good.yaml", "good.yaml", ""),
    ("export absent --out out", "absent: no such folder", ""),
    ("export ckpt", "--out", ""),
    ("import absent --out out", "absent: not a Hugging Face folder (no config.json)", ""),
    ("import hf --out out", "hf/config.json: not valid JSON", "hf/config.json={"),
    (
        "import hf --out out",
        'hf/config.json: model_type: "gpt2" is not supported',
        'hf/config.json={"model_type":"gpt2"}',
    ),
    ("import hf --out out", "hf: has no weights", 'hf/config.json={"model_type":"bert"}'),
    ("import hf --out ckpt", "ckpt: exists; give another --out, or --force", 'hf/config.json={"model_type":"bert"}'),
    ("convert absent --out out", "absent", ""),
    ("convert store --out out", "store", ""),
    ("convert ckpt --out out --to onnx", "--to", ""),
    ("convert ckpt --out out --model absent.yaml", "absent.yaml", ""),
    ("convert ckpt --out store --to universal", "store", ""),
    ("compare absent.yaml", "absent.yaml: no such file", ""),
    ("compare good.yaml", "good.yaml", ""),
    ("compare s.yaml", "s.yaml: budgett: unknown key; did you mean 'budget'?", "s.yaml=budgett: 1"),
    ("compare configs/suite/s.yaml --seeds 99 --out out", "--seeds 99", ""),
    ("compare s.yaml", "s.yaml: holds list, not a mapping of keys", "s.yaml=[1]"),
    ("evaluate ckpt --store store --ramp 2", "--ramp", ""),
    ("evaluate ckpt --store store --tokens 0", "--tokens", ""),
    ("launch -- train good.yaml", "launch: say where: --ranks N", ""),
    ("launch --slurm --mpi -- train good.yaml", "launch: give --slurm without --mpi", ""),
    ("launch --hostfile absent -- train good.yaml", "absent: the hostfile cannot be read", ""),
    ("launch --hostfile h -- train good.yaml", "h:1: 'n1' is not a line such as 'n1 slots=2'", "h=n1"),
    ("launch --hostfile h -- train good.yaml", "h:2: host n1 is named twice", "h=n1 slots=1\nn1 slots=2"),
    ("launch --hostfile h -- train good.yaml", "h: the hostfile names no host", "h=# none"),
    ("launch --ranks 2 --master-port 99999 -- train good.yaml", "--master-port: 99999 is not between", ""),
    ("launch --ranks 2 --env =x -- train good.yaml", "--env: '=x' is neither NAME=VALUE nor", ""),
    ("launch --ranks 0 -- train good.yaml", "--ranks", ""),
    ("doctor --verbose", "--verbose", ""),
    ("recipes stack", "stack", ""),
    ("demo --ranks 0", "--ranks", ""),
]


@pytest.mark.parametrize(("line", "words", "file"), ROWS, ids=[f"{i}-{row[0][:40]}" for i, row in enumerate(ROWS)])
def test_a_command_line(refused, line, words, file):  # noqa: F811
    name, _, content = file.partition("=")
    if name:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(content)
    if not Path("good.txt").exists():
        Path("good.txt").write_text("A river.\n\nStones.\n")
    assert words in refused(*line.split())


def change_files(manifest: dict[str, Any]) -> None:
    manifest["files"] = None


def change_entry(manifest: dict[str, Any]) -> None:
    manifest["files"]["train.bin"] = 7


def change_outside(manifest: dict[str, Any]) -> None:
    manifest["files"]["../secret"] = manifest["files"]["train.bin"]


def change_name(manifest: dict[str, Any]) -> None:
    manifest["files"]["n" * 300] = manifest["files"]["train.bin"]


def change_tokenizer(manifest: dict[str, Any]) -> None:
    manifest["tokenizer"] = []


def change_splits(manifest: dict[str, Any]) -> None:
    manifest["splits"] = "train"


CHANGES = [
    (change_files, "mine/manifest.json: files: not what"),
    (change_entry, "mine/manifest.json: files: not what"),
    (change_outside, "mine/manifest.json: files: not what"),
    (change_name, "missing; prepare it again"),
    (change_tokenizer, "mine/manifest.json: tokenizer: not what"),
    (change_splits, "mine/manifest.json: splits: not what"),
]


@pytest.mark.parametrize(("change", "words"), CHANGES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_changed_manifest_of_a_store(refused, change: Callable[[Any], None], words):  # noqa: F811
    shutil.copytree("store", "mine")
    manifest = json.loads(Path("mine/manifest.json").read_text())
    change(manifest)
    Path("mine/manifest.json").write_text(json.dumps(manifest))
    assert words in refused("train", "good.yaml", "--set", "data.store=mine")


INDEXES = [
    (slice(0, 1), b"X", "no megatron-core index"),
    (slice(17, 18), b"\x04", "not of uint16 ids"),
    (slice(18, 19), b"\xff", "its size is not that of its documents"),
    (slice(34, 35), b"\xff", "its documents do not fill train.bin"),
    (slice(-1, None), b"\xff", "its documents are not one sequence each"),
    (slice(20, None), b"", "its head is cut off"),
]


@pytest.mark.parametrize(("where", "piece", "words"), INDEXES)
def test_an_index_that_leads_outside_of_its_tokens(refused, where, piece, words):  # noqa: F811
    """Though the manifest fits it, as the manifest of a stranger's store may."""
    shutil.copytree("store", "mine")
    index, manifest = Path("mine/train.idx"), json.loads(Path("mine/manifest.json").read_text())
    content = bytearray(index.read_bytes())
    content[where] = piece
    index.write_bytes(content)
    manifest["files"]["train.idx"] = {"bytes": len(content), "sha256": sha256(index)}
    Path("mine/manifest.json").write_text(json.dumps(manifest))
    line = refused("train", "good.yaml", "--set", "data.store=mine")
    assert f"mine/train.idx: {words}" in line


def test_a_tokenizer_that_cannot_say_unknown(refused):  # noqa: F811
    Path("t.txt").write_text("A river.\n")
    from_vocab(small_tokenizer(Path("words")) / "vocab.txt").save("words")
    tree = json.loads(Path("words/tokenizer.json").read_text())
    tree["model"]["unk_token"] = "[NO]"
    Path("words/tokenizer.json").write_text(json.dumps(tree))
    line = refused("prepare", "t.txt", "--out", "out", "--tokenizer", "words")
    assert "words/tokenizer.json: the model has no piece for unknown words; set its unk_token" in line


@pytest.mark.parametrize("content", ["{", "[]", '{"do_lower_case": "yes"}', '{"do_lower_case": null}'])
def test_a_configuration_of_a_tokenizer(refused, content):  # noqa: F811
    Path("t.txt").write_text("A river.\n")
    (small_tokenizer(Path("words")) / "tokenizer_config.json").write_text(content)
    assert "words/tokenizer_config.json: " in refused("prepare", "t.txt", "--out", "out", "--tokenizer", "words")
