"""The layout table describes the module: every parameter, every size, every edge paid for once."""

from __future__ import annotations

import pytest

from growth_ds.axes import Axes, parse
from growth_ds.config import Model
from growth_ds.model import layout as layout_module
from growth_ds.model.bert import Bert
from growth_ds.model.layout import HEAD, LAYERS, check, check_edges, layout, parameter_shapes, sizes
from tests.growth.models import small

KINDS = [
    small(norm=norm, nsp=nsp, **more)
    for norm in ("post", "pre")
    for nsp in (False, True)
    for more in ({}, {"heads": 5}, {"layers": 6, "stored_layers": 3}, {"layers": 5, "thin_ffn": 4}, {"experts": 3})
]


def shapes_of(model: Model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in Bert(model).named_parameters()}


@pytest.mark.parametrize("model", KINDS)
def test_every_parameter_has_a_row_of_its_shape(model):
    check(model, shapes_of(model))
    assert parameter_shapes(model) == shapes_of(model)


def test_a_parameter_without_a_row_is_named():
    model = small()
    with pytest.raises(ValueError, match=r"no row for 'layers\.0\.gate\.weight'; add it to growth_ds/model/layout\.py"):
        check(model, {**shapes_of(model), "layers.0.gate.weight": (3, 3)})


def test_a_wrong_shape_is_named_with_both_shapes():
    model = small()
    with pytest.raises(ValueError, match=r"'head\.bias' has shape \(24,\), its layout row says \(23,\)"):
        check(model, {**shapes_of(model), "head.bias": (24,)})


def test_a_row_without_a_parameter_is_named():
    model = small()
    shapes = shapes_of(model)
    del shapes["layers.1.up.bias"]
    with pytest.raises(ValueError, match=r"no parameter 'layers\.1\.up\.bias'"):
        check(model, shapes)


EDGE_ERRORS = [
    # table, row, replacement, what the check says
    (HEAD, "head.norm.weight", "hidden", r"edge hidden -> embeddings.word.weight has 0 payers"),
    (HEAD, "head.norm.bias", "hidden", r"edge hidden -> embeddings.word.weight has 0 payers"),
    (LAYERS, "layers.{layer}.down.weight", "hidden ffn", r"edge ffn -> layers.\{layer\}.down.weight has 0 payers"),
    (LAYERS, "layers.{layer}.out.weight", "hidden (head head_size)", r"edge head -> layers.\{layer\}.out.weight has 0"),
    (LAYERS, "layers.{layer}.out.bias", "hidden/", r"'layers.\{layer\}.out.bias' splits axis hidden, but no edge"),
    (LAYERS, "layers.{layer}.up.bias", "ffn/", r"'layers.\{layer\}.up.bias' splits axis ffn, but no edge"),
]


@pytest.mark.parametrize(("table", "name", "row", "message"), EDGE_ERRORS)
def test_an_edge_without_a_payer_or_a_payer_without_an_edge_is_named(monkeypatch, table, name, row, message):
    check_edges(layout(small(nsp=True)))
    monkeypatch.setitem(table, name, row)
    with pytest.raises(ValueError, match=message):
        check_edges(layout(small(nsp=True)))


def test_an_edge_with_two_payers_is_named(monkeypatch):
    """Were the tied decoder split as well, the embedding would shrink."""
    monkeypatch.setitem(layout_module.EMBEDDINGS, "embeddings.word.weight", "vocab hidden/")
    with pytest.raises(ValueError, match=r"edge hidden -> embeddings\.word\.weight has 2 payers"):
        check_edges(layout(small()))


@pytest.mark.parametrize("axis", ["hidden", "head", "ffn"])
def test_every_summed_axis_of_a_matrix_is_an_edge(axis):
    """A matrix reads its last dimension; if that axis can be copied, somebody must pay. Embeddings are looked up."""
    for name, row in layout(small(nsp=True)).items():
        axes = parse(row)
        if len(axes.dims) == 2 and axis in axes.dims[-1] and not name.startswith("embeddings."):
            assert axes.split[-1], name


NOTATION = [
    # row, axes, shape for hidden 6, ffn 5, head 2, head_size 3
    ("hidden", Axes(("hidden",), (False,), (("hidden",),)), (6,)),
    ("ffn hidden/", Axes(("ffn", "hidden"), (False, True), (("ffn",), ("hidden",))), (5, 6)),
    (
        "hidden (head head_size)/",
        Axes(("hidden", "head", "head_size"), (False, True, True), (("hidden",), ("head", "head_size"))),
        (6, 6),
    ),
]


@pytest.mark.parametrize(("row", "axes", "shape"), NOTATION)
def test_the_notation(row, axes, shape):
    assert parse(row) == axes
    assert axes.shape({"hidden": 6, "ffn": 5, "head": 2, "head_size": 3}) == shape


@pytest.mark.parametrize("row", ["", "()", "hidden 3", "hid-den", "(head 3)/"])
def test_a_row_that_cannot_be_read_is_refused(row):
    with pytest.raises(ValueError, match="axis"):
        parse(row)


def test_sizes_name_every_axis_of_the_table():
    model = small(nsp=True)
    axes = {axis for row in layout(model).values() for axis in parse(row).names}
    assert axes <= set(sizes(model))
