"""The plan of a run as one self-contained HTML page: what it costs, whether it fits, what each growth does.

Every number is of the record that `growth-ds plan --json` prints, or computed from it here; what was not asked for
(time without hardware, a price without a rate) is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from growth_ds.report import units
from growth_ds.report.page import Html, document, element, fact, join, section, table, write_page

HEADROOM = 0.9
"""Share of a GPU's memory that a rank may plan to fill: allocators cut it in pieces, libraries take workspaces."""
ERRORS = {
    "published": {"of": 16, "mean": 0.0585, "worst": 0.1877, "source": "benchmarks/results/forecast.json"},
    "here": {"of": 10, "mean": 0.0648, "worst": 0.1273, "source": "benchmarks/results/plan_error.json"},
}
"""How far forecasts were off, for pages of an installed package, which has no `benchmarks`; a test compares them."""
NARROW = 0.13
"""Share of a bar below which it has no room for its figure on a telephone."""
Stages = Sequence[dict[str, Any]]


def write_plan(record: dict[str, Any], out: Path) -> Path:
    """Write the page of a plan's record. Raises UserError if `out` cannot be written."""
    body = join(
        part
        for part in [
            element("p", "growth_ds plan", kind="kicker"),
            element("h1", record["name"]),
            element("p", _lead(record), kind="lead"),
            _facts(record),
            _stages(record),
            _growths(record["stages"]),
            _memory(record),
            _time(record),
            _bill(record),
            _errors(record),
        ]
        if part
    )
    write_page(out, document(f"{record['name']}: growth_ds plan", body), "plan")
    return out


def _lead(record: dict[str, Any]) -> str:
    first, last, count = record["stages"][0], record["stages"][-1], len(record["stages"])
    tokens = f"{units.count(record['tokens'])} tokens"
    if count == 1:
        text = f"One BERT of {units.count(last['parameters'])} parameters, trained on {tokens}."
    else:
        sizes = f"{units.count(first['parameters'])} to {units.count(last['parameters'])} parameters"
        text = f"A BERT that grows from {sizes} in {count} stages, over {tokens}."
        text += f" It costs {units.percent(record['flops_ratio'], 0)} of the FLOPs of its last model on as many tokens;"
        text += " whether it is as good then, a plan does not say."
    found = record.get("forecast")
    if found is not None:
        text += f" Forecast on {_hardware(found)}: {units.duration(found['seconds'])}."
    return text


def _hardware(found: dict[str, Any]) -> str:
    ranks = found["nodes"] * found["gpus_per_node"]
    if "machine" in found:
        return f"{ranks} rank{'s' * (ranks > 1)} of this machine ({found['machine']['processor']})"
    where = f" in {found['nodes']} nodes" if found["nodes"] > 1 else ""
    return f"{ranks:,} {found['hardware'].upper()}{where}"


def _facts(record: dict[str, Any]) -> Html:
    last, found = record["stages"][-1], record.get("forecast")
    facts = [
        ("training compute", units.flops(record["flops"]), "FLOPs"),
        ("of from-scratch", units.percent(record["flops_ratio"], 0), "the last model on all tokens"),
        ("tokens", units.count(record["tokens"]), f"in {record['steps']:,} steps"),
        ("parameters", units.count(last["parameters"]), "in the last stage"),
    ]
    if found is not None:
        facts.append(("wall-clock", units.duration(found["seconds"]), f"on {_hardware(found)}"))
        if found["kwh"] is not None:
            facts.append(("energy", f"{found['kwh']:,.1f} kWh", f"{found['gpu_hours']:,.1f} GPU-hours"))
        if found["price"] is not None:
            facts.append(("price", f"{found['price']:,.2f}", "at the given rate"))
    return element("dl", join(fact(*each) for each in facts), kind="facts")


def _stages(record: dict[str, Any]) -> Html:
    headings = [
        "stage", "layers", "hidden", "heads", "ffn", "length", "batch", "parameters", "steps", "tokens", "FLOPs/token",
        "FLOPs",
    ]  # fmt: skip
    rows = []
    for number, stage in enumerate(record["stages"]):
        model = stage["model"]
        stored = f" ({model['stored_layers']} stored)" if model["stored_layers"] != model["layers"] else ""
        sizes = [f"{model[key]:,}" for key in ("hidden", "heads", "ffn")]
        rows.append(
            [
                number, f"{model['layers']}{stored}", *sizes, f"{stage['length']:,}", f"{stage['batch']:,}",
                units.count(stage["parameters"]), f"{stage['steps']:,}", units.count(stage["tokens"]),
                units.flops(stage["flops_per_token"]), units.flops(stage["flops"]),
            ]
        )  # fmt: skip
    note = "FLOPs: matrix products of forward and backward, the MLM head on masked positions alone."
    return section("Stages", table(headings, rows), _shares(record), element("p", note, kind="note"))


