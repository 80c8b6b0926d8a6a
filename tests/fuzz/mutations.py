"""Strategies: what becomes of a real file whose bytes are damaged, or whose keys and values someone has changed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e308, 1e-320, float("nan"),
    float("inf"), "", " ", "x", "0", "-1", "nan", "..", "/", "../x", "a\nb", "\x00", "\ud7ff", "é" * 300, "auto",
    "stack", "1e9", [], {}, [[]], [None], {"": None}, {"a": {"b": {}}}, [1, "a", {}], [0] * 50, {"0": 1},
]  # fmt: skip
"""Values that stand where another was expected."""
PIECES = [
    b"\x00", b"\xff", b"\n", b"\r\n", b"\t", b" ", b":", b"{", b"}", b"[", b"]", b'"', b"'", b"&a ", b"*a",
    b"!!python/", b"!!binary ", b"<<: ", b"- ", b"? ", b"%", b"@", b"|", b">", b"---\n", b"...", b"0x", b"1_0",
    b"1e999", b"9" * 30,
    b"\xef\xbb\xbf", b"\xed\xa0\x80", b"null", b"NaN", b"\\u0000", b"2024-13-45", b"1:60", b"[" * 300, b"{a: " * 200,
]  # fmt: skip
"""Bytes that mean something to one of the readers."""


@st.composite
def damaged(draw: st.DrawFn, bases: Sequence[bytes]) -> bytes:
    """One of `bases` after up to four edits: bytes replaced, put in, taken out, doubled, or the end cut off."""
    content = bytearray(draw(st.sampled_from(bases)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        size = draw(st.integers(0, 40))
        kind = draw(st.sampled_from(("set", "insert", "delete", "double", "cut", "noise")))
        if kind in ("set", "insert"):
            piece = draw(st.sampled_from(PIECES))
            content[at : at + (len(piece) if kind == "set" else 0)] = piece
        elif kind == "delete":
            del content[at : at + size]
        elif kind == "double":
            content[at:at] = content[at : at + size]
        elif kind == "cut":
            del content[at:]
        else:
            content[at : at + size] = draw(st.binary(max_size=20))
    return bytes(content)


@st.composite
def changed(draw: st.DrawFn, bases: Sequence[Any]) -> Any:
    """One of `bases` (mappings, lists, values) after up to three edits at places of any depth."""
    tree = copy.deepcopy(draw(st.sampled_from(bases)))
    for _ in range(draw(st.integers(1, 3))):
        node: Any = tree
        while node:
            key = draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
            if not isinstance(node[key], (dict, list)) or not node[key] or draw(st.integers(0, 3)) == 0:
                _edit(draw, node, key)
                break
            node = node[key]
    return tree


def _edit(draw: st.DrawFn, node: Any, key: Any) -> None:
    """Replace, remove, rename or double what stands under `key`."""
    kind = draw(st.sampled_from(("replace", "replace", "replace", "remove", "rename", "add")))
    if kind == "replace":
        node[key] = copy.deepcopy(draw(st.sampled_from(ODD) | st.integers(-3, 70) | st.text(max_size=8)))
    elif kind == "remove":
        del node[key]
    elif isinstance(node, list):
        node.append(copy.deepcopy(node[key]))
    else:
        node[draw(st.text(max_size=6))] = node.pop(key) if kind == "rename" else copy.deepcopy(node[key])
