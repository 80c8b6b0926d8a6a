"""The forward pass against a plain re-statement of it, and what must not depend on what."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from growth_ds.config import Model
from growth_ds.model.bert import RAMPS, Bert
from growth_ds.model.blocks import Norm
from growth_ds.ops import library
from tests.growth.models import Rows, delta, random_bert, rows, small

KINDS = [
    small(nsp=True),
    small(norm="pre", nsp=True, activation="relu"),
    small(heads=5, activation="gelu_new"),
    small(layers=6, stored_layers=2, nsp=True),
]


def no_ramp(model: Model) -> dict[str, Tensor]:
    """Every key of a ramp at the value that changes nothing."""
    hidden = ("norm", "head.norm", "hidden")
    sizes = {**dict.fromkeys(hidden, model.hidden), "ffn": model.ffn, "head": model.heads, "gate": model.layers}
    return {key: torch.ones(size) for key, size in sizes.items()}


def random_ramp(model: Model, seed: int = 7) -> dict[str, Tensor]:
    """Random scalars for every key, exact zeros and ones among them."""
    generator = torch.Generator().manual_seed(seed)
    ramp = {key: torch.rand(tensor.shape, generator=generator) for key, tensor in no_ramp(model).items()}
    for key in ("norm", "hidden", "ffn"):
        ramp[key][0], ramp[key][1] = 0.0, 1.0
    return ramp


def reference_norm(bert: Bert, x: Tensor, name: str, ramp: dict[str, Tensor]) -> Tensor:
    """A norm by its formula; `ramp` has all keys."""
    weights, share = dict(bert.named_parameters()), ramp["head.norm" if name == "head.norm" else "norm"].double()
    mean = (x * share).sum(-1, keepdim=True) / share.sum()
    variance = ((x - mean) ** 2 * share).sum(-1, keepdim=True) / share.sum()
    x = (x - mean) / (variance + bert.model.norm_eps).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]
    return x * ramp["hidden"]


def reference(
    bert: Bert, ids: Tensor, segments: Tensor, mask: Tensor | None, ramp: dict[str, Tensor] | None = None
) -> Tensor:
    """Hidden states by explicit softmax attention, one head at a time, from the weights (and the ramp) alone."""
    model, weights = bert.model, dict(bert.named_parameters())
    ramp = no_ramp(model) | (ramp or {})

    def norm(x: Tensor, name: str) -> Tensor:
        return reference_norm(bert, x, name, ramp)

    def activation(x: Tensor) -> Tensor:
        if model.activation == "relu":
            return x.clamp(min=0)
        if model.activation == "gelu":
            return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def attention(x: Tensor, layer: str) -> Tensor:
        q, k, v = (x @ weights[f"{layer}.qkv.weight"].T + weights[f"{layer}.qkv.bias"]).chunk(3, -1)
        mixed = []
        for head in range(model.heads):
            part = slice(head * model.head_size, (head + 1) * model.head_size)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(model.head_size)
            if mask is not None:
                scores = scores.masked_fill(~mask[:, None, :], -math.inf)
            mixed.append(scores.softmax(-1) @ v[..., part] * ramp["head"][head])
        return torch.cat(mixed, -1) @ weights[f"{layer}.out.weight"].T + weights[f"{layer}.out.bias"]

    def feed_forward(x: Tensor, layer: str) -> Tensor:
        x = activation(x @ weights[f"{layer}.up.weight"].T + weights[f"{layer}.up.bias"]) * ramp["ffn"]
        return x @ weights[f"{layer}.down.weight"].T + weights[f"{layer}.down.bias"]

    table = [weights[f"embeddings.{name}.weight"] for name in ("word", "position", "segment")]
    x = table[0][ids] + table[1][: ids.shape[1]] + table[2][segments]
    x = norm(x, "embeddings.norm") if model.norm == "post" else x
    for depth in range(model.layers):
        layer, before = f"layers.{depth % model.stored_layers}", x
        if model.norm == "post":
            x = norm(x + attention(x, layer), f"{layer}.attention_norm")
            x = norm(x + feed_forward(x, layer), f"{layer}.ffn_norm")
        else:
            x = x + attention(norm(x, f"{layer}.attention_norm"), layer)
            x = x + feed_forward(norm(x, f"{layer}.ffn_norm"), layer)
        x = (1 - ramp["gate"][depth]) * before + ramp["gate"][depth] * x
    return x if model.norm == "post" else norm(x, "norm")


@pytest.mark.parametrize("model", KINDS)
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_encode_equals_the_reference(model, padded):
    bert = random_bert(model, seed=2)
    batch = rows(model, seed=3, padded=padded)
    expected = reference(bert, batch.ids, batch.segments, batch.attention_mask)
    actual = bert.encode(batch.ids, batch.segments, batch.attention_mask)
    kept = batch.attention_mask if padded else torch.ones_like(batch.ids, dtype=torch.bool)
    assert float((actual - expected)[kept].abs().max()) < 1e-12


def test_shared_layers_run_in_a_cycle():
    assert Bert(small(layers=6, stored_layers=2)).layer_order == [0, 1, 0, 1, 0, 1]
    assert Bert(small(layers=3)).layer_order == [0, 1, 2]


@pytest.mark.parametrize("model", KINDS)
@torch.no_grad()
def test_sums_equal_torch_on_the_full_logits(model):
    bert = random_bert(model, seed=4)
    batch = rows(model, seed=5)
    batch.labels[0] = -100  # a position that is read but not asked for
    mlm, nsp = bert.predict(batch.ids, batch.segments, batch.attention_mask)
    at = mlm.flatten(0, 1)[batch.positions]
    sums = bert(batch)
    expected = F.cross_entropy(at, batch.labels, reduction="sum", ignore_index=-100)
    torch.testing.assert_close(sums["mlm"], expected, rtol=1e-6, atol=0.0)
    assert int(sums["mlm_correct"]) == int((at.argmax(-1) == batch.labels).sum())
    if model.nsp:
        expected = F.cross_entropy(nsp.float(), batch.nsp_labels, reduction="sum")
        torch.testing.assert_close(sums["nsp"], expected, rtol=1e-6, atol=0.0)
    else:
        assert nsp is None
        assert "nsp" not in sums
    bert.train()
    assert "mlm_correct" not in bert(batch), "training does not pay for the argmax"


@torch.no_grad()
def test_the_head_on_masked_positions_equals_the_head_everywhere():
    bert = random_bert(small())
    hidden = torch.randn(3, 8, 12, dtype=torch.float64)
    positions = torch.tensor([0, 5, 9, 23])
    everywhere = bert.head(hidden, bert.embeddings.word.weight).flatten(0, 1)[positions]
    only = bert.head(hidden.flatten(0, 1)[positions], bert.embeddings.word.weight)
    torch.testing.assert_close(only, everywhere, rtol=1e-14, atol=1e-14)


@torch.no_grad()
def test_padding_changes_nothing_for_the_real_tokens():
    bert = random_bert(small(nsp=True))
    batch = rows(bert.model, count=1, length=8)
    short = bert.predict(batch.ids[:, :5], batch.segments[:, :5])
    mask = torch.arange(8)[None] < 5
    long = bert.predict(batch.ids, batch.segments, mask)
    other = batch.ids.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 23
    assert float((short[0] - long[0][:, :5]).abs().max()) < 1e-12
    assert float((short[1] - long[1]).abs().max()) < 1e-12
    assert torch.equal(bert.predict(other, batch.segments, mask)[0][:, :5], long[0][:, :5])
    unmasked = bert.predict(batch.ids, batch.segments)
    assert float((short[0] - unmasked[0][:, :5]).abs().max()) > 1e-3, "without the mask the padding is seen"


@pytest.mark.parametrize("asked", [False, True])
def test_no_layer_computes_padding(asked):
    bert = random_bert(small(layers=3))
    batch, seen = rows(bert.model, count=3, length=8), []
    for layer in bert.layers:
        layer.up.register_forward_hook(lambda module, inputs, output: seen.append(tuple(inputs[0].shape[:2])))
    real = int(batch.attention_mask.sum())
    assert real == 8 + 7 + 6
    hidden = bert.encode(batch.ids, batch.segments, batch.attention_mask, torch.ones(3, 2).long() if asked else None)
    assert seen == [(1, real), (1, real), (1, 3 * 2 if asked else real)]
    assert hidden.shape[:2] == ((3, 2) if asked else (3, 8))
    if not asked:
        assert not hidden[~batch.attention_mask].any()


def test_gradient_of_a_row_is_that_of_the_reference_loss():
    bert = random_bert(small(nsp=True))
    batch = rows(bert.model)
    hidden = reference(bert, batch.ids, batch.segments, batch.attention_mask)
    head = bert.head(hidden.flatten(0, 1)[batch.positions], bert.embeddings.word.weight)
    expected = F.cross_entropy(head, batch.labels, reduction="sum")
    expected = expected + F.cross_entropy(bert.next_sentence(hidden[:, 0]), batch.nsp_labels, reduction="sum")
    wanted = torch.autograd.grad(expected, list(bert.parameters()))
    sums = bert(batch)
    actual = torch.autograd.grad(sums["mlm"] + sums["nsp"], list(bert.parameters()))
    for (name, _), one, two in zip(bert.named_parameters(), wanted, actual, strict=True):
        # forward takes the loss in fp32, the reference in fp64
        assert float((one - two).abs().max()) < 1e-5 * max(1.0, float(one.abs().max())), name


def test_dropout_acts_in_training_only():
    bert = random_bert(small(dropout=0.5, attention_dropout=0.5))
    batch = rows(bert.model, padded=False)
    assert torch.equal(bert.encode(batch.ids, batch.segments), bert.encode(batch.ids, batch.segments))
    bert.train()
    assert not torch.equal(bert.encode(batch.ids, batch.segments), bert.encode(batch.ids, batch.segments))


def test_parameters_used_outside_their_module_exist():
    bert = Bert(small(nsp=True))
    names = dict(bert.named_parameters())
    for module, used in Bert.external_parameters.items():
        assert bert.get_submodule(module) is not None
        assert all(name in names and not name.startswith(f"{module}.") for name in used)


def reference_loss(bert: Bert, batch: Rows, ramp: dict[str, Tensor]) -> Tensor:
    """MLM and, where there is a head, NSP loss of a forward with all keys of a ramp."""
    weights = dict(bert.named_parameters())
    hidden = reference(bert, batch.ids, batch.segments, batch.attention_mask, ramp)
    x = hidden.flatten(0, 1)[batch.positions] @ weights["head.dense.weight"].T + weights["head.dense.bias"]
    x = x.clamp(min=0) if bert.model.activation == "relu" else F.gelu(x, approximate=gelu_kind(bert))
    x = reference_norm(bert, x, "head.norm", ramp)
    logits = x @ weights["embeddings.word.weight"].T + weights["head.bias"]
    total = F.cross_entropy(logits, batch.labels, reduction="sum")
    if batch.nsp_labels is not None:
        pooled = torch.tanh(hidden[:, 0] @ weights["pooler.weight"].T + weights["pooler.bias"]) * ramp["hidden"]
        answers = pooled @ weights["nsp.weight"].T + weights["nsp.bias"]
        total = total + F.cross_entropy(answers, batch.nsp_labels, reduction="sum")
    return total


def gelu_kind(bert: Bert) -> str:
    return "tanh" if bert.model.activation == "gelu_new" else "none"


@pytest.mark.parametrize("model", KINDS)
@pytest.mark.parametrize("key", [*sorted(RAMPS), "all"])
@torch.no_grad()
def test_each_ramp_equals_the_reference(model, key):
    bert = random_bert(model, seed=8)
    batch = rows(model, seed=9)
    drawn = random_ramp(model)
    ramp = drawn if key == "all" else {key: drawn[key]}
    plain = [bert.encode(batch.ids, batch.segments, batch.attention_mask), *bert(batch).values()]
    bert.ramp = ramp
    hidden = bert.encode(batch.ids, batch.segments, batch.attention_mask)
    expected = reference(bert, batch.ids, batch.segments, batch.attention_mask, ramp)
    assert float((hidden - expected)[batch.attention_mask].abs().max()) < 1e-12
    changed = [hidden, *bert(batch).values()]
    assert any(not torch.equal(one, two) for one, two in zip(plain, changed, strict=True)), "the key does something"


@pytest.mark.parametrize("model", KINDS)
@pytest.mark.parametrize("weights", [("norm",), ("head.norm",), ("norm", "head.norm"), ()])
def test_gradients_with_a_ramp(model, weights):
    """Through both heads. The head's norm takes its own weights, else those of all norms, else none."""
    bert = random_bert(model, seed=10)
    batch = rows(model, seed=11)
    drawn = random_ramp(model)
    bert.ramp = {key: value for key, value in drawn.items() if "norm" not in key or key in weights}
    full = no_ramp(model) | dict(bert.ramp)
    full["head.norm"] = bert.ramp.get("head.norm", full["norm"])
    wanted = torch.autograd.grad(reference_loss(bert, batch, full), list(bert.parameters()))
    sums = bert(batch)
    actual = torch.autograd.grad(sums["mlm"] + sums.get("nsp", 0.0), list(bert.parameters()))
    for (name, _), one, two in zip(bert.named_parameters(), wanted, actual, strict=True):
        # forward takes the loss in fp32, the reference in fp64
        assert float((one - two).abs().max()) < 1e-5 * max(1.0, float(one.abs().max())), name


