"""Reading corpora: every format, every fault with its place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from growth_ds.data.corpus import Document, _raw_lines, read_documents, read_pieces, source_files
from growth_ds.errors import UserError

TEXT = "First line\nsecond line\n\n  \nÄ second document\r\n\r\n\nThird"
RECORDS = [{"text": "one\ntwo", "id": "x1"}, {"text": "   "}, {"text": "three", "extra": 1}]
JSONL = "\n".join(json.dumps(r) for r in RECORDS) + "\n\n"
WRAP = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


def texts(*inputs: str | Path, errors: str = "strict") -> list[str]:
    return [d.text for d in read_documents(inputs, errors)]


def fails(*inputs: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        list(read_documents(inputs))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", WRAP)
def test_every_format_gives_the_same_documents(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.txt{suffix}").write_bytes(WRAP[suffix](TEXT.encode()))
    (tmp_path / f"b.jsonl{suffix}").write_bytes(WRAP[suffix](JSONL.encode()))
    assert texts(tmp_path / f"a.txt{suffix}") == ["First line\nsecond line", "Ä second document", "Third"]
    assert list(read_documents([tmp_path / f"b.jsonl{suffix}"])) == [
        Document("x1", "one\ntwo"),
        Document(f"b.jsonl{suffix}:3", "three"),
    ]


def test_folders_are_recursive_and_sorted_and_globs_expand_and_nothing_is_read_twice(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("z.txt", "a.txt", "sub/m.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "notes.pdf").write_text("left alone")
    assert texts(tmp_path) == ["a.txt", "sub/m.txt", "z.txt"]
    assert texts(f"{tmp_path}/*.txt", tmp_path / "a.txt") == ["a.txt", "z.txt"]
    assert texts(f"{tmp_path}/**/*.txt") == ["a.txt", "sub/m.txt", "z.txt"]
    assert [f.name for f in source_files([tmp_path])] == ["a.txt", "sub/m.txt", "z.txt"]


def test_several_zst_frames_and_gzip_members_are_one_stream(tmp_path: Path) -> None:
    for suffix in (".gz", ".zst"):
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(WRAP[suffix](b"one st") + WRAP[suffix](b"ream\n\nand two"))
        assert texts(path) == ["one stream", "and two"]


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert texts(tmp_path / "a.txt") == ["hello"]


def test_inputs_that_match_nothing_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    assert "no input given" in fails()
    assert "nothing.txt: no input matched" in fails(tmp_path / "nothing.txt")
    assert "no input matched" in fails(f"{tmp_path}/*.txt")
    assert "a.csv: unsupported suffix" in fails(tmp_path / "a.csv")
    assert "unsupported suffix" in fails(f"{tmp_path}/*.csv")
    assert "no file with one of the suffixes" in fails(tmp_path)
    (tmp_path / "blank.txt").write_text("\n \n")
    assert "the corpus holds no text" in fails(tmp_path / "blank.txt")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{bad", "not valid json"),
        ('{"body": "x"}', "no `text` field"),
        ('{"text": 3}', "no `text` field"),
        ('["text"]', "no `text` field"),
        ('{"text": "half \\ud83d pair"}', "lone surrogate at character 5"),
    ],
)
def test_bad_records_are_named_with_file_and_line(tmp_path: Path, line: str, expected: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    message = fails(path)
    assert message.startswith(f"{path}:3: ")
    assert expected in message


@pytest.mark.parametrize("suffix", WRAP)
def test_not_utf8_names_the_byte_offset_and_can_be_replaced(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(WRAP[suffix]("ä\nfine\nab".encode() + b"\xffcd\n"))
    assert f"{path}: not UTF-8 at byte 10 " in fails(path)
    assert texts(path, errors="replace") == ["ä\nfine\nab\ufffdcd"]
    path.write_bytes(WRAP[suffix](b"\xef\xbb\xbfab\xff"))
    assert "not UTF-8 at byte 5 " in fails(path)


def test_an_offset_beyond_the_first_block_is_right(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 3_000_000 + b"\n" + b"y" * 10 + b"\xe9")
    assert "not UTF-8 at byte 3000011 " in fails(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_damaged_compression_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.txt{suffix}"
    whole = WRAP[suffix](" ".join(map(str, range(5000))).encode())
    path.write_bytes(whole[:-20])
    assert f"{path}: the compressed file is truncated" in fails(path)
    path.write_bytes(whole[:2])
    assert f"{path}: the compressed file is" in fails(path)
    path.write_bytes(b"no compressed data at all")
    assert f"{path}: the compressed file is corrupt" in fails(path)


def test_an_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(UserError, match="cannot be read"):
        list(read_documents([path]))


@given(st.lists(st.binary(max_size=20)))
def test_lines_put_together_are_the_stream_and_end_at_line_feeds(blocks: list[bytes]) -> None:
    lines = list(_raw_lines(iter(blocks)))
    assert b"".join(lines) == b"".join(blocks)
    assert all(line.count(b"\n") == line.endswith(b"\n") for line in lines)
    assert all(line.endswith(b"\n") for line in lines[:-1])


@pytest.mark.parametrize("block", [1, 7, 40, 1 << 20])
def test_pieces_know_their_place_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    lines = [json.dumps({"text": f"line {i} of ünicode"}, ensure_ascii=False).encode() for i in range(12)]
    whole, bad, cut = tmp_path / "whole.jsonl", tmp_path / "bad.jsonl", tmp_path / "cut.jsonl"
    whole.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    bad.write_bytes(b"\n".join([*lines, b"{", *lines]))
    cut.write_bytes(b"\n".join([*lines, b'{"text": "\xff"}']))
    expected = list(read_documents([whole]))
    assert [document.id for document in expected] == [f"whole.jsonl:{i}" for i in range(1, 13)]
    monkeypatch.setattr("growth_ds.data.corpus._BLOCK_BYTES", block)
    assert list(read_documents([whole])) == expected
    assert len(list(read_pieces([whole]))) == {1: 12, 7: 12, 40: 10, 1 << 20: 2}[block]
    assert f"{bad}:13: not valid json" in fails(bad)
    assert f"not UTF-8 at byte {cut.read_bytes().index(0xFF)} of the decompressed text" in fails(cut)
