"""LAMB against the published formula in float64, whole and in pieces of flat tensors; and what growth asks of it."""

from __future__ import annotations

import pytest
import torch

from growth_ds.optim.lamb import Lamb, Segment

SETTINGS = {"betas": (0.9, 0.98), "eps": 1e-6}
SHAPES = [(5, 7), (11,), (1,), (3, 2, 4), (4, 4)]
DECAYS = (0.1, 0.1, 0.1, 0.0, 0.0)
LR, STEPS = 1e-2, 6


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def gradients(step):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def by_formula(start, steps, nvlamb=False, multipliers=None):
    """Algorithm 2 of arXiv 1904.00962 with bias correction, one parameter after the other."""
    (b1, b2), eps = SETTINGS["betas"], SETTINGS["eps"]
    found = []
    for i, weight in enumerate(start):
        weight, decay = weight.double(), DECAYS[i]
        first, second = torch.zeros_like(weight), torch.zeros_like(weight)
        for step in range(1, steps + 1):
            grad = gradients(step)[i].double()
            first = b1 * first + (1 - b1) * grad
            second = b2 * second + (1 - b2) * grad**2
            adam = first / (1 - b1**step) / ((second / (1 - b2**step)) ** 0.5 + eps)
            scale = 1.0 if multipliers is None else multipliers[i].view_as(adam).double()
            update = scale * adam + decay * weight
            trust = weight.norm() / update.norm() if (decay or nvlamb) and weight.norm() > 0 else 1.0
            weight = weight - LR * trust * update
        found.append(weight)
    return found


def groups(params):
    return [{"params": params[:3], "weight_decay": 0.1}, {"params": params[3:], "weight_decay": 0.0}]


def train(optimizer, params, steps=STEPS):
    for step in range(1, steps + 1):
        for param, grad in zip(params, gradients(step), strict=True):
            param.grad = grad
        optimizer.step()