@pytest.mark.parametrize("model", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@torch.no_grad()
def test_without_a_ramp_the_norms_are_torch_modules_to_the_last_bit(monkeypatch, model, dtype):
    bert = random_bert(model, seed=12, dtype=dtype).eval()
    batch = rows(model, seed=13)
    before = bert.predict(batch.ids, batch.segments, batch.attention_mask)
    neutral = {key: ones for key, ones in no_ramp(model).items() if "norm" not in key}
    for ramp in ({}, neutral):
        bert.ramp = ramp
        after = bert.predict(batch.ids, batch.segments, batch.attention_mask)
        assert all(one is two is None or torch.equal(one, two) for one, two in zip(before, after, strict=True))
    bert.ramp = None
    monkeypatch.setenv(library.SWITCH, "torch")
    x, more = torch.randn(2, 5, model.hidden, dtype=dtype), torch.randn(2, 5, model.hidden, dtype=dtype)
    for child in [child for child in bert.modules() if isinstance(child, Norm)]:
        plain = torch.nn.LayerNorm(model.hidden, eps=model.norm_eps, dtype=dtype)
        plain.load_state_dict(child.state_dict())
        assert torch.equal(child(x), plain(x))
        assert torch.equal(child(x, residual=more, dropout=0.5), plain(x + more))  # in evaluation nothing is dropped


@pytest.mark.parametrize("model", KINDS)
@torch.no_grad()
def test_even_norm_weights_are_the_plain_model(model):
    bert = random_bert(model, seed=14)
    batch = rows(model, seed=15)
    before = bert.predict(batch.ids, batch.segments, batch.attention_mask)
    bert.ramp = {"norm": torch.full((model.hidden,), 0.3), "head.norm": torch.full((model.hidden,), 2.0)}
    assert delta(before, bert.predict(batch.ids, batch.segments, batch.attention_mask), None) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_a_closed_gate_leaves_no_trace_of_its_layer(dtype):
    """Post-LN and pre-LN: the model without the gated layers, bit for bit; in shared layers each depth has its own."""
    for kind in ({}, {"norm": "pre"}, {"layers": 4, "stored_layers": 2}):
        deep = small(**{"layers": 4, **kind})
        bert = random_bert(deep, seed=16, dtype=dtype)
        shallow = Bert(small(**{**kind, "layers": 2})).to(dtype).eval()
        shallow.load_state_dict({k: v for k, v in bert.state_dict().items() if k in shallow.state_dict()})
        batch = rows(deep, seed=17)
        bert.ramp = {"gate": torch.tensor([1.0, 1.0, 0.0, 0.0])}
        assert torch.equal(bert.encode(batch.ids, batch.segments), shallow.encode(batch.ids, batch.segments))


@torch.no_grad()
def test_padding_changes_nothing_with_a_ramp():
    bert = random_bert(small(nsp=True))
    bert.ramp = random_ramp(bert.model)
    batch = rows(bert.model, count=1, length=8)
    short = bert.predict(batch.ids[:, :5], batch.segments[:, :5])
    mask = torch.arange(8)[None] < 5
    long = bert.predict(batch.ids, batch.segments, mask)
    assert delta(short, (long[0][:, :5], long[1]), None) < 1e-12
    other = torch.where(mask, batch.ids, (batch.ids + 1) % 23)
    assert torch.equal(bert.predict(other, batch.segments, mask)[0][:, :5], long[0][:, :5])


def test_a_ramp_is_no_part_of_the_state():
    bert = Bert(small())
    names = list(bert.state_dict())
    assert bert.ramp is None
    bert.ramp = random_ramp(bert.model)
    assert list(bert.state_dict()) == names
    bert.ramp = {"gates": torch.ones(2)}
    batch = rows(bert.model)
    with pytest.raises(ValueError, match="'gates' is unknown"):
        bert(batch)
    bert.ramp = {"gate": torch.ones(3)}
    with pytest.raises(ValueError, match=r"shorter|longer"):
        bert(batch)


def noted(sizes: list[int], tensor: Tensor) -> Tensor:
    sizes.append(tensor.numel())
    return tensor


@pytest.mark.parametrize("model", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_computes_the_same_and_keeps_less(model, dropout):
    model = model.model_copy(update={"dropout": dropout, "attention_dropout": dropout})
    batch = rows(model, seed=21)
    found, kept = [], []
    for again in (False, True):
        bert = random_bert(model, seed=20, dtype=torch.float32).train()
        bert.activation_checkpointing = again
        sizes: list[int] = []
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(partial(noted, sizes), lambda x: x):
            loss = sum(bert(batch).values())
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in bert.parameters())])
        kept.append(sum(sizes))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    assert kept[1] < 0.7 * kept[0]


def test_compiled_layers_compute_the_same_without_a_break_in_the_graph():
    model = Model.model_validate(
        {"layers": 3, "hidden": 32, "heads": 2, "ffn": 48, "vocab_size": 60, "positions": 32, "nsp": True}
    )
    batch = rows(model, seed=21, padded=False)
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        bert = random_bert(model, seed=20, dtype=torch.float32).train()
        if compiled:
            bert.compile_layers(fullgraph=True, backend="aot_eager")
        sum(bert(batch).values()).backward()
        found.append([bert(batch)["mlm"].detach(), *(parameter.grad for parameter in bert.parameters())])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # of all positions, and of those asked for
