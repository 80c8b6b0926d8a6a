"""Reading plain text corpora: files, folders and globs of `.txt` and `.jsonl`, plain or compressed.

Files are streamed; one document is held at a time.
"""

from __future__ import annotations

import glob
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from growth_ds.errors import UserError

_BLOCK_BYTES = 1 << 20
_FORMATS = (".txt", ".jsonl")
_COMPRESSIONS = (".gz", ".zst")
_BOM = b"\xef\xbb\xbf"
SUPPORTED = tuple(form + comp for form in _FORMATS for comp in ("", *_COMPRESSIONS))


@dataclass(frozen=True)
class Document:
    """One document. `id` is stable under reordering where the corpus has an `id` field; `text` is not empty."""

    id: str
    text: str


@dataclass(frozen=True)
class SourceFile:
    """One input file; `name` is how it is called in ids and digests, free of where the corpus lies."""

    path: Path
    name: str


def source_files(inputs: Sequence[str | Path]) -> list[SourceFile]:
    """The files behind `inputs` (files, folders searched recursively, globs), each once, in a fixed order.

    Raises UserError where an input matches nothing or names a file of an unsupported kind.
    """
    found: dict[Path, SourceFile] = {}
    for given in inputs:
        for file in _expand(str(given)):
            found.setdefault(file.path.resolve(), file)
    if not found:
        raise UserError("inputs: no input given; name at least one .txt or .jsonl file, folder or glob")
    return list(found.values())


def read_documents(inputs: Sequence[str | Path], errors: str = "strict") -> Iterator[Document]:
    """Stream the documents of `inputs` in a fixed order.

    `.txt`: documents separated by blank lines; `.jsonl`: one object a line with a `text` field. Both plain, `.gz` or
    `.zst`, in UTF-8. `errors="replace"` puts U+FFFD where a file is not UTF-8 instead of stopping.

    Raises UserError, one line, for: nothing matched, unsupported suffix, bad json, no `text` field, not UTF-8 (with
    the byte offset in the decompressed stream), damaged compression, and a corpus without any text.
    """
    empty = True
    for piece in read_pieces(inputs, errors):
        for document in piece.documents():
            empty = False
            yield document
    if empty:
        raise no_text(inputs)


def no_text(inputs: Sequence[str | Path]) -> UserError:
    """What is wrong with a corpus that holds no document."""
    return UserError(f"{', '.join(map(str, inputs))}: the corpus holds no text; check the files")


@dataclass(frozen=True)
class Piece:
    """Some whole lines of a `.jsonl` file, or ready documents of any: small enough to be sent to another process."""

    file: SourceFile
    errors: str
    lines: bytes = b""
    number: int = 0  # of the first line, from 0
    offset: int = 0  # of the first byte in the decompressed file
    ready: tuple[Document, ...] = ()

    def documents(self) -> Iterator[Document]:
        """The documents, in order. Raises UserError as `read_documents` does."""
        if self.ready:
            return iter(self.ready)
        lines = _decoded_lines(self.file.path, _raw_lines(iter([self.lines])), self.errors, self.offset)
        return _read_jsonl(self.file, lines, self.errors, self.number)


def read_pieces(inputs: Sequence[str | Path], errors: str = "strict") -> Iterator[Piece]:
    """What `read_documents` reads, in the same order, in pieces of about a megabyte that are parsed when asked."""
    if errors not in ("strict", "replace"):
        raise ValueError(f'errors must be "strict" or "replace", not {errors!r}')
    for file in source_files(inputs):
        stem = file.path.name.removesuffix(".gz").removesuffix(".zst")
        yield from (_jsonl_pieces if stem.endswith(".jsonl") else _txt_pieces)(file, errors)


def _expand(given: str) -> list[SourceFile]:
    path = Path(given)
    if path.is_file():
        if not given.endswith(SUPPORTED):
            raise UserError(f"{given}: unsupported suffix; use one of {', '.join(SUPPORTED)}")
        return [SourceFile(path, path.name)]
    if path.is_dir():
        return _expand_folder(path)
    matches = [Path(match) for match in sorted(glob.glob(given, recursive=True))]
    files = [SourceFile(m, m.name) for m in matches if m.is_file() and m.name.endswith(SUPPORTED)]
    files += [file for m in matches if m.is_dir() for file in _expand_folder(m, required=False)]
    if matches and not files:
        raise UserError(f"{given}: matches only files of an unsupported suffix; use one of {', '.join(SUPPORTED)}")
    if not files:
        raise UserError(f"{given}: no input matched; check the path")
    return files


