"""From text to a store: split, train or open the tokenizer, encode in parallel, seal, move into place."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from growth_ds.data.corpus import Document, read_documents, source_files
from growth_ds.data.encode import encode_documents
from growth_ds.data.hashing import text_uniform
from growth_ds.data.parallel import default_workers
from growth_ds.data.store import FORMAT, MANIFEST, PARTS, SPLITS, SplitWriter, Store, write_manifest
from growth_ds.data.tokenizer import Tokenizer, from_folder, from_vocab
from growth_ds.errors import UserError
from growth_ds.files import sha256

Documents = tuple[Sequence[Document], Sequence[Document]]
_CHARACTERS_PER_WORKER = 2_000_000  # below this, starting a process takes longer than the work


@dataclass(frozen=True)
class _Corpus:
    """A corpus with its split: `train()` and `valid()` each start a new pass."""

    train: Callable[[], Iterable[Document]]
    valid: Callable[[], Iterable[Document]]
    documents: int
    characters: int


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
    corpus = _given_corpus(documents) if documents is not None else _split_corpus(paths, valid, errors, seed)
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
    return Store.open(out, verify=False)


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
    raise UserError(f'tokenizer: {tokenizer} is neither "sentencepiece" nor a vocab.txt nor a tokenizer folder')


def _train_tokenizer(corpus: _Corpus, vocab_size: int, seed: int, progress: bool) -> Tokenizer:
    from growth_ds.data.unigram import train_sentencepiece

    _say(progress, f"training a sentencepiece tokenizer of {vocab_size} pieces")
    return train_sentencepiece((document.text for document in corpus.train()), vocab_size, seed)


def _given_corpus(documents: Documents | Callable[[], Documents]) -> _Corpus:
    train, valid = documents() if callable(documents) else documents
    size = sum(len(document.text) for part in (train, valid) for document in part)
    return _Corpus(lambda: train, lambda: valid, len(train) + len(valid), size)


def _split_corpus(inputs: Sequence[str | Path], valid: float, errors: str, seed: int) -> _Corpus:
    """One pass over the files: it finds every fault before any work is done, and settles where the split lies.

    A document is for validation if the hash of its id is below a threshold: `valid`, moved only where that would
    leave one of the two splits empty.
    """
    count = characters = 0
    low, high = 1.0, 0.0
    for document in read_documents(inputs, errors):
        rank = text_uniform(document.id, seed)
        low, high = min(low, rank), max(high, rank)
        count, characters = count + 1, characters + len(document.text)
    threshold = 0.0
    if valid > 0 and low < high:
        threshold = min(valid, high) if low < valid else math.nextafter(low, 1.0)

    def part(for_valid: bool) -> Iterator[Document]:
        for document in read_documents(inputs, errors):
            if (text_uniform(document.id, seed) < threshold) == for_valid:
                yield document

    return _Corpus(lambda: part(False), lambda: part(True), count, characters)


def _write_splits(
    corpus: _Corpus, folder: Path, tokenizer: Tokenizer, workers: int, progress: bool
) -> dict[str, dict[str, int]]:
    """Encode and write every split; the counts of documents (those with at least one token) and tokens of each."""
    from rich.console import Console
    from rich.progress import Progress

    workers = max(1, min(workers, corpus.characters // _CHARACTERS_PER_WORKER))
    counts = {}
    with Progress(console=Console(stderr=True), disable=not (progress and sys.stderr.isatty())) as bar:
        task = bar.add_task("encoding documents", total=corpus.documents)
        for name, read in zip(SPLITS, (corpus.train, corpus.valid), strict=True):
            writer = SplitWriter(folder / name, tokenizer.vocab_size)
            for _, ids in encode_documents(read(), str(folder / "tokenizer"), workers):
                if len(ids):
                    writer.add(ids)
                bar.advance(task)
            writer.close()
            counts[name] = {"documents": writer.documents, "tokens": writer.tokens}
    if not counts["train"]["tokens"]:
        raise UserError("inputs: the corpus gives no tokens for training; check the files and the tokenizer")
    return counts


def _existing(out: Path, request: str, force: bool) -> Store | None:
    """The store at `out` if it is the one asked for; None where one may be written there."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not out.is_dir() or {p.name for p in out.iterdir()} - PARTS:
        raise UserError(f"{out}: exists and is not a store; choose another folder")
    if force:
        return None
    try:
        found = json.loads((out / MANIFEST).read_text("utf-8")).get("request")
    except (OSError, ValueError, AttributeError):
        raise UserError(f"{out}: holds a half-written store; use --force to replace it") from None
    if found != request:
        raise UserError(f"{out}: holds a store of other inputs or options; use --force to replace it")
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
