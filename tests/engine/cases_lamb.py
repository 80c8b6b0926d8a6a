"""Cases for test_zero_lamb.py: LAMB under every ZeRO stage against one parameter after the other in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from growth_ds.engine import distributed
from growth_ds.engine.zero import ZeroEngine

STEPS, LR, DECAY = 20, 1e-2, 0.1
OPTIMIZER = {"name": "lamb", "betas": (0.9, 0.98), "eps": 1e-6}
SHAPES = {"word": (37, 15), "up": (31, 15), "down": (15, 31), "one": (1, 1)}
"""None divides by 2 or 4; each has a vector beside it, undecayed."""


class Part(nn.Module):
    """A matrix and a vector, whose loss has the gradient that it is given."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape[0]))

    def forward(self, weight, bias):
        return (self.weight * weight).sum() + (self.bias * bias).sum()


class Recorded(nn.Module):
    """Parts, and the recorded gradients of each step as its batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleDict({name: Part(shape) for name, shape in SHAPES.items()})

    def forward(self, batch):
        given = batch.gradients
        return {"mlm": sum(part(given[f"{name}.weight"], given[f"{name}.bias"]) for name, part in self.parts.items())}


@dataclass
class Step:
    """What the loss' gradient is to be, by parameter."""

    gradients: dict[str, torch.Tensor]

    def counts(self) -> dict[str, int]:
        return {"mlm": 1}


def recorded(step: int) -> Step:
    """Of very different sizes from tensor to tensor, as real ones are."""
    random, found = torch.Generator().manual_seed(1000 + step), {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        found[f"{name}.weight"] = torch.randn(shape, generator=random) * 10.0**-number
        found[f"{name}.bias"] = torch.randn(shape[0], generator=random)
    return Step(found)


def groups(module: nn.Module):
    decayed = [param for param in module.parameters() if param.ndim > 1]
    rest = [param for param in module.parameters() if param.ndim <= 1]
    return [
        {"params": decayed, "weight_decay": DECAY, "name": "decay"},
        {"params": rest, "weight_decay": 0.0, "name": "rest"},
    ]


def reference(clip: float = 0.0, nvlamb: bool = False) -> dict[str, torch.Tensor]:
    """Weights by name after all steps, from algorithm 2 of arXiv 1904.00962."""
    (b1, b2), eps = OPTIMIZER["betas"], OPTIMIZER["eps"]
    weights = {name.removeprefix("parts."): p.detach().double() for name, p in Recorded().named_parameters()}
    first, second = ({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    for step in range(1, STEPS + 1):
        grads = {name: grad.double() for name, grad in recorded(step).gradients.items()}
        norm = sum(float(grad.square().sum()) for grad in grads.values()) ** 0.5
        for name, weight in weights.items():
            grad = grads[name] / max(1.0, norm / clip if clip else 0.0)
            first[name] = b1 * first[name] + (1 - b1) * grad
            second[name] = b2 * second[name] + (1 - b2) * grad**2
            decay = DECAY if weight.ndim > 1 else 0.0
            adam = first[name] / (1 - b1**step) / ((second[name] / (1 - b2**step)) ** 0.5 + eps)
            update = adam + decay * weight
            trust = weight.norm() / update.norm() if decay or nvlamb else 1.0
            weights[name] = weight - LR * trust * update
    return weights


def trained(stage: int, clip: float = 0.0, precision: str = "fp32", segments: bool = True, by=groups, **options):
    """Weights by name on rank 0 after all steps, None elsewhere."""
    zero = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
    engine = ZeroEngine(
        Recorded(), by, zero=zero, precision=precision, micro_batch=1, accumulation=1, clip=clip,
        optimizer={**OPTIMIZER, **options},
    )  # fmt: skip
    if not segments:
        engine._fragments.optimizer.segments, engine._fragments.optimizer.reduce = {}, None
    for step in range(1, STEPS + 1):
        engine.step([recorded(step)], LR)
    states = {name.removeprefix("parts."): engine.state.read(name) for name in engine.state.shapes()}
    engine.close()
    return None if distributed.rank() else states


def worst(states, right) -> float:
    """Largest error of any element, relative to its tensor's largest."""
    if states is None:
        return 0.0
    errors = {n: float((states[n].weight.double() - w).abs().max() / w.abs().max()) for n, w in right.items()}
    return max(errors.values())


def case_parameters_equal_the_reference():
    right = reference()
    for stage in (0, 1, 2, 3):
        assert worst(trained(stage), right) < 1e-5, stage


def case_with_a_clipped_gradient():
    right = reference(clip=0.5)
    for stage in (0, 1, 2, 3):
        assert worst(trained(stage, clip=0.5), right) < 1e-5, stage


def case_a_group_of_fewer_elements_than_ranks():
    """On the last ranks its flat tensor is padding alone: they exchange norms of as many parameters all the same."""
    right = reference()
    for stage in (1, 2, 3):
        assert worst(trained(stage, by=three_groups), right) < 1e-5, stage


def three_groups(module: nn.Module):
    decayed, rest = groups(module)
    one = [param for param in rest["params"] if param.numel() == 1]
    others = [param for param in rest["params"] if param.numel() > 1]
    return [decayed, {**rest, "params": others}, {**rest, "params": one, "name": "one"}]


def case_nvlamb():
    right = reference(nvlamb=True)
    assert worst(reference_states(reference()), right) > 1e-2
    for stage in (0, 3):
        assert worst(trained(stage, nvlamb=True), right) < 1e-5, stage


def reference_states(weights):
    """As `worst` takes them."""

    class State:
        def __init__(self, weight):
            self.weight = weight

    return {name: State(weight) for name, weight in weights.items()}


def case_norms_of_whole_flat_tensors_are_something_else():
    """What DeepSpeed gives a LAMB that knows nothing of it: one trust ratio for each partition."""
    right = reference()
    for stage in (1, 2, 3):
        error = worst(trained(stage, segments=False), right)
        assert distributed.rank() or error > 1e-2, (stage, error)


def case_sixteen_bits_stay_near():
    """The masters are fp32; the gradients of these losses come in bf16."""
    right = reference()
    for stage in (0, 1, 2, 3):
        assert worst(trained(stage, precision="bf16"), right) < 3e-2, stage


def case_its_state_is_adams():
    for stage in (0, 1, 2, 3):
        states = trained(stage)
        for state in (states or {}).values():
            assert state.step == STEPS
            assert state.exp_avg.abs().max() > 0
            assert state.exp_avg_sq.abs().max() > 0