def _shares(record: dict[str, Any]) -> Html:
    """What share of tokens, compute and time each stage takes, as bars."""
    stages, found = record["stages"], record.get("forecast")
    learned = [stage["learn"]["flops"] if stage["learn"] else 0 for stage in stages]
    parts = {
        "tokens": [stage["tokens"] for stage in stages],
        "compute": [stage["flops"] + more for stage, more in zip(stages, learned, strict=True)],
    }
    if found is not None:
        parts["time"] = [stage["seconds"] for stage in found["stages"]]
    if len(stages) == 1:
        return Html("")
    bars = join(_stacked(name, values) for name, values in parts.items())
    names = join((_named(number) for number in range(len(stages))), "")
    return element("div", join([element("ul", names, kind="legend"), bars]), kind="card shares")


def _named(number: int) -> Html:
    swatch = element("i", "", style=f"background:var(--run{number % 6})")
    return element("li", join([swatch, f"stage {number}"], ""))


def _stacked(name: str, values: Sequence[float]) -> Html:
    total = sum(values) or 1
    pieces = []
    for number, value in enumerate(values):
        share = value / total
        said = units.percent(share, 0) if share >= NARROW else ""
        style = f"width:{100 * share:.2f}%;background:var(--run{number % 6})"
        pieces.append(element("i", said, style=style, title=f"stage {number}: {units.percent(share)}"))
    return element(
        "div", join([element("span", name), element("div", join(pieces, ""), kind="stack")], ""), kind="share"
    )


def _growths(stages: Stages) -> Html:
    rows, why = list[list[object]](), dict[str, str]()
    for number, stage in enumerate(stages):
        if stage["growth"] is None:
            continue
        for axis in stage["growth"]["axes"]:
            exact = "yes" if axis["exact"] else "no"
            rows.append([f"into {number}", axis["axis"], f"{axis['old']:,} → {axis['new']:,}", axis["recipe"], exact])
            if not axis["exact"]:
                why[f"{axis['axis']}, {axis['recipe']}"] = axis["reason"]
        if stage["learn"]:
            taught = f"{stage['learn']['steps']:,} steps, {units.flops(stage['learn']['flops'])} FLOPs"
            rows.append([f"into {number}", "operator", taught, "learned", ""])
    if not rows:
        return section("Growth", element("p", "This run trains one model from its start to its end."))
    notes = ["Exact: at the moment of growth the grown model computes what the model before it did."]
    notes += [f"Not exact ({what}): {reason}." for what, reason in why.items()]
    headings = ("growth", "axis", "size", "recipe", "exact")
    shown = table(headings, rows, text=(0, 1, 2, 3, 4))
    return section("Growth", shown, *(element("p", note, kind="note") for note in notes))


def recommended(found: dict[str, Any]) -> tuple[int | None, int]:
    """The lowest ZeRO stage of a forecast whose ranks fill at most `HEADROOM` of their memory in every stage,
    and the bytes of the fullest; None and the bytes of the highest where none does."""
    most = 0
    for zero in sorted(found["stages"][0]["bytes_per_rank"]):
        most = max(stage["bytes_per_rank"][zero] for stage in found["stages"])
        if most <= HEADROOM * found["memory_bytes"]:
            return int(zero), most
    return None, most


def _memory(record: dict[str, Any]) -> Html:
    found, stages = record.get("forecast"), record["stages"]
    shown = found["stages"] if found is not None else stages
    zeros = sorted(shown[0]["bytes_per_rank"])
    rows = []
    for number, stage in enumerate(shown):
        growth = stages[number]["growth_peak"]
        peak = "" if growth is None else _gib(growth["sharded"])
        rows.append([number, *(_gib(stage["bytes_per_rank"][zero]) for zero in zeros), peak])
    headings = ["stage", *(f"ZeRO-{zero}" for zero in zeros), f"growth (ZeRO-{record['zero']})"]
    what = "weights, gradients and optimizer state"
    if found is not None:
        own = "what a rank holds without a model" if "machine" in found else "2 GB for the GPU's context and workspaces"
        what += f", the activations of a micro-batch, and {own}"
    note = f"GiB on each of {record['ranks']} ranks: {what}. Growth: what entering the stage adds at most, sharded."
    return section("Memory", _advice(record), table(headings, rows), element("p", note, kind="note"))


