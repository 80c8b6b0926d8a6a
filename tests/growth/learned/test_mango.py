"""Mango against its tensor-ring equation, written out piece by piece; what its cores are at the start."""

from __future__ import annotations

import pytest
import torch
from torch import einsum

from growth_ds.growth.learned.mango import Mango
from growth_ds.growth.learned.operator import flops_of, unstacked
from growth_ds.model.layout import layout, parameter_shapes, sizes
from tests.growth.learned.cases import randomised, tables_of
from tests.growth.models import changed, small

OLD = small(nsp=True, ffn=24)
GROWTHS = [
    {"layers": 5, "hidden": 20, "heads": 5, "ffn": 40},
    {"layers": 3},
    {"hidden": 16, "heads": 4, "ffn": 64},
    {"layers": 3, "ffn": 72},
]
NEW = changed(OLD, **GROWTHS[0])


def name(part):
    return f"layers.{{layer}}.{part}"


def pieces(model, tables):
    """[piece, layer, output, input]: query, key, value, out, then up by rows and down by columns."""
    h, count = model.hidden, model.ffn // model.hidden
    qkv, up, down = (tables[name(f"{each}.weight")] for each in ("qkv", "up", "down"))
    found = [qkv[:, j * h : (j + 1) * h] for j in range(3)] + [tables[name("out.weight")]]
    found += [up[:, j * h : (j + 1) * h] for j in range(count)]
    found += [down[:, :, j * h : (j + 1) * h] for j in range(count)]
    return torch.stack(found)


