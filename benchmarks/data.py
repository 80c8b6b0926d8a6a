"""The data side of being fast: `python benchmarks/data.py --json benchmarks/results/data.json` (`--quick`: seconds).

1. `growth-ds prepare` with one worker and with all, documents, MB and tokens a second, beside the C++ library's own
   encoding of the same documents with the same model in the same run: sentencepiece with one thread and as many as
   there are cores, `tokenizers` for a WordPiece vocabulary. The time of `prepare` is that of the whole call (reading,
   parsing, splitting, encoding, writing, hashing) with a tokenizer that is there already; that of the libraries is
   encoding alone, of texts that are in memory. Turns alternate; a ratio is that of two neighbours.
2. The share of a training step that is spent waiting for the next batch, through the trainer's loader and prefetch.

The corpus is English text from `shared/data/pretrain` beside the project where that is there, else the documentation
of the installed packages; the record says which.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.common import (  # noqa: E402
    about,
    cores,
    median_and_spread,
    said,
    significant,
    synchronize,
    table,
    write_json,
)
from benchmarks.training import (  # noqa: E402
    LENGTH,
    MODELS,
    ROWS,
    SHARED,
    corpus_files,
    python_corpus,
    small_store,
    the_run,
    training,
)
from growth_ds.data.corpus import Document, read_documents  # noqa: E402
from growth_ds.data.prepare import prepare  # noqa: E402
from growth_ds.data.tokenizer import SPECIAL_TOKENS, Tokenizer, from_vocab  # noqa: E402
from growth_ds.data.unigram import normalizer, to_tokenizer, train_model  # noqa: E402
from growth_ds.engine import distributed  # noqa: E402

FILES = ("wiki_train.jsonl.gz", "books_train.jsonl.gz")
QUICK_FILES = ("wiki_valid.jsonl.gz",)
GOALS = {"prepare_over_sentencepiece": 1.3, "share_of_step_waiting": 0.01}
VOCAB_SIZE = 8192


class Corpus:
    """Files to prepare, and their documents in memory."""

    def __init__(self, folder: Path, quick: bool) -> None:
        self.inputs = [SHARED / "pretrain" / name for name in (QUICK_FILES if quick else FILES)]
        self.name = "shared: " + ", ".join(path.name for path in self.inputs)
        if not all(path.is_file() for path in self.inputs):
            self.inputs = [python_corpus(folder / "corpus.jsonl", every=20 if quick else 1)]
            self.name = "documentation of the installed Python packages"
        self.documents: list[Document] = list(read_documents(self.inputs))
        self.texts = [document.text for document in self.documents]
        self.megabytes = sum(len(text.encode()) for text in self.texts) / 1e6

    def facts(self) -> dict[str, Any]:
        """What a reader has to know of it."""
        sizes = {"documents": len(self.documents), "megabytes": round(self.megabytes, 2)}
        return {"name": self.name, **sizes, "bytes_on_disk": sum(path.stat().st_size for path in self.inputs)}


def prepared(corpus: Corpus, tokenizer: Tokenizer, workers: int) -> Callable[[], int]:
    """A function that prepares a store and gives its tokens."""

    def work() -> int:
        with tempfile.TemporaryDirectory(prefix="benchmark-data.") as folder:
            made = prepare(corpus.inputs, Path(folder) / "store", tokenizer=tokenizer, workers=workers, progress=False)
            return sum(counts["tokens"] for counts in made.manifest["splits"].values())

    return work


def encoding(
    corpus: Corpus, tokenizer: Tokenizer, own: dict[str, Callable[[], int]], repeats: int
) -> list[dict[str, Any]]:
    """Rows of one tokenizer: `own` are the library's ways to encode, each giving the number of tokens."""
    ways = dict(own)
    for workers in sorted({1, cores()}):
        ways[f"prepare, {workers} worker{'s' * (workers > 1)}"] = prepared(corpus, tokenizer, workers)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    tokens: dict[str, int] = {}
    for _ in range(repeats):
        for name, work in ways.items():
            started = time.perf_counter()
            tokens[name] = work()
            seconds[name].append(time.perf_counter() - started)
    rows = []
    for name in ways:
        middle = median_and_spread(seconds[name])
        speed = {"documents_per_s": len(corpus.texts), "MB_per_s": corpus.megabytes, "tokens_per_s": tokens[name]}
        rates = {key: float(f"{value / middle['median']:.4g}") for key, value in speed.items()}
        rows.append({"tokenizer": tokenizer.kind, "way": name, "seconds": middle, **rates, "tokens": tokens[name]})
    return rows


def ratio(rows: list[dict[str, Any]], way: str, over: str) -> dict[str, Any]:
    """Seconds of one way over those of another, turn by turn."""
    found = {row["way"]: row["seconds"]["all"] for row in rows}
    return median_and_spread([a / b for a, b in zip(found[way], found[over], strict=True)])


def sentencepiece_rows(corpus: Corpus, vocab_size: int, repeats: int) -> list[dict[str, Any]]:
    """`prepare` beside sentencepiece. The library sees normalised text, or it would make other tokens."""
    import sentencepiece

    model = train_model(corpus.texts, vocab_size, sample_bytes=10_000_000)
    processor, clean = sentencepiece.SentencePieceProcessor(model_proto=model), normalizer()
    texts = [clean.normalize_str(text) for text in corpus.texts]
    own = {
        "sentencepiece, 1 thread": lambda: sum(len(processor.encode(text)) for text in texts),
        f"sentencepiece, num_threads={cores()}": lambda: sum(map(len, processor.encode(texts, num_threads=cores()))),
    }
    return encoding(corpus, to_tokenizer(model), own, repeats)


