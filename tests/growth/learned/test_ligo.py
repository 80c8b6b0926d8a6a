"""LiGO against its published equations, written out with whole matrices; what its numbers are at the start."""

from __future__ import annotations

import pytest
import torch
from torch import einsum

from growth_ds.growth.learned.ligo import KINDS, Ligo
from growth_ds.growth.learned.operator import flops_of, unstacked
from growth_ds.model.bert import Bert
from growth_ds.model.layout import layout, parameter_shapes, sizes
from tests.growth.learned.cases import randomised, tables_of
from tests.growth.models import changed, small

EXACT = {"rtol": 0.0, "atol": 1e-12}
OLD = small(nsp=True)
GROWTHS = [
    {"layers": 5, "hidden": 17, "heads": 5, "ffn": 13},
    {"hidden": 17},
    {"layers": 3},
    {"heads": 4, "ffn": 11},
    {"layers": 2, "hidden": 24, "heads": 6, "ffn": 20},
]


def taller(mix, old):
    """[I; M] of one matrix or of one for each layer."""
    eye = torch.eye(old, dtype=torch.float64)
    if mix is None:
        return eye
    return torch.cat([eye.expand(*mix.shape[:-2], old, old), mix], dim=-2)


class Published:
    """Whole matrices: B of the stream and the transform, those of each new layer, and the depth mixes."""

    def __init__(self, ligo, old, new):
        layers, inner = new.layers, old.heads * old.head_size
        self.stream, self.head = taller(ligo.hidden, old.hidden), taller(ligo.transform, old.hidden)
        self.q, self.k, self.v = (
            taller(None if ligo.heads is None else ligo.heads[:, j], inner).expand(layers, -1, -1) for j in range(3)
        )
        self.ffn = taller(ligo.ffn, old.ffn).expand(layers, -1, -1)
        self.depth = dict.fromkeys(KINDS, torch.eye(layers, dtype=torch.float64))
        if ligo.depth is not None:
            self.depth = dict(zip(KINDS, ligo.depth, strict=True))

    def matrix(self, kind, table, made, read):
        """made W read^T with W = sum_s depth[l, s] W_s; made, read [layers, new, old] or one for all layers."""
        made, read = (each if each.ndim == 3 else each[None].expand(self.ffn.shape[0], -1, -1) for each in (made, read))
        return einsum("ls,sab,lxa,lyb->lxy", self.depth[f"{kind}.weight"], table, made, read)

    def vector(self, kind, table, made, part="bias"):
        made = made if made.ndim == 3 else made[None].expand(self.ffn.shape[0], -1, -1)
        return einsum("ls,sa,lxa->lx", self.depth[f"{kind}.{part}"], table, made)

    def grown(self, small):
        t, e, h = (lambda name: small[f"layers.{{layer}}.{name}"]), self.stream, self.head
        inner = self.q.shape[-1]
        found = {}
        for name in ("query", "key", "value"):
            j, made = {"query": (0, self.q), "key": (1, self.k), "value": (2, self.v)}[name]
            found[name] = self.matrix(name, t("qkv.weight")[:, j * inner : (j + 1) * inner], made, e)
            found[name + ".b"] = self.vector(name, t("qkv.bias")[:, j * inner : (j + 1) * inner], made)
        result = {
            "qkv.weight": torch.cat([found["query"], found["key"], found["value"]], 1),
            "qkv.bias": torch.cat([found["query.b"], found["key.b"], found["value.b"]], 1),
            "out.weight": self.matrix("out", t("out.weight"), e, self.v),
            "out.bias": self.vector("out", t("out.bias"), e),
            "up.weight": self.matrix("up", t("up.weight"), self.ffn, e),
            "up.bias": self.vector("up", t("up.bias"), self.ffn),
            "down.weight": self.matrix("down", t("down.weight"), e, self.ffn),
            "down.bias": self.vector("down", t("down.bias"), e),
        }
        for norm in ("attention_norm", "ffn_norm"):
            for part in ("weight", "bias"):
                result[f"{norm}.{part}"] = self.vector(norm, t(f"{norm}.{part}"), e, part)
        result = {f"layers.{{layer}}.{name}": table for name, table in result.items()}
        for name in ("word", "position", "segment"):
            result[f"embeddings.{name}.weight"] = small[f"embeddings.{name}.weight"] @ e.T
        for name in ("embeddings.norm", "norm"):
            if f"{name}.bias" in small:
                result |= {f"{name}.{part}": e @ small[f"{name}.{part}"] for part in ("weight", "bias")}
        result["head.dense.weight"] = h @ small["head.dense.weight"] @ e.T
        for name in ("head.dense.bias", "head.norm.weight", "head.norm.bias"):
            result[name] = h @ small[name]
        result["pooler.weight"] = e @ small["pooler.weight"] @ e.T
        result["pooler.bias"] = e @ small["pooler.bias"]
        result["nsp.weight"] = small["nsp.weight"] @ e.T
        return result | {name: small[name] for name in ("head.bias", "nsp.bias")}


