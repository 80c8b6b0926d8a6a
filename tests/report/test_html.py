from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from growth_ds.errors import UserError
from growth_ds.report.html import write_report
from growth_ds.run_folder import RunFolder
from tests.report.runs import SIZES, write_run

VOID = {"meta", "br"}


class Page(HTMLParser):
    """Rows of the tables, all tags and ids; fails on a tag that is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value for key, value in attrs if key == "id" and value]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value for key, value in attrs if key == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data.replace("\u00a0", " ")


@pytest.fixture(scope="module")
def text(grown: RunFolder, control: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("out") / "deep" / "report.html"
    extra = {"Guesses": [("the [MASK] is <b>", [("cat&dog", 0.5), ("x", 0.25)])]}
    assert write_report(grown.path, out, {"from scratch": control.path}, extra) == out
    assert [entry.name for entry in out.parent.iterdir()] == ["report.html"]
    return out.read_text(encoding="utf-8")


def test_tables_hold_the_numbers(text: str) -> None:
    rows = Page(text).rows
    assert ["grown", "5.768", "", "10.2%", "1.08 M", "60", "81,920", "2.29 \u00d7 10¹¹", "1.7 s"] in rows
    assert ["unigram entropy", "6.500", "+0.732", "", "", "", "", "", ""] in rows
    assert any(row[:3] == ["from scratch", "5.471", "\u22120.297"] for row in rows)
    assert ["from scratch", "2.29 \u00d7 10¹¹", "5.768", "5.842", "+0.074", "not reached"] in rows
    assert [row[:8] for row in rows if len(row) == 14][1:] == [
        ["0", "2", "64", "2", "128", "128", "64", "16"],
        ["1", "4", "64", "2", "256", "128", "64", "16"],
        ["2", "4", "128", "4", "512", "128", "128", "16"],
    ]
    growth = next(row for row in rows if row[-1].startswith("no: layer"))
    assert growth[0] == "20"
    assert growth[1].startswith("layer 2 → 4 (tile)ffn 128 → 256 (tile)moments: carry")
    assert growth[4] == "+0.1250"
    assert growth[-1] == "no: layer"
    assert ["torch", "2.9.0"] in rows
    assert ["ranks", "2"] in rows


def test_one_paragraph_says_it(text: str) -> None:
    assert "A BERT that grew twice while it trained, from 210 k to 1.08 M parameters" in text
    assert "validation loss of 5.768 nats and guesses 10.2% of the masked tokens" in text
    assert "0.732 nats below guessing by token frequency alone" in text
    assert (
        "it is 0.074 nats better than &quot;from scratch&quot;; it has not reached that run&#x27;s final loss" in text
    )


def test_nothing_is_fetched_and_nothing_runs(text: str) -> None:
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(page.tags)
    assert "http" not in text
    assert "@import" not in text
    assert not re.search(r'(?:src|href)="(?!#)', text)
    assert not re.search(r"url\((?!#)", text)
    assert page.tags.count("svg") == 4 + 2  # the curves, and a swatch for each run in the legend


def test_ids_are_unique_over_all_pictures(text: str) -> None:
    ids = Page(text).ids
    assert {"flops-train-1", "tokens-train-1", "seconds-train-1", "optim-lr-1"} <= set(ids)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([\w-]+)', text)) <= set(ids)


def test_fillings_are_escaped(text: str) -> None:
    assert "the [MASK] is &lt;b&gt;" in text
    assert "cat&amp;dog" in text
    assert "width:50.0%" in text


def test_same_input_same_file(text: str, grown: RunFolder, control: RunFolder, tmp_path: Path) -> None:
    again = write_report(grown.path, tmp_path / "r.html", {"from scratch": control.path})
    assert text.startswith(again.read_text(encoding="utf-8").split("<h2>Stages")[0])


HOSTILE = "</title><script>alert('x')</script>&\"<img src=x onerror=y>"


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", HOSTILE, steps=6, sizes=SIZES[:2], validate_every=3)
    ledger = folder / "ledger.jsonl"
    recorded = ledger.read_text(encoding="utf-8").replace('"tile"', '"<script>"').replace("another", "<img src=x>")
    ledger.write_text(recorded.replace('"torch"', '"<svg onload=x>"'), encoding="utf-8")
    text = write_report(folder, tmp_path / "r.html", {HOSTILE: folder}).read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert page.tags.count("svg") == 6
    assert "&lt;/title&gt;&lt;script&gt;" in text
    assert "is as good as" in text


def test_no_growth_and_no_control(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", "plain", steps=8, sizes=SIZES[:1], validate_every=4)
    text = write_report(folder, tmp_path / "r.html").read_text(encoding="utf-8")
    assert "trained from scratch at its full size" in text
    assert "This run trained one model from its start to its end." in text
    assert "at equal compute" not in text
    assert "growth-0-" not in text
    assert "flops-train-0" in text
    assert "flops-train-1" not in text


def test_unfinished_and_not_validated(tmp_path: Path, keep_lines) -> None:
    folder = RunFolder(write_run(tmp_path / "run", steps=8))
    keep_lines(folder.metrics, lambda line: '"stage": 0' in line and "valid_loss" not in line)
    keep_lines(folder.ledger, lambda line: '"stage": 0' in line)
    text = write_report(folder.path, tmp_path / "r.html").read_text(encoding="utf-8")
    assert "It has not finished: 8 of 24 steps are done." in text
    assert "It has not been validated yet." in text


def test_losses_on_different_texts_are_not_compared(grown: RunFolder, tmp_path: Path) -> None:
    other = RunFolder(write_run(tmp_path / "other", steps=8))
    other.ledger.write_text(other.ledger.read_text(encoding="utf-8").replace("5f1c", "0000"), encoding="utf-8")
    text = write_report(grown.path, tmp_path / "r.html", {"other": other.path}).read_text(encoding="utf-8")
    assert "their losses are on different texts" in text
    assert "At equal compute (" not in text


def test_user_errors(tmp_path: Path, grown: RunFolder) -> None:
    empty = write_run(tmp_path / "run")
    (empty / "metrics.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="no training steps"):
        write_report(empty, tmp_path / "r.html")
    with pytest.raises(UserError, match="no training steps"):
        write_report(grown.path, tmp_path / "r.html", {"empty": empty})
    with pytest.raises(UserError, match="not a run folder"):
        write_report(tmp_path / "nowhere", tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="report not written"):
        write_report(grown.path, tmp_path / "folder")
    assert not list(tmp_path.glob(".*.tmp"))