def _expand_folder(folder: Path, required: bool = True) -> list[SourceFile]:
    paths = sorted(p for p in folder.rglob("*") if p.name.endswith(SUPPORTED) and p.is_file())
    if required and not paths:
        raise UserError(f"{folder}: the folder has no file with one of the suffixes {', '.join(SUPPORTED)}")
    return [SourceFile(p, p.relative_to(folder).as_posix()) for p in paths]


def _jsonl_pieces(file: SourceFile, errors: str) -> Iterator[Piece]:
    number = offset = 0
    rest: list[bytes] = []
    for block in _blocks(file.path):
        end = block.rfind(b"\n") + 1
        if end:
            lines = b"".join([*rest, block[:end]])
            yield Piece(file, errors, lines, number, offset)
            number, offset, rest = number + lines.count(b"\n"), offset + len(lines), []
        rest.append(block[end:])
    if last := b"".join(rest):
        yield Piece(file, errors, last, number, offset)


def _txt_pieces(file: SourceFile, errors: str) -> Iterator[Piece]:
    """Parsed here: only who has read the file up to a document knows its number."""
    ready: list[Document] = []
    size = 0
    for document in _read_txt(file, _decoded_lines(file.path, _raw_lines(_blocks(file.path)), errors)):
        ready.append(document)
        size += len(document.text)
        if size >= _BLOCK_BYTES:
            yield Piece(file, errors, ready=tuple(ready))
            ready, size = [], 0
    if ready:
        yield Piece(file, errors, ready=tuple(ready))


def _read_txt(file: SourceFile, lines: Iterator[str]) -> Iterator[Document]:
    number, paragraph = 0, []
    for line in lines:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield Document(f"{file.name}:{number}", "\n".join(paragraph))
            number, paragraph = number + 1, []
    if paragraph:
        yield Document(f"{file.name}:{number}", "\n".join(paragraph))


def _read_jsonl(file: SourceFile, lines: Iterator[str], errors: str, before: int) -> Iterator[Document]:
    """`before` lines of the file stand before `lines`."""
    for number, line in enumerate(lines, start=before + 1):
        if not line.strip():
            continue
        where = f"{file.path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not valid json ({error}); each line must be one json object") from None
        text = _text_field(record, where, errors)
        if text.strip():
            yield Document(str(record.get("id", f"{file.name}:{number}")), text)


def _text_field(record: Any, where: str, errors: str) -> str:
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{where}: no `text` field with a string; each line must look like {{"text": "..."}}')
    # json can escape half of a surrogate pair, which no UTF-8 text can hold.
    if errors == "replace":
        return text.encode("utf-8", "replace").decode("utf-8")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: `text` holds a lone surrogate at character {error.start}; repair it or use errors=replace"
        ) from None
    return text


def _decoded_lines(path: Path, lines: Iterator[bytes], errors: str, offset: int = 0) -> Iterator[str]:
    """`lines` of a file, the first of which begins at byte `offset` of it."""
    for raw in lines:
        line = raw.removeprefix(_BOM) if offset == 0 else raw
        try:
            yield line.decode("utf-8", errors).rstrip("\r\n")
        except UnicodeDecodeError as error:
            at = offset + len(raw) - len(line) + error.start
            raise UserError(
                f"{path}: not UTF-8 at byte {at} of the decompressed text; convert the file or use errors=replace"
            ) from None
        offset += len(raw)


def _raw_lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines with their line feed, so that the sum of lengths is the offset in the stream."""
    rest: list[bytes] = []
    for block in blocks:
        *whole, tail = block.split(b"\n")
        for line in whole:
            yield b"".join(rest) + line + b"\n"
            rest = []
        rest.append(tail)
    if last := b"".join(rest):
        yield last


def _blocks(path: Path) -> Iterator[bytes]:
    """Decompressed bytes of a file; damage and unreadable files become one UserError."""
    try:
        if path.suffix == ".zst":
            yield from _zst_blocks(path)
            return
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                yield block
    except EOFError:
        raise UserError(f"{path}: the compressed file is truncated; copy it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: the compressed file is corrupt ({error}); copy it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _zst_blocks(path: Path) -> Iterator[bytes]:
    import zstandard

    # A decompression object a frame: the library's stream reader does not notice a truncated last frame.
    context, frame, whole = zstandard.ZstdDecompressor(), None, True
    with open(path, "rb") as stream:
        while data := stream.read(_BLOCK_BYTES):
            while data:
                frame = frame or context.decompressobj()
                try:
                    yield frame.decompress(data)
                except zstandard.ZstdError as error:
                    raise UserError(f"{path}: the compressed file is corrupt ({error}); copy it again") from None
                data, whole = frame.unused_data, frame.eof
                frame = None if whole else frame
    if not whole:
        raise EOFError
