"""Encoding a corpus word by word: a word that was met before costs one look-up.

Both kinds of tokenizer that we make treat what stands between two blanks by itself, so the ids of a text are those of
its words, one after the other, and most words of a corpus are repeated ones. New words go to the tokenizer itself (or,
for unigram models, to a table that finds what it finds: `viterbi`). Where a tokenizer came from elsewhere and may look
across blanks, whole texts go to it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from growth_ds.data.fingerprints import Fingerprints, fingerprints
from growth_ds.data.tokenizer import SPECIAL_TOKENS, WORD_START, Tokenizer
from growth_ds.data.unigram import normalizer
from growth_ds.data.viterbi import MAX_CHARACTERS, Unigram

_MOST_WORDS = 1 << 20  # kept in memory, some 100 MB; then all are forgotten
_JOINED_WORDS = 512
# BERT's normaliser drops other control characters without a trace: "a\x0bb" is one word to it.
_BLANKS = {"sentencepiece": [*range(0x21), 0x7F], "wordpiece": [0x09, 0x0A, 0x0D, 0x20]}
# BERT splits before and behind every one of them.
_PARTS = re.compile(r"[!-/:-@\[-`{-~]|[0-9A-Za-z]+")


class WordEncoder:
    """Ids of many texts, equal to `tokenizer.encode_batch`, from a table of the words met so far."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        pipeline = tokenizer.pipeline()
        self.by_word = _by_word(pipeline)
        """Whether words are looked up; otherwise every text goes to the tokenizer."""
        self._unigram = _table(pipeline) if self.by_word and tokenizer.kind == "sentencepiece" else None
        self._blank = np.isin(np.arange(256), _BLANKS.get(tokenizer.kind, []))
        self._forget()

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32 of all texts behind one another, tokens of each text int64 [texts])."""
        if not self.by_word or not texts:
            return _joined(self._tokenizer.encode_batch(texts))
        raw = [text.encode("utf-8", "surrogatepass") for text in texts]
        data = b"\n".join([b"", *raw, b""])
        begins, ends = _words(self._blank[np.frombuffer(data, np.uint8)])
        numbers = self._numbers_of(data, begins, ends)
        if numbers is None:
            return _joined(self._tokenizer.encode_batch(texts))
        counts = self._counts[numbers]
        tokens = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])  # in front of each word
        # Token j of a word stands behind the word's first in the table as in the text.
        places = np.repeat(self._firsts[numbers] - tokens[:-1], counts) + np.arange(tokens[-1])
        ids = self._ids[places]
        behind = np.searchsorted(begins, np.cumsum([len(each) + 1 for each in raw]))  # words up to the end of each text
        if len(self._counts) > _MOST_WORDS:
            self._forget()
        return ids, np.diff(tokens[behind], prepend=0)

    def _forget(self) -> None:
        self._known = Fingerprints(2 * _MOST_WORDS)
        self._ids = np.zeros(0, np.int32)  # of all words in the order of their numbers
        self._firsts = self._counts = np.zeros(0, np.int64)  # of each word: where its ids begin, how many they are

    def _numbers_of(self, data: bytes, begins: np.ndarray, ends: np.ndarray) -> np.ndarray | None:
        """The number of each word data[begin:end], all of them in the table then.

        None where they are too many for it, or two have one fingerprint.
        """
        raw = np.frombuffer(data, np.uint8)
        prints = fingerprints(raw, begins, ends)
        numbers = self._known.find(prints)
        new = np.flatnonzero(numbers < 0)
        _, first, which = np.unique(prints[0][new], return_index=True, return_inverse=True)
        if len(first) > _MOST_WORDS:
            return None
        first = new[first]
        # Plain words get the first of the new numbers: they go another way.
        plain = _plain(raw, begins[first], ends[first]) & (self._unigram is not None)
        order = np.argsort(~plain, kind="stable")
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        first = first[order]
        numbers[new] = len(self._counts) + place[which]
        if not self._known.sure(numbers, prints, first):
            return None
        self._known.add(prints[:, first])
        self._remember(*self._encode_words(data, begins[first], ends[first], int(plain.sum())))
        return numbers

    def _remember(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """The words with the next numbers have these ids, so many each."""
        self._firsts = np.concatenate([self._firsts, len(self._ids) + np.cumsum(lengths) - lengths])
        self._ids = np.concatenate([self._ids, ids])
        self._counts = np.concatenate([self._counts, lengths])

    def _encode_words(
        self, data: bytes, begins: np.ndarray, ends: np.ndarray, plain: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids, number of them for each word) of the words data[begin:end], the first of which are `plain` ones."""
        spans = zip(begins[plain:].tolist(), ends[plain:].tolist(), strict=True)
        words = [data[i:j].decode("utf-8", "surrogatepass") for i, j in spans]
        if self._unigram is None:
            return self._by_parts(words) if self._tokenizer.kind == "wordpiece" else _joined(self._given(words))
        # Through the table: plain words as they are, others where they normalise to one word.
        clean = ["" if _special(word) else self._one(word) for word in words]
        points, lengths = _marked(np.frombuffer(data, np.uint8), begins[:plain], ends[:plain])
        points = np.concatenate([points, np.frombuffer("".join(clean).encode("utf-32-le"), np.uint32)])
        lengths = np.concatenate([lengths, np.array([len(word) for word in clean], np.int64)])
        ids, counts = self._unigram.encode(points, lengths)
        left = np.flatnonzero(counts < 0)
        return _merged(ids, counts, left, self._given([words[i - plain] for i in left]))

    def _one(self, word: str) -> str:
        """The normalised word as the model sees it; empty where it becomes none or several."""
        clean = self._tokenizer.normalise(word)
        return WORD_START + clean if clean and " " not in clean else ""

    def _by_parts(self, words: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """ASCII words cut at punctuation: "word", "word," and "(word)" are then one new word, not three."""
        ordinary = np.array([w.isascii() and w.isprintable() and "[" not in w for w in words], np.bool_)
        parts = [_PARTS.findall(word) if o else [] for word, o in zip(words, ordinary, strict=True)]
        known = {part: number for number, part in enumerate(dict.fromkeys(chain.from_iterable(parts)))}
        encoded = [np.array(ids, np.int32) for ids in self._given(list(known))]
        rows = [[encoded[known[part]] for part in row] for row in parts]
        counts = np.array([sum(map(len, row)) for row in rows], np.int64)
        counts[~ordinary] = -1
        ids = np.concatenate([np.zeros(0, np.int32), *chain.from_iterable(rows)])
        left = np.flatnonzero(~ordinary)
        return _merged(ids, counts, left, self._given([words[i] for i in left]))

    def _given(self, words: list[str]) -> list[list[int]]:
        """Ids by the tokenizer itself, many words in one call: [SEP] between them cuts what it sees, and the ids."""
        safe = [not _special(word) for word in words]
        plain = [word for word, s in zip(words, safe, strict=True) if s]
        groups = [plain[i : i + _JOINED_WORDS] for i in range(0, len(plain), _JOINED_WORDS)]
        found: list[list[int]] = []
        separator = SPECIAL_TOKENS[3]
        for ids in self._tokenizer.encode_batch([separator.join(group) for group in groups]):
            found += _cut(ids, self._tokenizer.sep_id)
        rest = [word for word, s in zip(words, safe, strict=True) if not s]
        every, others = iter(found), iter(self._tokenizer.encode_batch(rest))
        return [next(every) if s else next(others) for s in safe]


def _special(word: str) -> bool:
    """Whether a special token stands in it, which the tokenizer cuts out before all else."""
    return "[" in word and any(token in word for token in SPECIAL_TOKENS)


def _by_word(pipeline: dict[str, Any]) -> bool:
    """Whether every step of a `tokenizers` description treats words apart, as ours do."""
    added = [
        token["content"] in SPECIAL_TOKENS
        and not (token["single_word"] or token["lstrip"] or token["rstrip"] or token["normalized"])
        for token in pipeline["added_tokens"]
    ]
    steps = (pipeline["normalizer"], pipeline["pre_tokenizer"])
    return all(added) and steps in (_ours(), _bert(pipeline["normalizer"]))


def _ours() -> tuple[dict[str, Any], dict[str, Any]]:
    """Normaliser and pre-tokenizer of `unigram.to_tokenizer`."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    backend = Backend(models.Unigram())
    backend.normalizer = normalizer()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(WORD_START, prepend_scheme="always", split=True)
    description = json.loads(backend.to_str())
    return description["normalizer"], description["pre_tokenizer"]


def _bert(given: dict[str, Any] | None) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Those of BERT, in whatever case; with `clean_text`, without which a blank is not sure to be one."""
    fits = given is not None and given.get("type") == "BertNormalizer" and given.get("clean_text") is True
    return (given if fits else {}), {"type": "BertPreTokenizer"}


def _table(pipeline: dict[str, Any]) -> Unigram | None:
    """The model as a table, where it is one that can be."""
    model = pipeline["model"]
    scores = [score for _, score in model["vocab"]]
    if model["unk_id"] is None or model.get("byte_fallback") or not np.isfinite(scores).all():
        return None
    table = Unigram([(piece, score) for piece, score in model["vocab"]], model["unk_id"])
    return table if table.has_ascii else None


def _words(blank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(begins, ends) of the runs that are not blank, in an array that begins and ends with a blank."""
    edges = np.flatnonzero(blank[1:] != blank[:-1]) + 1
    return edges[0::2], edges[1::2]


def _plain(raw: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """bool [words]: short, and nothing to normalise or to cut out: ASCII that can be seen, without a bracket."""
    other = (raw <= 0x20) | (raw >= 0x7F) | (raw == ord("["))
    before = np.cumsum(other, dtype=np.int32)
    return (before[ends - 1] == before[begins - 1]) & (ends - begins < MAX_CHARACTERS)


def _marked(raw: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(code points of ASCII words, each behind the mark of its start, uint32; their number int64 [words])."""
    lengths = ends - begins + 1
    shift = begins - 1 - (np.cumsum(lengths) - lengths)
    points = raw[np.repeat(shift, lengths) + np.arange(int(lengths.sum()))].astype(np.uint32)
    points[np.cumsum(lengths) - lengths] = ord(WORD_START)
    return points, lengths


def _joined(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(row) for row in rows], np.int64)
    return np.fromiter(chain.from_iterable(rows), np.int32, int(lengths.sum())), lengths


def _cut(ids: list[int], separator: int) -> list[list[int]]:
    """The runs of ids between separators."""
    at = np.array(ids, np.int32)
    ends = np.flatnonzero(at == separator).tolist()
    return [ids[begin:end] for begin, end in zip([0, *(end + 1 for end in ends)], [*ends, len(ids)], strict=True)]


def _merged(
    ids: np.ndarray, counts: np.ndarray, left: np.ndarray, rows: list[list[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """`ids` with the `rows` of the words numbered `left` (their count is -1) put where they belong."""
    if not len(left):
        return ids, counts
    more, lengths = _joined(rows)
    whole = counts.copy()
    whole[left] = lengths
    out = np.empty(int(whole.sum()), np.int32)
    is_left = np.repeat(counts < 0, whole)
    out[is_left], out[~is_left] = more, ids
    return out, whole