def wordpiece_rows(corpus: Corpus, folder: Path, repeats: int) -> list[dict[str, Any]]:
    """`prepare` beside `tokenizers`, which takes all cores by itself."""
    vocabulary = SHARED / "bert" / "vocab.txt"
    if not vocabulary.is_file():
        vocabulary = folder / "vocab.txt"
        sample = " ".join(corpus.texts[:200]).lower()
        words = sorted({word for word in sample.split() if word.isalpha()})
        letters = sorted({letter for letter in sample if letter.isalnum()})
        pieces = [*SPECIAL_TOKENS, *words, *letters, *(f"##{letter}" for letter in letters), *".,;:()"]
        vocabulary.write_text("\n".join(dict.fromkeys(pieces)), "utf-8")
    tokenizer = from_vocab(vocabulary)
    own = {"tokenizers, encode_batch": lambda: sum(map(len, tokenizer.encode_batch(corpus.texts)))}
    return encoding(corpus, tokenizer, own, repeats)


class Waits:
    """Batches of a training run, and the seconds waited for each."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches = batches
        self.seconds: list[float] = []

    def __iter__(self) -> Iterator[Any]:
        while True:
            started = time.perf_counter()
            batch = next(self._batches, None)
            if batch is None:
                return
            self.seconds.append(time.perf_counter() - started)
            yield batch


def waiting(store: Path, model: str, steps: int, skipped: int) -> dict[str, Any]:
    """The wait for batches in real training steps: the trainer's text, prefetch and engine, one rank, fp32, ZeRO-0."""
    with training(the_run(store, model, steps + skipped)) as made:
        waits, whole = Waits(made.batches(steps + skipped)), []
        started = time.perf_counter()
        for micro_batches in waits:
            made.step(micro_batches)
            synchronize()
            ended = time.perf_counter()
            whole.append(ended - started)
            started = ended
        loader, making = made.text.loader, []
        for step in range(min(steps, 20)):
            started = time.perf_counter()
            loader.batch(step * ROWS * LENGTH, LENGTH, ROWS)
            making.append(time.perf_counter() - started)
    waited, whole = waits.seconds[skipped:], whole[skipped:]
    return {
        "model": model,
        "step_ms": median_and_spread([1e3 * seconds for seconds in whole]),
        "wait_ms": median_and_spread([1e3 * seconds for seconds in waited]),
        "share": significant(sum(waited) / sum(whole), 3),
        "making_a_batch_ms": median_and_spread([1e3 * seconds for seconds in making]),
    }


def measure_encoding(corpus: Corpus, folder: Path, repeats: int, vocab_size: int) -> dict[str, Any]:
    """Rows and ratios of both tokenizers."""
    unigram, wordpiece = sentencepiece_rows(corpus, vocab_size, repeats), wordpiece_rows(corpus, folder, repeats)
    own, ours = (unigram[1]["way"], unigram[-1]["way"])
    ratios = {
        "prepare over sentencepiece, all cores": ratio(unigram, ours, own),
        "prepare over sentencepiece, one core": ratio(unigram, "prepare, 1 worker", unigram[0]["way"]),
        "prepare over tokenizers, all cores": ratio(wordpiece, wordpiece[-1]["way"], wordpiece[0]["way"]),
    }
    return {"rows": [*unigram, *wordpiece], "ratios": ratios}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--json", type=Path, help="where the record is written; with --only, that part of it")
    parser.add_argument("--quick", action="store_true", help="little text, few steps: it runs, its figures say little")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", choices=("encoding", "waiting"))
    args = parser.parse_args()
    repeats, steps = (1, 3) if args.quick else (args.repeats, args.steps)
    kept = json.loads(args.json.read_text()) if args.only and args.json and args.json.is_file() else {}
    record: dict[str, Any] = {**kept, **about(), "quick": args.quick, "goals": GOALS}
    with tempfile.TemporaryDirectory(prefix="benchmark-data.") as name:
        folder = Path(name)
        corpus = Corpus(folder, args.quick)
        record["corpus"] = corpus.facts()
        print(f"corpus: {corpus.name}, {corpus.megabytes:.1f} MB in {len(corpus.texts):,} documents")
        if args.only != "waiting":
            record["encoding"] = measure_encoding(corpus, folder, repeats, 2000 if args.quick else VOCAB_SIZE)
            print(table(record["encoding"]["rows"]), end="\n\n")
            ratios = record["encoding"]["ratios"].items()
            print(
                table([{"ratio of seconds": name, "median (spread)": said(each)} for name, each in ratios]), flush=True
            )
            write(args.json, record)
        if args.only != "encoding":
            distributed.init_distributed()
            store = small_store(folder / "store", corpus_files(folder))
            record["waiting"] = [waiting(store, model, steps, 1 if args.quick else 5) for model in MODELS]
            print(table(record["waiting"]))
            distributed.shutdown()
            write(args.json, record)


def write(path: Path | None, record: dict[str, Any]) -> None:
    """The record so far, where one is asked for."""
    if path:
        write_json(path, record)


if __name__ == "__main__":
    main()