@pytest.mark.parametrize("change", GROWTHS)
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_every_weight_is_that_of_the_ring(change, rank, norm):
    old = changed(OLD, norm=norm)
    new, tables = changed(old, **change), tables_of(old)
    mango = randomised(Mango(old, new, rank))
    b, o, l, i = (mango.mixed, mango.made, mango.depth, mango.read)  # noqa: E741 (the letters of the equation)
    with torch.no_grad():
        found = mango(tables)
        whole = einsum("pbcq,qoxr,rlys,sizp,bloi->cyxz", b, o, l, i, pieces(old, tables))
        outputs, both = einsum("qoxq->xo", o), einsum("qoxr,rlyq->xyol", o, l)
        square, inputs = einsum("qoxr,rizq->xzoi", o, i), einsum("riyr->yi", i)
    wanted = {name(f"{norm}.{part}"): both for norm in ("attention_norm", "ffn_norm") for part in ("weight", "bias")}
    wanted |= {name("out.bias"): both, name("down.bias"): both}
    near = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(pieces(new, found), whole, **near)
    for pattern, ring in wanted.items():
        torch.testing.assert_close(found[pattern], einsum("xyol,lo->yx", ring, tables[pattern]), **near)
    for pattern, count in ((name("qkv.bias"), 3), (name("up.bias"), new.ffn // new.hidden)):
        for piece in range(count):
            source = piece % (tables[pattern].shape[1] // old.hidden)
            part = tables[pattern][:, source * old.hidden : (source + 1) * old.hidden]
            grown = found[pattern][:, piece * new.hidden : (piece + 1) * new.hidden]
            torch.testing.assert_close(grown, einsum("xyol,lo->yx", both, part), **near)
    alone = {pattern: table for pattern, table in tables.items() if "{layer}" not in pattern}
    for pattern, table in alone.items():
        if pattern in ("head.bias", "nsp.bias"):
            made = table
        elif pattern == "nsp.weight":
            made = table @ inputs.T
        elif table.shape == (old.hidden, old.hidden):
            made = einsum("xzoi,oi->xz", square, table)
        else:
            made = table @ outputs.T
        torch.testing.assert_close(found[pattern], made, **near, msg=lambda text, pattern=pattern: f"{pattern}: {text}")
    shapes = {key: tuple(each.shape) for key, each in unstacked(layout(new), sizes(new), found).items()}
    assert shapes == parameter_shapes(new)


def test_the_start_is_a_noisy_stack_of_widened_layers():
    mango = Mango(OLD, NEW, 2).double().draw(3)
    cores = {key: core.detach() for key, core in mango.named_parameters()}
    assert {key: tuple(core.shape) for key, core in cores.items()} == {
        "mixed": (2, 8, 8, 2),
        "made": (2, 12, 20, 2),
        "depth": (2, 2, 5, 2),
        "read": (2, 12, 20, 2),
    }
    assert torch.equal(cores["mixed"][0, :, :, 0], torch.eye(8, dtype=torch.float64))
    assert torch.equal(cores["made"][0, :, :, 0], cores["read"][0, :, :, 0])
    made, depth = cores["made"][0, :, :, 0].T, cores["depth"][0, :, :, 0].T
    assert torch.equal(made[:12], torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(made.sum(-1), torch.ones(20, dtype=torch.float64), rtol=0.0, atol=1e-14)
    torch.testing.assert_close(depth.sum(-1), torch.ones(5, dtype=torch.float64), rtol=0.0, atol=1e-14)
    assert depth.argmax(-1).tolist() == [0, 1, 0, 1, 0]
    assert float(depth.max(-1).values.min()) >= 1 / 1.03
    for core in cores.values():
        others = torch.stack([core[0, :, :, 1], core[1, :, :, 0], core[1, :, :, 1]])
        assert 0 < float(others.abs().max()) <= 0.1 / core.shape[1]
        assert bool((others != 0).all())


def test_more_pieces_of_an_ffn_share_what_reads_them():
    new = changed(OLD, ffn=48)
    grown = Mango(OLD, new).double().draw(0)(tables_of(OLD))
    tables = tables_of(OLD)
    for part, old in (("up.weight", tables[name("up.weight")]), ("up.bias", tables[name("up.bias")])):
        torch.testing.assert_close(grown[name(part)], torch.cat([old, old], 1), rtol=0.0, atol=1e-15)
    down = tables[name("down.weight")] / 2
    torch.testing.assert_close(grown[name("down.weight")], torch.cat([down, down], 2), rtol=0.0, atol=1e-15)
    # nothing else grows: it stays
    for pattern, table in tables.items():
        if "up" not in pattern and "down" not in pattern:
            torch.testing.assert_close(grown[pattern], table, rtol=0.0, atol=1e-15)


@pytest.mark.parametrize("rank", [1, 2])
def test_only_the_cores_have_a_gradient(rank):
    tables = tables_of(OLD)
    mango = Mango(OLD, NEW, rank).double().draw(1)
    sum(table.square().sum() for table in mango(tables).values()).backward()
    for key, core in mango.named_parameters():
        assert bool((core.grad != 0).all()), key
    assert not any(table.requires_grad for table in tables.values())


@pytest.mark.parametrize("rank", [1, 2])
def test_flops_are_those_of_the_ring(rank):
    """2mnk for each product, once more for each gradient: the first has one, of the core alone."""
    old = small(nsp=False, ffn=24)
    new = changed(old, **GROWTHS[0])
    found = flops_of(Mango, layout(new), sizes(old), old, new, rank)
    b, bb, h, hh, layers, now = 8, 8, 12, 20, 2, 5
    ring = 2 * rank**2 * b * bb * layers * h * h * 2
    ring += 2 * rank**3 * bb * layers * h * hh * h * 3
    ring += 2 * rank**3 * bb * layers * now * hh * h * 3
    ring += 2 * rank**2 * bb * now * hh * h * hh * 3
    vectors = 3 + 2 + 2 + 4  # of hidden each
    rest = 2 * rank**2 * vectors * layers * h * hh * 2 + 2 * rank**2 * vectors * layers * now * hh * 3
    tables = (23 + 9 + 2 + 2 + 3) * h * hh  # and norms and vectors of the head
    rest += 2 * rank * tables * 2 + 2 * rank**2 * h * h * hh * 2 + 2 * rank**2 * hh * h * hh * 3
    assert found == pytest.approx(ring + rest, rel=0.03)