def check(params, right):
    for param, wanted in zip(params, right, strict=True):
        torch.testing.assert_close(param.detach().double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("nvlamb", [False, True])
def test_the_formula(nvlamb):
    params = [torch.nn.Parameter(weight) for weight in weights()]
    train(Lamb(groups(params), lr=LR, nvlamb=nvlamb, **SETTINGS), params)
    check(params, by_formula(weights(), STEPS, nvlamb))


def test_the_variants_differ():
    one, two = by_formula(weights(), STEPS), by_formula(weights(), STEPS, nvlamb=True)
    assert [torch.equal(a, b) for a, b in zip(one, two, strict=True)] == [True, True, True, False, False]


def test_a_weight_of_zeros_takes_adams_step():
    start = [torch.zeros(shape) for shape in SHAPES]
    params = [torch.nn.Parameter(weight.clone()) for weight in start]
    train(Lamb(groups(params), lr=LR, **SETTINGS), params, steps=1)
    check(params, by_formula(start, 1))
    assert all(torch.isfinite(param).all() and param.abs().max() > 0 for param in params)


def test_multipliers_are_of_adams_part_alone():
    params = [torch.nn.Parameter(weight) for weight in weights()]
    generator = torch.Generator().manual_seed(1)
    scales = [torch.rand(param.numel(), generator=generator) for param in params]
    optimizer = Lamb(groups(params), lr=LR, **SETTINGS)
    optimizer.multipliers = dict(zip(params, scales, strict=True))
    train(optimizer, params)
    check(params, by_formula(weights(), STEPS, multipliers=scales))


class Cut:
    """The parameters as two ranks hold them: one flat tensor for each rank and group, cut in the middle of it."""

    def __init__(self, nvlamb=False):
        self.rank, self.vectors = 0, []
        pieces = weights()
        self.groups = [torch.cat([w.reshape(-1) for w in part]) for part in (pieces[:3], pieces[3:])]
        self.optimizers = []
        for rank in (0, 1):
            masters = [torch.nn.Parameter(self.half(flat, rank)) for flat in self.groups]
            kinds = zip(masters, (0.1, 0.0), strict=True)
            optimizer = Lamb([{"params": [m], "weight_decay": d} for m, d in kinds], lr=LR, nvlamb=nvlamb, **SETTINGS)
            optimizer.segments = {m: self.segments(g, rank) for g, m in enumerate(masters)}
            optimizer.parameters = len(SHAPES)
            self.optimizers.append(optimizer)

    @staticmethod
    def half(flat, rank):
        middle = len(flat) // 2 + 1
        return (flat[:middle] if rank == 0 else flat[middle:]).clone()

    def segments(self, group, rank):
        """Which part of each parameter is in this half."""
        middle, begin, found = len(self.groups[group]) // 2 + 1, 0, []
        for index in range(3) if group == 0 else range(3, 5):
            end = begin + torch.Size(SHAPES[index]).numel()
            low, high = (begin, min(end, middle)) if rank == 0 else (max(begin, middle), end)
            if low < high:
                found.append(Segment(index, low - (middle if rank else 0), high - low))
            begin = end
        return found

    def train(self, steps):
        """Both ranks, the first stopped at its exchange until the second has got there."""
        for step in range(1, steps + 1):
            grads = gradients(step)
            flats = [torch.cat([g.reshape(-1) for g in part]) for part in (grads[:3], grads[3:])]
            mine = []
            for optimizer in self.optimizers:
                optimizer.reduce = lambda squares, mine=mine: mine.append(squares.clone())
            before = [[g["params"][0].detach().clone() for g in o.param_groups] for o in self.optimizers]
            states = [{p: {k: v.clone() for k, v in s.items()} for p, s in o.state.items()} for o in self.optimizers]
            self.step(flats)
            total = mine[0] + mine[1]
            for optimizer, weights_before, state in zip(self.optimizers, before, states, strict=True):
                for group, weight in zip(optimizer.param_groups, weights_before, strict=True):
                    group["params"][0].data.copy_(weight)
                optimizer.state.clear()
                optimizer.state.update(state)
                optimizer.reduce = lambda squares, total=total: squares.copy_(total)
            self.step(flats)

    def step(self, flats):
        for rank, optimizer in enumerate(self.optimizers):
            for group, flat in zip(optimizer.param_groups, flats, strict=True):
                group["params"][0].grad = self.half(flat, rank)
            optimizer.step()

    def whole(self):
        flats = [torch.cat([o.param_groups[g]["params"][0].detach() for o in self.optimizers]) for g in (0, 1)]
        found = []
        for g, indices in ((0, range(3)), (1, range(3, 5))):
            sizes = [torch.Size(SHAPES[i]).numel() for i in indices]
            found += [part.view(SHAPES[i]) for part, i in zip(flats[g].split(sizes), indices, strict=True)]
        return found


@pytest.mark.parametrize("nvlamb", [False, True])
def test_flat_tensors_that_are_cut_anywhere(nvlamb):
    cut = Cut(nvlamb)
    assert any(len(part) > 1 for o in cut.optimizers for part in o.segments.values())
    cut.train(STEPS)
    check(cut.whole(), by_formula(weights(), STEPS, nvlamb))


def test_padding_stays_as_it_is():
    flat = torch.nn.Parameter(torch.arange(6.0))
    optimizer = Lamb([flat], lr=LR, weight_decay=0.1, **SETTINGS)
    optimizer.segments, optimizer.parameters = {flat: [Segment(0, 0, 4)]}, 1
    flat.grad = torch.ones(6)
    optimizer.step()
    assert flat.detach()[4:].tolist() == [4.0, 5.0]
    assert flat.detach()[1:4].tolist() != [1.0, 2.0, 3.0]


def test_norms_of_large_tensors_are_exact():
    """A sum of 8 million squares in fp32 is wrong by 1e-4 and more on the CPU."""
    values = torch.rand(2**23, generator=torch.Generator().manual_seed(0)) * 0.02
    weight = torch.nn.Parameter(values.clone())
    weight.grad = torch.ones_like(weight)
    Lamb([weight], lr=1.0, weight_decay=0.01, **SETTINGS).step()
    update = 1 / (1 + 1e-6) + 0.01 * values.double()
    right = values.double() - values.double().norm() / update.norm() * update
    torch.testing.assert_close(weight.detach().double(), right, rtol=0, atol=1e-8)


def test_a_uniform_multiplier_cancels_in_the_trust_ratio():
    """Of a group whose rate is halved and whose decay is doubled, as `groups` makes it, every adapted step is whole."""
    params, scaled = ([torch.nn.Parameter(weight) for weight in weights()[:2]] for _ in range(2))
    plain = Lamb([{"params": params, "weight_decay": 0.1}], lr=LR, **SETTINGS)
    half = Lamb([{"params": scaled, "weight_decay": 0.2, "lr_scale": 0.5, "lr": LR / 2}], **SETTINGS)
    for optimizer, each in ((plain, params), (half, scaled)):
        for param, grad in zip(each, gradients(1), strict=False):
            param.grad = grad
        optimizer.step()
    for i, (one, two) in enumerate(zip(params, scaled, strict=True)):
        weight, adam = weights()[i].double(), torch.sign(gradients(1)[i].double())
        for param, decay in ((one, 0.1), (two, 0.2)):
            update = adam + decay * weight
            right = weight - LR * weight.norm() / update.norm() * update
            torch.testing.assert_close(param.detach().double(), right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("times", "share"), [((1, 2), (0.5, 1.0)), ((2, 1), (1.0, 0.5)), ((3, 2), (0.5, 1 / 3))], ids=str
)
def test_growing_then_stepping_is_stepping_then_growing(times, share):
    """Without any multiplier: `share` of weight and gradient as growth-algebra 3.3 has it, every unit `times` over."""
    settings = {"lr": LR, "betas": (0.9, 0.98), "eps": 1e-12, "weight_decay": 0.0, "nvlamb": True}
    small = torch.nn.Parameter(weights()[0].double())
    large = torch.nn.Parameter((small.detach() * share[0]).repeat(times))
    one, two = Lamb([small], **settings), Lamb([large], **settings)
    for step in range(1, STEPS + 1):
        grad = gradients(step)[0].double()
        small.grad, large.grad = grad.clone(), (grad * share[1]).repeat(times)
        one.step()
        two.step()
    torch.testing.assert_close(large.detach(), (small.detach() * share[0]).repeat(times), rtol=1e-8, atol=1e-8)


def test_a_scaled_rate_where_there_is_no_trust_ratio():
    """A weight of zeros takes Adam's step at its group's own rate."""
    param = torch.nn.Parameter(torch.zeros(4))
    param.grad = torch.ones(4)
    Lamb([{"params": [param], "weight_decay": 0.2, "lr_scale": 0.5, "lr": LR / 2}], **SETTINGS).step()
    torch.testing.assert_close(param.detach(), torch.full((4,), -LR / 2), rtol=1e-4, atol=0)


def test_gradients_are_left_as_zeros():
    """Padding too: what DeepSpeed does not write anew would be the next step's gradient."""
    flat = torch.nn.Parameter(torch.ones(6))
    optimizer = Lamb([flat], lr=LR, weight_decay=0.1, **SETTINGS)
    optimizer.segments, optimizer.parameters = {flat: [Segment(0, 0, 4)]}, 1
    flat.grad = torch.ones(6)
    optimizer.step()
    assert not flat.grad.any()


def test_a_tensor_of_padding_alone_is_no_parameter():
    flat, seen = torch.nn.Parameter(torch.zeros(2)), []
    optimizer = Lamb([flat], lr=LR, **SETTINGS)
    optimizer.segments, optimizer.parameters, optimizer.reduce = {flat: []}, 7, lambda s: seen.append(tuple(s.shape))
    flat.grad = torch.zeros(2)
    optimizer.step()
    assert seen == [(2, 7)]


def test_no_closure():
    with pytest.raises(ValueError, match="no closure"):
        Lamb([torch.nn.Parameter(torch.ones(2))]).step(lambda: None)
