"""From text to a store: split, train or open the tokenizer, encode in parallel, seal, move into place."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from growth_ds.data.corpus import Document, no_text, read_documents, read_pieces, source_files
from growth_ds.data.encode import Encoded, encode_documents, encode_pieces
from growth_ds.data.hashing import text_uniform
from growth_ds.data.parallel import default_workers
from growth_ds.data.store import FORMAT, MANIFEST, PARTS, SPLITS, SplitWriter, Store, write_manifest
from growth_ds.data.tokenizer import Tokenizer, from_folder, from_vocab
from growth_ds.errors import UserError
from growth_ds.files import sha256

Documents = tuple[Sequence[Document], Sequence[Document]]
_CHARACTERS_PER_WORKER = 2_000_000  # below this, starting a process takes longer than the work


def prepare(
    inputs: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    documents: Documents | Callable[[], Documents] | None = None,
    documents_digest: str | None = None,
    tokenizer: str | Path | Tokenizer = "sentencepiece",
    vocab_size: int = 8192,
    workers: int | None = None,
    valid: float = 0.02,
    errors: str = "strict",
    force: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Store:
    """Build the store `out` from text, or return it at once where it is already there with the same content.

    `inputs` are files, folders and globs (see `read_documents`), split by a hash of the document id with a share
    `valid` of the documents for validation. Or pass `documents`, an already split corpus (train, valid), or a
    function that makes one; with `documents_digest` the function is called only if the store must be built.
    `tokenizer` is "sentencepiece" (train one of `vocab_size` pieces on the training split), a BERT vocab.txt, a
    tokenizer folder or a Tokenizer. The bytes do not depend on `workers` (processes; default: all processors).

    Raises UserError for bad inputs, and for an `out` that holds something else; `force` replaces another store,
    never a folder that is none.
    """
    out = Path(out)
    if not 0 <= valid < 1:
        raise UserError(f"valid: {valid} is not a share of the documents; use 0 <= valid < 1")
    given = _given_tokenizer(tokenizer)
    paths = [inputs] if isinstance(inputs, (str, Path)) else list(inputs)
    if documents is not None and not documents_digest:
        documents = documents() if callable(documents) else documents
        documents_digest = _documents_digest(documents)
    request = _request_digest(
        source=documents_digest or _inputs_digest(paths),
        tokenizer=given.digest if given else f"sentencepiece {vocab_size}",
        options=[seed, errors, 0.0 if documents is not None else valid],
    )
    if store := _existing(out, request, force):
        _say(progress, f"{out}: already prepared from the same inputs; used as it is")
        return store
    corpus = _GivenCorpus(documents) if documents is not None else _FileCorpus(paths, valid, errors, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        partial.chmod(0o755)  # mkdtemp makes private folders; a store is shared between users
        made = given or _train_tokenizer(corpus, vocab_size, seed, progress)
        made.save(partial / "tokenizer")
        splits = _write_splits(corpus, partial, made, workers or default_workers(), progress)
        facts = {"request": request, "splits": splits}
        facts["tokenizer"] = {"digest": made.digest, "kind": made.kind, "vocab_size": made.vocab_size}
        write_manifest(partial, facts)
        _move_into_place(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Store.of(out, made)


def _given_tokenizer(tokenizer: str | Path | Tokenizer) -> Tokenizer | None:
    """None stands for one that has to be trained."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    if str(tokenizer) == "sentencepiece":
        return None
    if Path(tokenizer).is_dir():
        return from_folder(tokenizer)
    if Path(tokenizer).is_file():
        return from_vocab(tokenizer)
    raise UserError(
        f'tokenizer: {tokenizer} is neither "sentencepiece" nor a vocab.txt nor a tokenizer folder', "GDS-D02"
    )


def _train_tokenizer(corpus: _GivenCorpus | _FileCorpus, vocab_size: int, seed: int, progress: bool) -> Tokenizer:
    from growth_ds.data.unigram import train_sentencepiece

    def texts() -> Iterator[str]:
        for document in corpus.train():
            yield document.text
        _say(progress, f"training a sentencepiece tokenizer of {vocab_size} pieces")  # the text could be read

    return train_sentencepiece(texts(), vocab_size, seed)


class _GivenCorpus:
    """A corpus that came split."""

    threshold = 0.5

    def __init__(self, documents: Documents | Callable[[], Documents]) -> None:
        self._train, self._valid = documents() if callable(documents) else documents
        self.characters = sum(len(document.text) for part in (self._train, self._valid) for document in part)

    def train(self) -> Iterable[Document]:
        """The documents to train on."""
        return self._train

    def encoded(self, folder: str, workers: int) -> Iterator[Encoded]:
        """All documents; of those for validation the rank is below the threshold."""
        return encode_documents(((1.0, self._train), (0.0, self._valid)), folder, workers)

    def settle(self, low: float, high: float, count: int) -> bool:
        """Nothing can change it."""
        return False


