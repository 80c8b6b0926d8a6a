"""Training a sentencepiece unigram model and converting it exactly to a `tokenizers` object.

The conversion is exact because sentencepiece is trained without normalisation of its own ("identity") on text that
the `tokenizers` normaliser has already been applied to; what is left is the same lattice with the same scores.
"""

from __future__ import annotations

import heapq
import io
import re
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from growth_ds.data.hashing import text_uniform
from growth_ds.data.tokenizer import SPECIAL_TOKENS, WORD_START, Tokenizer
from growth_ds.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from tokenizers.normalizers import Normalizer

SAMPLE_BYTES = 10_000_000
# The sums of the E-step depend on how many threads share it: a constant keeps the model the same on every machine.
_THREADS = 2


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int = 8192, seed: int = 0, sample_bytes: int = SAMPLE_BYTES
) -> Tokenizer:
    """Train a cased unigram tokenizer on a sample of the lines of `texts`; same input, same tokenizer.

    Where the text is too small for `vocab_size` pieces the vocabulary is smaller, with a warning.
    Raises UserError where there is no text or `vocab_size` cannot even hold the characters.
    """
    tokenizer = to_tokenizer(train_model(texts, vocab_size, seed, sample_bytes))
    if tokenizer.vocab_size < vocab_size:
        warnings.warn(
            f"vocab_size: the corpus supports {tokenizer.vocab_size} pieces, not {vocab_size}; the smaller is used",
            stacklevel=2,
        )
    return tokenizer


def train_model(texts: Iterable[str], vocab_size: int = 8192, seed: int = 0, sample_bytes: int = SAMPLE_BYTES) -> bytes:
    """The serialised sentencepiece model behind `train_sentencepiece`."""
    import sentencepiece

    lines = sample_lines(texts, sample_bytes, seed)
    if not lines:
        raise UserError("tokenizer: the corpus has no text to train on; check the inputs")
    model = io.BytesIO()
    pad, unk, cls, sep, mask = SPECIAL_TOKENS
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            normalization_rule_name="identity",
            character_coverage=0.9995,
            max_sentence_length=1 << 20,
            num_threads=_THREADS,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece=pad,
            unk_piece=unk,
            bos_piece=cls,
            eos_piece=sep,
            control_symbols=mask,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(f"vocab_size: {vocab_size} does not suit the corpus; {_fix(str(error))}") from None
    return model.getvalue()


def _fix(message: str) -> str:
    if needed := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return f"its characters alone need {needed.group(1)} pieces, so use more"
    return f"sentencepiece says: {' '.join(message.split())[-200:]}"


def to_tokenizer(model: bytes) -> Tokenizer:
    """The tokenizer of a serialised model from `train_model`."""
    import sentencepiece
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.get_piece_size())]
    backend: Backend = Backend(models.Unigram(pieces, unk_id=processor.unk_id(), byte_fallback=False))
    backend.normalizer = normalizer()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(WORD_START, prepend_scheme="always", split=True)
    backend.decoder = decoders.Metaspace(WORD_START, prepend_scheme="always", split=True)
    return Tokenizer(backend, "sentencepiece")


def normalizer() -> Normalizer:
    """NFKC, then every run of white space, control and format characters (and `▁` itself) to one space, trimmed."""
    from tokenizers import Regex, normalizers

    # NFKC first: it turns some letters into a space and a mark, and the space must still be collapsed.
    blank = Regex(rf"[\s\p{{Cc}}\p{{Cf}}\p{{Z}}{WORD_START}]+")
    return normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(blank, " "), normalizers.Strip()])


def sample_lines(texts: Iterable[str], limit_bytes: int, seed: int) -> list[str]:
    """Normalised lines of `texts`, at most `limit_bytes` of UTF-8: a uniform sample that ignores their order.

    Lines are ranked by a hash of their text and the lowest ranks that fit are kept, so a repeated line counts once.
    """
    kept: set[str] = set()
    heap: list[tuple[float, str]] = []  # (minus rank, line): the worst on top
    total, ceiling = 0, 1.0  # nothing above a rank once dropped may enter later, or order would matter
    for line in _lines(texts):
        rank = text_uniform(line, seed)
        if rank >= ceiling or line in kept:
            continue
        kept.add(line)
        heapq.heappush(heap, (-rank, line))
        total += len(line.encode("utf-8"))
        while total > limit_bytes and len(heap) > 1:
            worst, dropped = heapq.heappop(heap)
            ceiling = -worst
            kept.remove(dropped)
            total -= len(dropped.encode("utf-8"))
    clean = normalizer()
    lines = (clean.normalize_str(line) for _, line in sorted(heap, reverse=True))
    return [line for line in lines if line]


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from text.split("\n")
