"""One self-contained HTML file about a run: no network, no script, light and dark, narrow and wide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from growth_ds.report import units
from growth_ds.report.compare import Comparison, compare
from growth_ds.report.curves import PANELS, SERIES, optim_svg, panel_svg
from growth_ds.report.layers import Layers, layers_section
from growth_ds.report.page import Html, document, element, fact, inline, join, section, table, write_page
from growth_ds.report.prose import in_plain_words
from growth_ds.report.rows import GrowthRow, StageRow, Summary, events, growth_rows, stage_rows, summary
from growth_ds.report.series import Curve, read_curve
from growth_ds.report.tables import distinct_entropies
from growth_ds.run_folder import RunFolder

Fillings = Sequence[tuple[str, Sequence[tuple[str, float]]]]
"""(sentence with its gap, [(word, probability)...])."""


@dataclass(frozen=True)
class _Subject:
    """One run that the page shows."""

    name: str
    summary: Summary
    curve: Curve

    @classmethod
    def read(cls, name: str, folder: RunFolder) -> _Subject:
        return cls(name, summary(folder), read_curve(name, folder))


def write_report(
    folder: Path, out: Path, others: Mapping[str, Path] | None = None, extra: Mapping[str, Fillings] | None = None,
    layers: Sequence[Layers] = (),
) -> Path:  # fmt: skip
    """Write the report of the run in `folder`, beside other runs (name -> folder), to `out`.

    `extra` adds sections (title -> filled sentences), `layers` one of pictures (`growth_ds.inside` measures them).
    Raises UserError if a folder holds no run or no training step, or if `out` cannot be written.
    """
    source = RunFolder(folder)
    run = source.run()
    subject = _Subject.read(run.name, source)
    rivals = [_Subject.read(name, RunFolder(path)) for name, path in (others or {}).items()]
    comparisons = [(rival, _compared(subject, rival)) for rival in rivals]
    stages, growths = stage_rows(source), growth_rows(source)
    reached = [(rival.name, comparison) for rival, comparison in comparisons if comparison]
    body = join(
        [
            element("p", "growth_ds run report", kind="kicker"),
            element("h1", run.name),
            element("p", in_plain_words(subject.summary, stages, growths, reached), kind="lead"),
            _facts(subject.summary),
            _comparison([subject, *rivals], comparisons),
            curves_of([each.curve for each in (subject, *rivals)], subject.summary.unigram_entropy),
            _growths(growths),
            layers_section(layers),
            _stages(stages),
            *(_fillings(title, sentences) for title, sentences in (extra or {}).items()),
            _configuration(source),
        ]
    )
    write_page(out, document(f"{run.name}: growth_ds report", body), "report")
    return out


def _compared(subject: _Subject, rival: _Subject) -> Comparison | None:
    """At equal compute; None where the losses are on different texts, or one run has none."""
    same_text = subject.summary.store == rival.summary.store
    return compare(subject.curve, rival.curve) if same_text else None


def _facts(run: Summary) -> Html:
    """The four numbers to see first."""
    progress = "" if run.finished else f" of {run.planned_steps:,}"
    facts = (
        ("validation loss", units.nats(run.valid_loss), _to_entropy(run)),
        ("masked tokens guessed", units.percent(run.valid_accuracy), "of the validation text"),
        ("training compute", units.flops(run.flops), f"FLOPs in {units.duration(run.seconds)}"),
        ("tokens seen", units.count(run.tokens), f"in {run.steps:,}{progress} steps"),
        ("parameters", units.count(run.parameters), "in the last stage"),
    )
    return element("dl", join(fact(*each) for each in facts), kind="facts")


def _to_entropy(run: Summary) -> str:
    if run.valid_loss is None or run.unigram_entropy is None:
        return "nats"
    apart = run.valid_loss - run.unigram_entropy
    return f"nats, {abs(apart):.3f} {'below' if apart < 0 else 'above'} the unigram entropy"


def _comparison(subjects: Sequence[_Subject], comparisons: Sequence[tuple[_Subject, Comparison | None]]) -> Html:
    """Final losses beside the unigram entropy, then each other run at equal compute."""
    runs = [subject.summary for subject in subjects]
    entropies = distinct_entropies(runs)
    first = runs[0].valid_loss
    rows: list[Sequence[object]] = []
    for subject in subjects:
        run = subject.summary
        done = f"{run.steps:,}" if run.finished else f"{run.steps:,} of {run.planned_steps:,}"
        apart = "" if run is runs[0] else _apart(run.valid_loss, first)
        rows.append(
            [
                subject.name, units.nats(run.valid_loss), apart, units.percent(run.valid_accuracy),
                units.count(run.parameters), done, units.count(run.tokens), units.flops(run.flops),
                units.duration(run.seconds),
            ]
        )  # fmt: skip
    rows += [
        ["unigram entropy", units.nats(entropy), _apart(entropy, first), "", "", "", "", "", ""]
        for entropy in entropies
    ]
    headings = ("run", "validation loss", "difference", "accuracy", "parameters", "steps", "tokens", "FLOPs", "time")
    parts: list[object] = [table(headings, rows, references=len(entropies))]
    parts.append(
        element("p", f"Losses in nats, lower is better. Difference: less {subjects[0].name}. The unigram entropy is "
                "the loss of guessing every masked token by its frequency alone.", kind="note")
    )  # fmt: skip
    if len({run.store for run in runs}) > 1 or len(entropies) > 1:
        parts.append(
            element("p", "These runs do not share one token store: their losses are on different texts and cannot be "
                    "compared.", kind="note warning")
        )  # fmt: skip
    if comparisons:
        parts.append(_equal_compute(subjects[0].name, comparisons))
    return section("Results", *parts)


def _equal_compute(name: str, comparisons: Sequence[tuple[_Subject, Comparison | None]]) -> Html:
    rows = []
    for rival, found in comparisons:
        if found is None:
            rows.append([rival.name, *[units.MISSING] * 5])
            continue
        share = "not reached" if found.share_to_match is None else units.percent(found.share_to_match, 0)
        sides = units.nats(found.loss), units.nats(found.other_loss)
        rows.append([rival.name, units.flops(found.flops), *sides, _difference(found.difference), share])
    headings = ("at equal compute, against", "FLOPs", name, "the other", "difference", "compute to match")
    note = (
        f"Losses between two validations by a straight line. Difference: the other less {name}. Compute to match: "
        f"FLOPs at which {name} came down to the other's final loss, of those the other spent."
    )
    return join([table(headings, rows), element("p", note, kind="note")])


def _apart(loss: float | None, first: float | None) -> str:
    return _difference(None if loss is None or first is None else loss - first)


def _difference(apart: float | None, digits: int = 3) -> str:
    """A signed difference with a true minus sign."""
    return units.difference(apart, digits).replace("-", "\u2212")


def curves_of(curves: Sequence[Curve], entropy: float | None, more: str = "") -> Html:
    """The section with the pictures of some runs; `more` is said below them."""
    alt = "loss against " + ", ".join(PANELS)
    drawn = [panel_svg(curves, key, entropy) for key in PANELS] + [optim_svg(curves)]
    figures = [element("figure", inline(svg), kind="card") for svg in drawn]
    note = (
        "Lines: training loss, smoothed within each stage; the light line is the loss as logged, and the steep start "
        f"may leave the picture. Points: validation. Dashed: a growth{_numbers(curves)}. {more}"
    )
    pictures = element("div", join(figures), kind="curves", role="group", title=alt)
    return section("Curves", _legend(curves), pictures, element("p", note.strip(), kind="note"))


def _numbers(curves: Sequence[Curve]) -> str:
    """What the numbers over the pictures mean."""
    found = [f"{number}: {growth.label()}" for number, growth in enumerate(curves[0].growths, start=1)]
    return f" of {curves[0].name} ({'; '.join(found)})" if found else ""


MARKS = (
    '<circle cx="14" cy="6" r="3.6"/>', '<path d="M10.8 2.8h6.4v6.4h-6.4z"/>', '<path d="M14 2 18 9.4H10z"/>',
    '<path d="M14 1.4 18.4 6 14 10.6 9.6 6z"/>', '<path d="M14 10 18 2.6H10z"/>', '<path d="M12.6 2h2.8v8h-2.8z"/>',
)  # fmt: skip
"""The shapes of `curves.MARKERS`, in their order."""


def _legend(curves: Sequence[Curve]) -> Html:
    items = []
    for number, curve in enumerate(curves):
        colour = f'style="stroke:var(--run{number % len(SERIES)});fill:var(--run{number % len(SERIES)})"'
        mark = f'<g {colour}><path d="M1 6h26" stroke-width="2.4"/>{MARKS[number % len(MARKS)]}</g>'
        swatch = Html(f'<svg viewBox="0 0 28 12" aria-hidden="true">{mark}</svg>')
        items.append(element("li", join([swatch, curve.name], "")))
    return element("ul", join(items), kind="legend")


def _growths(growths: Sequence[GrowthRow]) -> Html:
    if not growths:
        return section("Growth", element("p", "This run trained one model from its start to its end."))
    rows, why = [], list[str]()
    for row in growths:
        why += [reason for reason in row.reasons if reason not in why]
        later = "" if row.lag_loss is None else f"{row.lag_loss:.4f} (+{row.lag_steps} steps)"
        promise = "yes" if row.exact else "no: " + ", ".join(reason.partition(":")[0] for reason in row.reasons)
        aside = element("span", f"moments: {row.moments}, took {units.duration(row.seconds)}", kind="more")
        grown = join([*(change.text("→") for change in row.changes), aside], "<br>")
        accuracy = f"{units.percent(row.accuracy_before)} → {units.percent(row.accuracy_after)}"
        rows.append(
            [
                f"{row.step:,}", grown,
                f"{row.loss_before:.4f}", f"{row.loss_after:.4f}", _difference(row.delta, 4), later, accuracy, promise,
            ]
        )  # fmt: skip
    headings = (
        "step", "what grew", "loss before", "after", "change", "later", "accuracy", "exact by plan",
    )  # fmt: skip
    notes = ["Loss (nats) and accuracy on one fixed probe batch: right before, right after, and some steps later."]
    notes += [f"Not exact: {reason}." for reason in why]
    shown = table(headings, rows, text=(0, 1, 7))
    return section("Growth", shown, *(element("p", note, kind="note") for note in notes))


def _stages(stages: Sequence[StageRow]) -> Html:
    headings = (
        "stage", "layers", "hidden", "heads", "ffn", "positions", "length", "batch", "parameters", "steps", "tokens",
        "FLOPs", "share", "validation loss",
    )  # fmt: skip
    rows = []
    for row in stages:
        model = row.model
        layers = f"{model.layers} ({model.stored_layers} stored)" if model.shares_layers else f"{model.layers}"
        sizes = (model.hidden, model.heads, model.ffn, model.positions, row.length, row.batch)
        rows.append(
            [
                row.index, layers, *(f"{size:,}" for size in sizes), units.count(row.parameters), f"{row.steps:,}",
                units.count(row.tokens), units.flops(row.flops), units.percent(row.share, 0),
                units.nats(row.valid_loss),
            ]
        )  # fmt: skip
    return section("Stages", table(headings, rows))


def _fillings(title: str, sentences: Fillings) -> Html:
    cards = []
    for sentence, words in sentences:
        bars = [
            element("div", join([element("span", word), _bar(chance), element("span", units.percent(chance))], ""),
                    kind="guess")
            for word, chance in words
        ]  # fmt: skip
        cards.append(element("div", join([element("p", sentence), *bars]), kind="card sentence"))
    return section(title, element("div", join(cards), kind="sentences"))


def _bar(chance: float) -> Html:
    width = 100 * min(1.0, max(0.0, chance))
    return element("div", element("i", "", style=f"width:{width:.1f}%"), kind="bar")


def _configuration(folder: RunFolder) -> Html:
    """What the run was, in full, and what it ran on."""
    text = folder.config.read_text(encoding="utf-8")
    config = element(
        "details", join([element("summary", "Configuration (every default written out)"), element("pre", text)])
    )
    begins: list[dict[str, Any]] = events(folder, "start")
    if not begins:
        return section("How it was made", element("div", config, kind="card"))
    begin = begins[-1]
    keys = ("precision", "zero", "ranks", "store")
    rows = [[key, begin[key]] for key in keys if key in begin] + [
        list(pair) for pair in begin.get("versions", {}).items()
    ]
    rows += [[f"image, {key}", value] for key, value in begin.get("image", {}).items()]
    return section(
        "How it was made", element("div", config, kind="card"), table(("what it ran on", ""), rows, text=(0, 1), wrap=1)
    )
