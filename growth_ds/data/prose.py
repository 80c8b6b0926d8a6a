"""English sentences out of docstrings: examples, code, tables, signatures and markup are left behind."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

# Directives whose body is prose; the body of any other (code-block, math, plot, image ...) is dropped.
_DIRECTIVES_OF_PROSE = (
    "note warning tip hint important caution attention danger seealso deprecated versionadded versionchanged "
    "admonition rubric topic"
)
_PROSE_DIRECTIVES = frozenset(_DIRECTIVES_OF_PROSE.split())
_DIRECTIVE = re.compile(r"^\.\.(?:\s|$)(?:([\w:-]+)::)?")
_UNDERLINE = re.compile(r"^([=\-~^#*+`\"'.:_])\1{2,}$")
_TABLE = re.compile(r"^(\||\+[-=+]{3}|[-=]{2,}\s+[-=]{2,})")
_FENCE = re.compile(r"^(```|~~~)")
_DOCTEST = re.compile(r"^(>>>|\.\.\. |In \[\d+\]|\$ )")
_FIELD = re.compile(r"^[:@](?:param|arg|type|raises?|returns?|rtype|keyword|kwarg|var|ivar)\b[^:]*:\s*")
_BULLET = re.compile(r"^(?:[-*+•]|\(?\d{1,2}[.)]|\(?[a-z]\))\s+")
_NUMPY_PARAMETER = re.compile(r"^[*\w.,\s{}'\"`]{1,60}\s:\s")
# `name (type): text`; the bare `name: text` is a parameter only where it is indented.
_TYPED_PARAMETER = re.compile(r"^[`*]*[\w.]+[`*]*\s*\([^()]*(?:\([^()]*\)[^()]*)*\)\s*(?::|--)(?:\s+|$)")
_BARE_PARAMETER = re.compile(r"^[`*]*[\w.]+[`*]*\s*(?::|--)\s+(?=\S)")
_LABEL = re.compile(r"^(?:#+ .*|[A-Z][\w /-]{0,40}:)$")

_MARKUP: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"!?\[`?~?([^\]]*?)`?\]\([^)]*\)"), r"\1"),  # [text](url)
    (re.compile(r"\[`~?([^\]`]*)`\]"), r"\1"),  # [`~Name`]
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`__?"), r"\1"),  # `text <url>`_
    (re.compile(r":[\w:+-]+:`~?(?:[\w.]+\.)?([^`<]*?)(?:\s*<[^`>]*>)?`"), r"\1"),  # :func:`a.b.c`
    (re.compile(r"``?([^`]*)``?_{0,2}"), r"\1"),  # ``literal``, `name`, `reference`_
    (re.compile(r"\*\*([^*]+)\*\*"), r"\1"),
    (re.compile(r"(?<![\w*])\*([^*\s][^*]*)\*(?!\w)"), r"\1"),
    (re.compile(r"\s*\[[\w#*-]{1,12}\]_?(?=[\s.,;:)]|$)"), ""),  # footnotes; also [MASK] and its kin
    (re.compile(r"<?(?:https?|ftp)://\S+?>?(?=[\s),]|\.?$|\.\s)"), ""),
    (re.compile(r"</?[a-zA-Z][^<>]{0,60}>"), ""),
    (re.compile(r"\\([ *_|`])"), r"\1"),
    (re.compile(r"\s+([.,;:)])(?=\s|$)"), r"\1"),
    (re.compile(r"\(\s*\)"), ""),
    (re.compile(r"\s+"), " "),
)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")
_CODE = re.compile(r"[{}<>=|\\$@^~]|\w\(\w*[,)\w.]*\)?|->|__\w|\w\[|^\s*(?:import|from \S+ import|def|class|return)\s")
_COMMON_WORDS = (
    "the a an of to in is are and or for with that this it be as by on not if from which can will when you at has "
    "have used may should was but"
)
_PLAIN_WORDS = frozenset(_COMMON_WORDS.split())
_MIN_SENTENCE_WORDS, _MIN_PARAGRAPH_WORDS = 4, 6


def prose_paragraphs(docstring: str) -> list[str]:
    """The paragraphs of English in a docstring or rst/markdown text, markup removed, each on one line."""
    paragraphs = (_sentences(_without_markup(" ".join(block))) for block in _text_blocks(docstring))
    return [p for p in paragraphs if len(p.split()) >= _MIN_PARAGRAPH_WORDS]


def _text_blocks(docstring: str) -> Iterator[list[str]]:
    """Groups of lines that belong to one paragraph, with what is visibly no prose skipped."""
    block: list[str] = []
    previous = 0
    for indent, line in _prose_lines(inspect.cleandoc(docstring).splitlines()):
        if _UNDERLINE.match(line):
            block = block[:-1]  # the line above is a heading
            continue
        starts_new = not line or indent < previous or _starts_item(line, indent)
        if starts_new and block:
            yield block
            block = []
        line = _item_text(line, indent)
        previous = indent
        if line:
            block.append(line)
    if block:
        yield block


def _prose_lines(lines: list[str]) -> Iterator[tuple[int, str]]:
    """(indent, stripped line) outside code fences, doctests, literal blocks, tables and non-prose directives."""
    fenced = doctest = False
    literal: int | None = None  # indent of the line that opened a literal block
    for raw in lines:
        line = raw.strip()
        indent = len(raw) - len(raw.lstrip())
        if _FENCE.match(line):
            fenced = not fenced
            yield 0, ""
            continue
        doctest = bool(line) and (doctest or bool(_DOCTEST.match(line)))
        if literal is not None and line and indent <= literal:
            literal = None
        table = _TABLE.match(line) and not _UNDERLINE.match(line)
        if fenced or doctest or table or literal is not None:
            yield 0, ""
            continue
        if directive := _DIRECTIVE.match(line):
            literal = None if directive.group(1) in _PROSE_DIRECTIVES else indent
            yield 0, ""
            continue
        if line.endswith("::"):
            literal = indent
            line = line[:-1]
        yield indent, line


def _starts_item(line: str, indent: int) -> bool:
    return bool(_BULLET.match(line) or _FIELD.match(line) or _is_parameter(line, indent) or _LABEL.match(line))


def _is_parameter(line: str, indent: int) -> bool:
    typed = _NUMPY_PARAMETER.match(line) or _TYPED_PARAMETER.match(line)
    return bool(typed or (indent > 0 and _BARE_PARAMETER.match(line)))


def _item_text(line: str, indent: int) -> str:
    """What is prose in the first line of a list item or parameter; other lines come back unchanged."""
    if _LABEL.match(line) or _NUMPY_PARAMETER.match(line):
        return ""
    line = _TYPED_PARAMETER.sub("", _FIELD.sub("", _BULLET.sub("", line)))
    return _BARE_PARAMETER.sub("", line) if indent > 0 else line


def _without_markup(text: str) -> str:
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    return text.strip()


def _sentences(paragraph: str) -> str:
    """The sentences of a paragraph that read as English, in order."""
    return " ".join(s for s in _SENTENCE_END.split(paragraph) if _is_english(s))


def _is_english(sentence: str) -> bool:
    words = sentence.split()
    if len(words) < _MIN_SENTENCE_WORDS or _CODE.search(sentence):
        return False
    letters = sum(map(str.isalpha, sentence)) + len(words) - 1
    plain = sum(word.lower() in _PLAIN_WORDS for word in words)
    names = sum("_" in word or "." in word[:-1] for word in words)
    closed = sentence[-1] in ".!?:;)\"'" or len(words) >= 12
    reads = letters >= 0.85 * len(sentence) and plain >= max(1, 0.08 * len(words))
    return reads and names <= 0.15 * len(words) and closed