class _FileCorpus:
    """Files, split by a hash: a document is for validation if the hash of its id, its rank, is below a threshold.

    That is the share asked for, moved only where it would leave one of the two splits empty. So it is known for sure
    when all documents were read: `settle`.
    """

    def __init__(self, inputs: Sequence[str | Path], valid: float, errors: str, seed: int) -> None:
        self._inputs, self._valid, self._errors, self._seed = inputs, valid, errors, seed
        self.threshold = valid
        # What a compressed text is to be taken for, in characters; only the number of workers depends on it.
        self.characters = sum(
            file.path.stat().st_size * (3 if file.path.suffix in (".gz", ".zst") else 1)
            for file in source_files(inputs)
        )

    def train(self) -> Iterator[Document]:
        """The documents to train on, after a pass over all for the threshold: it finds every fault before any work."""
        ranks = [text_uniform(document.id, self._seed) for document in read_documents(self._inputs, self._errors)]
        self.settle(min(ranks), max(ranks), len(ranks))
        for document in read_documents(self._inputs, self._errors):
            if text_uniform(document.id, self._seed) >= self.threshold:
                yield document

    def encoded(self, folder: str, workers: int) -> Iterator[Encoded]:
        """All documents; of those for validation the rank is below the threshold."""
        return encode_pieces(read_pieces(self._inputs, self._errors), self._seed, folder, workers)

    def settle(self, low: float, high: float, count: int) -> bool:
        """Move the threshold to where it has to be for ranks from `low` to `high`; whether it is another one.

        Raises UserError where there is no document at all.
        """
        if not count:
            raise no_text(self._inputs)
        before, self.threshold = self.threshold, 0.0
        if self._valid > 0 and low < high:
            self.threshold = min(self._valid, high) if low < self._valid else math.nextafter(low, 1.0)
        return self.threshold != before


def _write_splits(
    corpus: _GivenCorpus | _FileCorpus, folder: Path, tokenizer: Tokenizer, workers: int, progress: bool
) -> dict[str, dict[str, int]]:
    """Encode and write every split; the counts of documents (those with at least one token) and tokens of each."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    workers = max(1, min(workers, corpus.characters // _CHARACTERS_PER_WORKER))
    columns = SpinnerColumn(), TextColumn("encoding documents"), TextColumn("{task.completed:,}"), TimeElapsedColumn()
    console, hidden = Console(stderr=True), not (progress and sys.stderr.isatty())
    with Progress(*columns, console=console, disable=hidden) as bar:
        task = bar.add_task("", total=None)

        def write() -> bool:
            """One pass; whether its split holds."""
            low, high, count = 1.0, 0.0, 0
            for encoded in corpus.encoded(str(folder / "tokenizer"), workers):
                if len(encoded.ranks):
                    low, high = min(low, encoded.ranks.min()), max(high, encoded.ranks.max())
                count += len(encoded.ranks)
                _write(encoded, corpus.threshold, writers)
                bar.advance(task, len(encoded.ranks))
            return not corpus.settle(low, high, count)

        for _ in range(2):  # again, from the start, for a corpus so small that a split would be empty
            writers = [SplitWriter(folder / name, tokenizer.vocab_size) for name in SPLITS]
            try:
                holds = write()
            finally:
                for writer in writers:
                    writer.close()
            if holds:
                break
    if not writers[0].tokens:
        raise UserError("inputs: the corpus gives no tokens for training; check the files and the tokenizer")
    return {name: {"documents": w.documents, "tokens": w.tokens} for name, w in zip(SPLITS, writers, strict=True)}


def _write(encoded: Encoded, threshold: float, writers: Sequence[SplitWriter]) -> None:
    """Documents with a token into the split to which their rank belongs."""
    for_valid = encoded.ranks < threshold
    for writer, mine in zip(writers, (~for_valid, for_valid), strict=True):
        if mine.any():
            writer.add(encoded.ids[np.repeat(mine, encoded.lengths)], encoded.lengths[mine & (encoded.lengths > 0)])


def _existing(out: Path, request: str, force: bool) -> Store | None:
    """The store at `out` if it is the one asked for; None where one may be written there."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not out.is_dir() or {p.name for p in out.iterdir()} - PARTS:
        raise UserError(f"{out}: exists and is not a store; choose another folder", "GDS-O01")
    if force:
        return None
    try:
        found = json.loads((out / MANIFEST).read_text("utf-8")).get("request")
    except (OSError, ValueError, AttributeError):
        raise UserError(f"{out}: holds a half-written store; use --force to replace it", "GDS-O01") from None
    if found != request:
        raise UserError(f"{out}: holds a store of other inputs or options; use --force to replace it", "GDS-O01")
    return replace(Store.open(out), reused=True)


def _move_into_place(partial: Path, out: Path) -> None:
    if not out.exists():
        partial.rename(out)
        return
    # A folder cannot be replaced in one step: the old one steps aside, and is removed when the new one is there.
    aside = partial.with_name(partial.name + "-replaced")
    out.rename(aside)
    partial.rename(out)
    shutil.rmtree(aside)


def _request_digest(**parts: Any) -> str:
    return hashlib.sha256(json.dumps([FORMAT, parts], sort_keys=True).encode()).hexdigest()


def _inputs_digest(inputs: Sequence[str | Path]) -> str:
    listed = [(file.name, sha256(file.path)) for file in source_files(inputs)]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def _documents_digest(documents: Documents) -> str:
    digest = hashlib.sha256()
    for name, part in zip(SPLITS, documents, strict=True):
        for document in part:
            digest.update(json.dumps([name, document.id, document.text]).encode())
    return digest.hexdigest()


def _say(progress: bool, line: str) -> None:
    if progress:
        print(line, file=sys.stderr)
