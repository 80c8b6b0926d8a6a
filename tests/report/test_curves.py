from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from growth_ds.report.curves import PANELS, loss_limits, loss_svg, optim_svg, panel_svg, save_png, scale
from growth_ds.report.series import Curve, read_curve
from growth_ds.run_folder import RunFolder
from tests.report.runs import ENTROPY


@pytest.fixture(scope="module")
def curves(grown: RunFolder, control: RunFolder) -> list[Curve]:
    return [read_curve("grown", grown), read_curve("from $scratch$ <x>", control)]


@pytest.fixture(scope="module")
def svg(curves: list[Curve]) -> str:
    return loss_svg(curves, ENTROPY)


def ids(svg: str, pattern: str) -> list[str]:
    return re.findall(rf'id="({pattern})"', svg)


def test_every_curve_and_growth_is_drawn_in_every_panel(svg: str) -> None:
    for key in PANELS:
        assert ids(svg, rf"loss-{key}-train-\d") == [f"loss-{key}-train-0", f"loss-{key}-train-1"]
        assert ids(svg, rf"loss-{key}-raw-\d") == [f"loss-{key}-raw-0", f"loss-{key}-raw-1"]
        assert ids(svg, rf"loss-{key}-growth-\d-\d") == [f"loss-{key}-growth-0-0", f"loss-{key}-growth-0-1"]
        assert ids(svg, rf"loss-{key}-entropy") == [f"loss-{key}-entropy"]
    assert svg.count("layer 2→4, ffn 128→256") == 3


def test_validation_points_are_all_there(curves: list[Curve], svg: str) -> None:
    root = ElementTree.fromstring(svg)
    for number, curve in enumerate(curves):
        wanted = {f"loss-{key}-valid-{number}" for key in PANELS}
        groups = [group for group in root.iter() if group.get("id") in wanted]
        markers = [mark for group in groups for mark in group.iter() if mark.tag.endswith("}use")]
        assert len(markers) == 3 * len(curve.valid)


def test_text_is_text_and_names_are_names(svg: str) -> None:
    assert "from $scratch$ &lt;x&gt;" in svg
    assert "tokens seen (thousands)" in svg
    assert "training compute (10⁹ FLOPs)" in svg
    assert f"unigram entropy {ENTROPY:.2f}" in svg
    assert "<metadata" not in svg


def test_svg_is_deterministic_and_refers_to_nothing(curves: list[Curve], svg: str) -> None:
    assert loss_svg(curves, ENTROPY) == svg
    assert all(ref.startswith("#loss-") for ref in re.findall(r'href="([^"]*)"', svg))
    assert "url(#loss-" in svg
    assert not re.search(r"url\((?!#loss-)", svg)


def test_colours_are_variables_with_a_fallback(svg: str) -> None:
    assert "var(--run0, #0072b2)" in svg
    assert "var(--run1, #d55e00)" in svg
    assert not re.search(r"(?<!, )#(?:0072b2|d55e00|1f2430|5b6475|9aa3b2|e3e7ee)", svg)


@pytest.mark.parametrize("key", PANELS)
def test_one_panel(curves: list[Curve], key: str) -> None:
    svg = panel_svg(curves[:1], key)
    assert ids(svg, rf"{key}-train-\d") == [f"{key}-train-0"]
    assert "entropy" not in svg


def test_optimizer_panel(curves: list[Curve]) -> None:
    svg = optim_svg(curves)
    assert ids(svg, r"optim-(?:lr|grad)-\d") == ["optim-lr-0", "optim-lr-1", "optim-grad-0", "optim-grad-1"]
    assert "learning rate (10⁻⁴)" in svg or "learning rate (10⁻³)" in svg


def test_loss_axis_leaves_the_steep_start_out(curves: list[Curve]) -> None:
    losses = [8.0] + [3.0 - step / 1000 for step in range(1, 1000)]
    train = [{"step": i + 1, "stage": 0, "loss": loss, "flops": i + 1} for i, loss in enumerate(losses)]
    falling = Curve("c", train, [], [])
    low, high = loss_limits([falling], None)
    assert low < 2.001
    assert 2.95 < high < 3.3
    assert loss_limits([falling], 3.5)[1] > 3.5
    assert loss_limits([falling], 7.0) == (low, high)


@pytest.mark.parametrize(("entropy", "note"), [(40.0, "unigram entropy 40.00 ↑"), (0.5, "unigram entropy 0.50 ↓")])
def test_a_far_entropy_is_noted_at_the_edge(grown: RunFolder, entropy: float, note: str) -> None:
    svg = panel_svg([read_curve("grown", grown)], "flops", entropy)
    assert note in svg
    assert not ids(svg, "flops-entropy")


def test_a_diverged_run_is_drawn(grown: RunFolder) -> None:
    curve = read_curve("grown", grown)
    for record in curve.train[5:]:
        record["loss"] = record["grad_norm"] = float("nan")
    for record in curve.train:
        record["lr"] = float("nan")
    assert "flops-train-0" in panel_svg([curve], "flops")
    assert "optim-grad-0" in optim_svg([curve])


SCALES = [
    ("flops", 4.2e15, 1e15, "training compute (10¹⁵ FLOPs)"),
    ("flops", 9.9e14, 1e12, "training compute (10¹² FLOPs)"),
    ("tokens", 3e9, 1e9, "tokens seen (billions)"),
    ("tokens", 12.0, 1.0, "tokens seen"),
    ("seconds", 90.0, 1.0, "training time (seconds)"),
    ("seconds", 200.0, 60.0, "training time (minutes)"),
    ("seconds", 1e5, 3600.0, "training time (hours)"),
]


@pytest.mark.parametrize(("key", "largest", "divisor", "label"), SCALES)
def test_scales(key: str, largest: float, divisor: float, label: str) -> None:
    assert scale(key, largest) == (divisor, label)


def test_png(tmp_path: Path, curves: list[Curve]) -> None:
    save_png(tmp_path / "loss.png", curves, ENTROPY, dpi=40)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