def _advice(record: dict[str, Any]) -> Html:
    found = record.get("forecast")
    if found is None:
        return element("p", "Which ZeRO stage fits depends on the GPU: plan with --hardware.")
    zero, most = recommended(found)
    room = f"{_gib(found['memory_bytes'])} GiB"
    filled = f"{_gib(most)} of {room}, {units.percent(most / found['memory_bytes'], 0)}"
    if zero is None:
        text = f"It does not fit: a rank would take {filled}. More ranks, a smaller micro-batch or activation "
        return element("p", f"{text}checkpointing help.", kind="warning")
    if "machine" in found:
        return element("p", f"ZeRO-{zero}, as the run asks, fits: its fullest stage takes {filled} that is free now.")
    why = "What fits without ZeRO needs no partitioning, and sends least."
    if zero:
        below = max(stage["bytes_per_rank"][str(zero - 1)] for stage in found["stages"])
        why = f"ZeRO-{zero - 1} would take {_gib(below)}, more than {units.percent(HEADROOM, 0)}; higher stages send "
        why += "more."
    asked = "" if zero == record["zero"] else f" The run asks for ZeRO-{record['zero']}."
    return element("p", f"Recommended: ZeRO-{zero}. Its fullest stage takes {filled}. {why}{asked}")


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f}"


def _time(record: dict[str, Any]) -> Html | None:
    found = record.get("forecast")
    if found is None:
        return None
    rows = []
    for number, stage in enumerate(found["stages"]):
        step, whole = stage["step"], stage["step_seconds"]
        parts = [step[key] / whole for key in ("products", "traffic", "launches", "optimizer", "messages")]
        rows.append(
            [
                number, f"{1000 * whole:,.1f}", *(units.percent(part, 0) for part in parts),
                units.count(stage["tokens_per_s"]), units.duration(stage["seconds"]),
            ]
        )  # fmt: skip
    headings = (
        "stage", "step, ms", "products", "memory traffic", "launches", "optimizer", "messages", "tokens/s", "time",
    )  # fmt: skip
    share = found["seconds"] / found["seconds_from_scratch"]
    scratch = f"The last model on all these tokens would take {units.duration(found['seconds_from_scratch'])}: "
    note = f"{scratch}this run takes {units.percent(share, 0)} of it. ZeRO-{record['zero']}, as the run asks."
    return section("Time", table(headings, rows), element("p", note, kind="note"))


def _bill(record: dict[str, Any]) -> Html | None:
    """What the forecast takes for given, and what follows for energy and price."""
    found = record.get("forecast")
    if found is None:
        return None
    lines = [found["assumed"]]
    if found["network_bytes_per_s"]:
        lines.append(f"Nodes are joined by {8 * found['network_bytes_per_s'] / 1e9:,.0f} Gbit/s for each GPU, one way.")
    if found["kwh"] is not None:
        lines.append(
            f"Energy: {found['gpu_hours']:,.1f} GPU-hours at the boards' limit of {found['watts']:,.0f} W; hosts, "
            "network and cooling are not in it."
        )
    if found["price"] is not None:
        rate = found["price"] / found["gpu_hours"]
        lines.append(f"Price: {found['gpu_hours']:,.1f} GPU-hours at {rate:,.2f} each, in the currency of that rate.")
    return section("What is assumed", element("ul", join(element("li", line) for line in lines)))


def _errors(record: dict[str, Any]) -> Html | None:
    """How far such forecasts were off where runs were measured."""
    found = record.get("forecast")
    if found is None:
        return None
    measured = ERRORS.get("here" if "machine" in found else "published")
    if measured is None:
        return None
    return section("How far off it may be", element("p", _said(measured, "machine" in found)))


def _said(error: dict[str, Any], here: bool) -> str:
    figures = f"{units.percent(error['mean'])} on the mean, {units.percent(error['worst'])} at the worst"
    if here:
        return (
            f"Seconds of a step, predicted by such a calibration and then measured, for {error['of']} stages of runs "
            f"on the machine of growth_ds's own record: {figures} ({error['source']})."
        )
    return (
        f"The same forecast beside {error['of']} published runs of BERT-Large on V100, A100 and H100, from one GPU to "
        f"thousands: {figures} ({error['source']}). None of its shares was fitted to them."
    )
