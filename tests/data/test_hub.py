"""`prepare hf:NAME`: what a dataset becomes, and what is refused; with the real package where it is installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from growth_ds.data import hub
from growth_ds.errors import UserError

ROWS = [{"text": "Rivers carry stones.", "title": "a"}, {"text": "Gärten im Winter.", "title": "b"}]


@pytest.fixture
def package(monkeypatch):
    """A stand-in for `datasets` that remembers what it was asked for."""
    asked: list[tuple[object, ...]] = []

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        if name == "absent":
            raise ConnectionError("no route to the hub\nand much more")
        return [{"body": "x"}] if name == "other" else ROWS

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


def refusal(given: str, out: Path) -> str:
    with pytest.raises(UserError) as caught, hub.local([given], out):
        pass
    assert not list(out.parent.iterdir()), "nothing is left behind"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_rows_become_json_lines_while_they_are_needed(tmp_path, package):
    with hub.local(["mine.txt", "hf:some/wiki:en:validation"], tmp_path / "store") as files:
        assert files[0] == "mine.txt"
        lines = [json.loads(line) for line in Path(files[1]).read_text(encoding="utf-8").splitlines()]
    assert lines == [{"id": f"some/wiki:{at}", "text": row["text"]} for at, row in enumerate(ROWS)]
    assert package == [("some/wiki", "en", "validation", True)]
    assert not list(tmp_path.iterdir())


def test_the_training_split_is_taken_where_none_is_named(tmp_path, package):
    with hub.local(["hf:wiki"], tmp_path / "store"):
        assert package == [("wiki", None, "train", True)]


def test_files_alone_need_no_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with hub.local(["a.txt"], tmp_path / "store") as files:
        assert files == ["a.txt"]
    assert "pip install 'growth_ds[datasets]'" in refusal("hf:wiki", tmp_path / "store")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("hf:", "hf:: not of the form hf:NAME[:CONFIG[:SPLIT]]"),
        ("hf:a:b:c:d", "not of the form"),
        ("hf:other", "hf:other: row 0 has no text in a column `text` (there are body)"),
        ("hf:absent", "hf:absent: cannot be loaded (ConnectionError: no route to the hub); check name"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, package, given, words):
    assert words in refusal(given, tmp_path / "store")


def test_folders_of_the_real_package(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "in/saved"))
    (tmp_path / "in/lines").mkdir()
    (tmp_path / "in/lines/train.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    for name in ("saved", "lines"):
        with hub.local([f"hf:{tmp_path}/in/{name}"], tmp_path / "out/store") as files:
            texts = [json.loads(line)["text"] for line in Path(files[0]).read_text(encoding="utf-8").splitlines()]
        assert texts == [row["text"] for row in ROWS]
