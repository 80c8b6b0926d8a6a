"""The unigram model over many words at once: the best segmentation of each, as the `tokenizers` library finds it.

The library looks at one word after the other. Here the search advances one character in all words together, with the
same candidates in the same order, summed in the same float64, so that it ends in the same pieces also where two
segmentations differ by nothing but rounding.

Shapes: W words, L characters in the longest of them, S states of the trie.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from growth_ds.data.tokenizer import WORD_START

_UNKNOWN_PENALTY = 10.0  # as in the library: an unknown character is this much worse than the worst piece
_TABLE_ENTRIES = 1 << 25  # of the trie's transitions, int32
_ALPHABET = 256  # codes fit one byte
MAX_CHARACTERS = 64
"""Of a word: a longer one would make the table of all words as wide as itself."""


class Unigram:
    """Pieces and scores as a trie over the characters that are frequent in pieces."""

    def __init__(self, pieces: Sequence[tuple[str, float]], unk_id: int) -> None:
        """`pieces` by id, with their log-probabilities."""
        self.unk_id = unk_id
        self.scores = np.array([score for _, score in pieces], np.float64)
        self.unk_score = float(self.scores.min()) - _UNKNOWN_PENALTY
        children, ends = _trie([piece for piece, _ in pieces])
        count = Counter(character for piece, _ in pieces for character in piece)
        width = min(_ALPHABET, max(2, _TABLE_ENTRIES // len(ends)))
        # ASCII and the mark of a word's start before all others: with these, most words are for this table.
        first = [character for character in (*map(chr, range(0x80)), WORD_START) if character in count]
        alphabet = list(dict.fromkeys([*first, *(character for character, _ in count.most_common(width))]))[: width - 2]
        self.has_ascii = set(first) <= set(alphabet)
        """Whether words of ASCII, behind the mark of their start, are never left to others but for their length."""
        codes = {character: code for code, character in enumerate(alphabet, start=2)}
        self._width = len(codes) + 2
        # Code 0: the character is in no piece. Code 1: it is, but has no column here; such words are left to others.
        self._code = np.zeros(0x110000, np.uint8)
        self._code[[ord(character) for character in count]] = 1
        self._code[[ord(character) for character in codes]] = list(codes.values())
        self._ends = np.array(ends, np.int32)
        self._next = np.zeros(len(ends) * self._width, np.int32)  # [S * codes]; 0 is the root, to which none leads
        for (state, character), following in children.items():
            if character in codes:
                self._next[state * self._width + codes[character]] = following

    def encode(self, points: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32 of all words, how many each has int64 [W]); -1 for a word that is not for this table.

        `points`: code points of all words behind one another, `lengths` [W] of them each.
        """
        flat = self._code[points]
        owner = np.repeat(np.arange(len(lengths)), lengths)
        foreign = (lengths > MAX_CHARACTERS) | (lengths == 0)
        foreign[owner[flat == 1]] = True
        order = np.argsort(np.where(foreign, 0, -lengths), kind="stable")[: len(lengths) - int(foreign.sum())]
        rank = np.full(len(lengths), -1)
        rank[order] = np.arange(len(order))
        row = rank[owner]
        column = np.arange(len(flat)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        longest = int(lengths[order[0]]) if len(order) else 0
        codes = np.zeros((longest, len(order)), np.uint8)
        codes[column[row >= 0], row[row >= 0]] = flat[row >= 0]
        pieces = self._backtrack(*self._search(codes, lengths[order]), lengths[order])
        counts = np.full(len(lengths), -1, np.int64)
        counts[order] = (pieces >= 0).sum(axis=0)
        inverse = pieces[:, rank[rank >= 0]].T  # in the order in which the words were given
        return inverse[inverse >= 0], counts

    def _search(self, codes: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(id, start) of the best path's last piece behind every character: each int32 [L + 1, W].

        `codes` uint8 [L, W] of words in falling order of their `lengths` [W]: those that go on are a first part.
        """
        longest, words = codes.shape
        best = np.full((longest + 1, words), -np.inf)
        best[0] = 0.0
        ids = np.zeros((longest + 1, words), np.int32)
        starts = np.zeros((longest + 1, words), np.int32)
        width = np.int32(self._width)
        longer = [int(np.searchsorted(-lengths, -at, side="left")) for at in range(longest + 1)]  # words of > at
        for start in range(longest):
            rows = np.arange(longer[start])
            state = np.zeros(len(rows), np.int32)
            lacking = np.ones(len(rows), np.bool_)  # a piece of this one character
            for at in range(start, longest):
                inside = int(np.searchsorted(rows, longer[at]))
                rows, state = rows[:inside], state[:inside]
                state = self._next.take(state * width + codes[at].take(rows))
                alive = np.flatnonzero(state)
                if not len(alive):
                    break
                rows, state = rows.take(alive), state.take(alive)
                pieces = self._ends.take(state)
                known = np.flatnonzero(pieces >= 0)
                if len(known):
                    hit, pieces = rows.take(known), pieces.take(known)
                    if at == start:
                        lacking[hit] = False
                    scores = best[start].take(hit) + self.scores.take(pieces)
                    better = np.flatnonzero(scores > best[at + 1].take(hit))
                    hit = hit.take(better)
                    best[at + 1][hit], ids[at + 1][hit] = scores.take(better), pieces.take(better)
                    starts[at + 1][hit] = start
            unknown = np.flatnonzero(lacking)
            scores = best[start].take(unknown) + self.unk_score
            better = np.flatnonzero(scores > best[start + 1].take(unknown))
            hit = unknown.take(better)
            best[start + 1][hit], ids[start + 1][hit], starts[start + 1][hit] = scores.take(better), self.unk_id, start
        return ids, starts

    def _backtrack(self, ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The pieces of each word in order, -1 where there is none: int32 [steps, W]."""
        columns = np.arange(len(lengths))
        at, steps = lengths.copy(), []
        while (at > 0).any():
            more = at > 0
            steps.append(np.where(more, ids[at, columns], -1))
            at = np.where(more, starts[at, columns], 0)
        pieces = np.array(steps[::-1], np.int32).reshape(len(steps), len(lengths))
        # Neighbouring unknown characters are one unknown piece.
        again = np.zeros(pieces.shape, np.bool_)
        again[1:] = (pieces[1:] == self.unk_id) & (pieces[:-1] == self.unk_id)
        return np.where(again, -1, pieces)


def _trie(pieces: Sequence[str]) -> tuple[dict[tuple[int, str], int], list[int]]:
    """((state, character) -> state, id of the piece that ends in each state or -1); state 0 is the root."""
    children: dict[tuple[int, str], int] = {}
    ends = [-1]
    for number, piece in enumerate(pieces):
        state = 0
        for character in piece:
            following = children.get((state, character))
            if following is None:
                following = children[state, character] = len(ends)
                ends.append(-1)
            state = following
        ends[state] = number
    return children, ends