@pytest.mark.parametrize("change", GROWTHS)
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_every_weight_is_that_of_the_equations(change, norm):
    old = changed(OLD, norm=norm)
    new, small_tables = changed(old, **change), tables_of(old)
    ligo = randomised(Ligo(old, new))
    with torch.no_grad():
        found, wanted = ligo(small_tables), Published(ligo, old, new).grown(small_tables)
    assert set(found) == set(wanted) == set(layout(new))
    for name, table in wanted.items():
        torch.testing.assert_close(found[name], table, **EXACT, msg=lambda text, name=name: f"{name}: {text}")
    shapes = {name: tuple(each.shape) for name, each in unstacked(layout(new), sizes(new), found).items()}
    assert shapes == parameter_shapes(new)
    assert shapes == {name: tuple(each.shape) for name, each in Bert(new).named_parameters()}


def test_the_start_is_the_published_one():
    new = changed(OLD, layers=5, hidden=17, heads=5, ffn=13)
    ligo = Ligo(OLD, new).double().draw(3)
    for name in ("hidden", "transform", "heads", "ffn"):
        mix = getattr(ligo, name).detach()
        torch.testing.assert_close(mix.sum(-1), torch.ones_like(mix[..., 0]), rtol=0.0, atol=1e-14)
        assert 0 <= float(mix.min()) < float(mix.max()) < 1
    depth = ligo.depth.detach()
    assert depth.shape == (16, 5, 2)
    torch.testing.assert_close(depth.sum(-1), torch.ones(16, 5, dtype=torch.float64), rtol=0.0, atol=1e-14)
    hot = torch.arange(5) % 2
    own = depth.gather(2, hot.expand(16, 5)[..., None])[..., 0]
    other = 1.0 - own
    # (1 + u) / (1 + u + v) and v / (1 + u + v), u and v uniform from 0 to 0.03
    assert float(own.min()) >= 1 / 1.03
    assert float((other / own).max()) <= 0.03
    assert float((other / own).mean()) == pytest.approx(0.015, abs=0.003)
    assert len(set(other.flatten().tolist())) == 80, "coefficients of its own for every module type, and its bias"


def test_the_start_follows_the_seed_alone():
    new = changed(OLD, layers=5, hidden=17, heads=5, ffn=13)
    one, two, other = (Ligo(OLD, new).draw(seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], two[name]) and not torch.equal(one[name], other[name]) for name in one)
    assert set(one) == {"depth", "hidden", "transform", "heads", "ffn"}


def test_old_units_stay_to_the_bit():
    """In width; the depth mix of a model that does not get deeper is no mix."""
    new, small_tables = changed(OLD, hidden=17, heads=5, ffn=13), tables_of(OLD)
    grown = Ligo(OLD, new).double().draw(0)(small_tables)
    for name, table in small_tables.items():
        if name.startswith("layers.{layer}.qkv"):
            inner = (OLD.heads * OLD.head_size, new.heads * new.head_size)
            old, now = table.unflatten(1, (3, inner[0])), grown[name].unflatten(1, (3, inner[1]))
        else:
            old, now = table, grown[name]
        assert torch.equal(now[tuple(slice(size) for size in old.shape)], old), name


def test_only_the_operator_has_a_gradient():
    new, small_tables = changed(OLD, layers=5, hidden=17, heads=5, ffn=13), tables_of(OLD)
    ligo = randomised(Ligo(OLD, new))
    loss = sum(table.square().sum() for table in ligo(small_tables).values())
    loss.backward()
    for name, parameter in ligo.named_parameters():
        assert parameter.grad is not None
        assert bool((parameter.grad != 0).all()), name
    assert not any(table.requires_grad for table in small_tables.values())
    assert sum(each.numel() for each in ligo.parameters()) == 16 * 5 * 2 + 2 * 5 * 12 + 5 * 3 * 8 * 12 + 5 * 3 * 10


def test_flops_are_those_of_the_products():
    """Layers 2 -> 4, width 12 -> 17: 2mnk for each product, once more for each gradient that is asked for."""
    old = small(nsp=False)
    new = changed(old, layers=4, hidden=17, heads=4, ffn=13)
    found = flops_of(Ligo, layout(new), sizes(old), old, new, 1)
    h, i, f, extra = 12, 12, 10, {"h": 5, "i": 4, "f": 3}
    each = 4 * h * i + 2 * h * f + 3 * i + h + f + h + 4 * h  # weights and biases of one old layer
    depth = 2 * (2 * 4 * 2 * each)  # forward, and the gradient of the mix
    wide = {"h": h + extra["h"], "i": i + extra["i"], "f": f + extra["f"]}
    layers = 3 * (extra["i"] * i * h + wide["i"] * h * extra["h"])  # q, k, v
    layers += extra["h"] * h * i + wide["h"] * i * extra["i"]  # out
    layers += extra["f"] * f * h + wide["f"] * h * extra["h"]  # up
    layers += extra["h"] * h * f + wide["h"] * f * extra["f"]  # down
    layers += 3 * extra["i"] * i + extra["f"] * f + 6 * extra["h"] * h  # biases and norms
    alone = (23 + 9 + 2) * h * extra["h"] + 2 * extra["h"] * h  # tables and norm: the small model has no gradient
    alone += 3 * extra["h"] * h + extra["h"] * h * h  # the head's vectors, the rows of its transform
    both = wide["h"] * h * extra["h"]  # its columns: the rows before them have a gradient
    wanted = depth + 2 * (4 * 3 * layers + 2 * alone + 3 * both)
    assert found == pytest.approx(wanted, rel=0.01)
