from __future__ import annotations

import math

import pytest

from growth_ds.report.compare import compare, flops_to_reach, loss_at
from growth_ds.report.series import Curve, Growth, read_curve, smooth, thinned
from growth_ds.run_folder import RunFolder
from tests.report.runs import true_loss


def curve(points: list[tuple[float, float]]) -> Curve:
    return Curve("c", [], [{"flops": flops, "valid_loss": loss} for flops, loss in points], [])


def test_smoothing_keeps_a_line_and_a_constant() -> None:
    line = [10 - 0.25 * x for x in range(30)]
    assert smooth(line, 7) == pytest.approx(line)
    assert smooth([3.0] * 5, 3) == pytest.approx([3.0] * 5)


def test_smoothing_is_the_mean_inside() -> None:
    values = [0.0, 4.0, 1.0, 9.0, 2.0, 6.0]
    assert smooth(values, 3)[1:-1] == pytest.approx([sum(values[i - 1 : i + 2]) / 3 for i in range(1, 5)])
    assert smooth(values, 1) == pytest.approx(values)


def test_smoothing_leaves_out_what_is_not_finite() -> None:
    assert smooth([2.0, math.nan, 4.0], 3) == pytest.approx([2.0, 3.0, 4.0])
    assert all(math.isnan(value) for value in smooth([math.nan, math.inf], 3))
    assert smooth([], 3) == []


def test_a_stage_does_not_leak_into_the_next() -> None:
    train = [{"stage": step // 100, "loss": float(step // 100)} for step in range(200)]
    assert Curve("c", train, [], []).smoothed("loss") == pytest.approx([0.0] * 100 + [1.0] * 100)


def test_thinning_keeps_the_ends() -> None:
    x, y = thinned(list(range(1000)), list(range(1000)), points=10)
    assert (x[0], x[-1]) == (0, 999)
    assert 10 <= len(x) <= 11
    assert x == y
    assert thinned([1.0], [2.0]) == [[1.0], [2.0]]


def test_growths_lie_where_they_happened(grown: RunFolder) -> None:
    found = read_curve("grown", grown)
    assert [growth.at["step"] for growth in found.growths] == [20, 40]
    assert [growth.at["tokens"] for growth in found.growths] == [20480, 40960]
    assert [growth.label() for growth in found.growths] == ["layer 2→4, ffn 128→256", "hidden 64→128, head 2→4 +2"]
    assert isinstance(found.growths[0], Growth)


def test_equal_compute_by_hand() -> None:
    grown, scratch = curve([(1, 8.0), (2, 6.0), (4, 5.0)]), curve([(2, 7.0), (6, 5.0), (8, 5.5)])
    found = compare(grown, scratch)
    assert found is not None
    assert (found.flops, found.loss, found.other_loss) == (4, 5.0, 6.0)
    assert found.difference == pytest.approx(1.0)
    assert found.share_to_match == pytest.approx(3 / 8)  # 5.5 nats lie half way between 6.0 and 5.0


def test_equal_compute_when_growing_loses() -> None:
    found = compare(curve([(1, 8.0), (4, 7.0)]), curve([(1, 7.5), (4, 6.0)]))
    assert found is not None
    assert found.difference == pytest.approx(-1.0)
    assert found.share_to_match is None


def test_no_validation_no_comparison() -> None:
    assert compare(curve([]), curve([(1, 7.0)])) is None
    late = compare(curve([(1, 7.0)]), curve([(5, 6.0)]))
    assert late is not None
    assert (late.loss, late.other_loss, late.difference) == (7.0, None, None)


def test_validations_on_rows_of_another_length_are_left_out() -> None:
    def of_lengths(*points: tuple[float, float, int]) -> Curve:
        return Curve("c", [], [{"flops": f, "valid_loss": loss, "valid_length": n} for f, loss, n in points], [])

    grown, scratch = of_lengths((1, 3.0, 64), (2, 8.0, 128), (4, 6.0, 128)), of_lengths((2, 7.0, 128), (4, 7.0, 128))
    found = compare(grown, scratch)
    assert found is not None
    assert found.share_to_match == pytest.approx(3 / 4)  # not at the 64-token validation
    assert compare(grown, of_lengths((4, 7.0, 512))) is None


def test_between_points() -> None:
    points = [(1.0, 8.0), (2.0, 6.0), (4.0, 7.0)]
    assert [loss_at(points, flops) for flops in (0.5, 1, 1.5, 3, 4, 4.5)] == [None, 8.0, 7.0, 6.5, 7.0, None]
    assert [flops_to_reach(points, loss) for loss in (9, 7, 6, 5)] == [1.0, 1.5, 2.0, None]


def test_of_real_folders(grown: RunFolder, control: RunFolder) -> None:
    found = compare(read_curve("a", grown), read_curve("b", control))
    assert found is not None
    assert found.loss == pytest.approx(true_loss(found.flops))
    assert found.other_loss == pytest.approx(true_loss(found.flops, 4.7), abs=0.02)
