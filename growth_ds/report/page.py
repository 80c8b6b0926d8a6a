"""The look of the report, and the few HTML pieces it is made of. Text that goes in is escaped here, once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from growth_ds.errors import UserError
from growth_ds.files import write_durably

CSS = """
:root { color-scheme: light dark; --ink: #1f2430; --muted: #5b6475; --rule: #9aa3b2; --grid: #e3e7ee; --paper: #fff;
  --ground: #f5f6f9; --line: #e0e4eb; --run0: #0072b2; --run1: #d55e00; --run2: #009e73; --run3: #cc79a7;
  --run4: #b8860b; --run5: #56b4e9; --bad: #b3441e; --on: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --muted: #a3adbd; --rule: #657084; --grid: #2c3340;
  --paper: #1b202a; --ground: #12161d; --line: #2c3340; --run0: #56b4e9; --run1: #ff9152; --run2: #2fc79b;
  --run3: #e79fc6; --run4: #e3b341; --run5: #a5d8ff; --bad: #ff9152; --on: #12161d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); line-height: 1.55; font-size: 16px;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .25rem; letter-spacing: -.015em; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
p { max-width: 78ch; margin: 0 0 1rem; overflow-wrap: anywhere; }
.kicker { color: var(--muted); font-size: .85rem; margin: 0 0 .4rem; }
.lead { font-size: 1.05rem; margin-top: 1rem; }
.note { color: var(--muted); font-size: .87rem; margin: .6rem 0 0; max-width: 118ch; }
.more { color: var(--muted); font-size: .8rem; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 1rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: .75rem; margin: 1.5rem 0 0; }
.facts div { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: .7rem .9rem; }
.facts dt { color: var(--muted); font-size: .8rem; }
.facts dd { margin: 0; font-size: 1.25rem; font-weight: 600; letter-spacing: -.015em; white-space: nowrap; }
.facts small { display: block; white-space: normal; font-size: .78rem; font-weight: 400; color: var(--muted);
  letter-spacing: 0; }
.scroll { overflow-x: auto; padding: .25rem 1rem; }
* + .scroll { margin-top: 1rem; } h2 + .scroll { margin-top: 0; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .5rem .6rem; white-space: nowrap; vertical-align: top; }
th { color: var(--muted); font-weight: 500; font-size: .8rem; }
th.text, td.text { text-align: left; }
td.wrap { white-space: normal; min-width: 13rem; overflow-wrap: anywhere; }
th:first-child, td:first-child { padding-left: 0; } th:last-child, td:last-child { padding-right: 0; }
tbody tr { border-top: 1px solid var(--line); }
tbody tr.reference { color: var(--muted); }
.warning { color: var(--bad); }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.3rem; margin: 0 0 .75rem; padding: 0; list-style: none;
  font-size: .87rem; }
.legend svg { width: 28px; height: 12px; vertical-align: -1px; margin-right: .4rem; }
.curves { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .75rem; }
.curves figure { margin: 0; padding-bottom: .5rem; }
figcaption { font-size: .87rem; margin-bottom: .4rem; }
.curves svg { display: block; width: 100%; height: auto; }
.curves svg text, .curves svg tspan { font-family: inherit !important; }
@media (max-width: 760px) { .curves { grid-template-columns: minmax(0, 1fr); } main { padding-top: 1.5rem; }
  .card { padding: .75rem; } .scroll { padding: .1rem .75rem; } h1 { font-size: 1.5rem; } }
.sentences { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(320px, 100%), 1fr)); gap: .75rem; }
.sentence p { margin: 0 0 .5rem; }
.guess { display: grid; grid-template-columns: 7rem 1fr 3.5rem; gap: .5rem; align-items: center; font-size: .85rem;
  font-variant-numeric: tabular-nums; }
.guess span:first-child { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.guess span:last-child { text-align: right; color: var(--muted); }
.bar { height: .55rem; border-radius: 3px; background: var(--grid); overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--run0); }
.shares { margin-top: .75rem; } .shares .legend i { display: inline-block; width: .8rem; height: .8rem;
  border-radius: 3px; margin-right: .4rem; vertical-align: -1px; }
.share { display: grid; grid-template-columns: 5rem 1fr; align-items: center; gap: .5rem; font-size: .87rem; }
.stack { display: flex; height: 1.6rem; margin: .2rem 0; border-radius: 4px; overflow: hidden; gap: 2px; }
.stack i { display: block; overflow: hidden; color: var(--on); font-style: normal; font-size: .8rem;
  line-height: 1.6rem; text-align: center; white-space: nowrap; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; font-size: .8rem; line-height: 1.45; margin: .75rem 0 0;
  font-family: ui-monospace, "SFMono-Regular", Menlo, Consolas, "Liberation Mono", monospace; }
@media print { body { background: #fff; } main { max-width: none; padding: 0; } .card { break-inside: avoid; } }
"""


class Html(str):
    """Text that is HTML already; everything else is escaped on its way into the page."""


def safe(text: object) -> Html:
    """Any value as HTML text."""
    return text if isinstance(text, Html) else Html(escape(str(text)))


def element(tag: str, content: object, **attributes: str) -> Html:
    """`<tag class="...">content</tag>`; `kind` stands for `class`."""
    given = "".join(f' {"class" if key == "kind" else key}="{escape(value)}"' for key, value in attributes.items())
    return Html(f"<{tag}{given}>{safe(content)}</{tag}>")


def join(parts: Iterable[object], between: str = "\n") -> Html:
    """Parts in a row; `between` is HTML."""
    return Html(between.join(safe(part) for part in parts))


def section(title: str, *content: object) -> Html:
    """A headed part of the page."""
    return element("section", join([element("h2", title), *content]))


def inline(svg: str) -> Html:
    """SVG inside HTML: namespaces are known there, and the page gives the size."""
    head, rest = svg.split(">", 1)
    head = re.sub(r'\s(xmlns(:\w+)?|width|height|version)="[^"]*"', "", head)
    return Html(f'{head} role="img">{rest}')


def table(
    headings: Sequence[str],
    rows: Sequence[Sequence[object]],
    text: Sequence[int] = (0,),
    wrap: int = -1,
    references: int = 0,
) -> Html:
    """A table in a card that scrolls where it is too wide; columns in `text` are set left, column `wrap` may break.

    The last `references` rows are set in grey: they are no measurement of a run.
    """

    def kind(column: int) -> str:
        return " ".join(["text"] * (column in text or column == wrap) + ["wrap"] * (column == wrap))

    head = join((element("th", cell, kind=kind(at), scope="col") for at, cell in enumerate(headings)), "")
    body = []
    for number, row in enumerate(rows):
        cells = join((element("td", cell, kind=kind(at)) for at, cell in enumerate(row)), "")
        grey = number >= len(rows) - references
        body.append(element("tr", cells, kind="reference") if grey else element("tr", cells))
    content = join([element("thead", element("tr", head)), element("tbody", join(body))])
    return element("div", element("table", content), kind="card scroll", tabindex="0")


def fact(name: str, value: str, unit: str) -> Html:
    """One of the numbers to see first, in a `dl` of class `facts`."""
    number = element("dd", join([value, element("small", unit)], " "))
    return element("div", join([element("dt", name), number]))


def write_page(out: Path, text: str, what: str) -> None:
    """Replace `out` as a whole: a reader never sees half a page. UserError, about a `what`, where it cannot be."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_durably(out, text)
    except OSError as error:
        raise UserError(f"{out}: {what} not written ({error.strerror}); give a path that can be written") from None


def document(title: str, body: Html) -> str:
    """The whole page."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{safe(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
