"""ZeroEngine: DeepSpeed behind four verbs. `step`, `evaluate`, `state`, `close`.

The module's contract: `module(batch)` gives a dict of scalar *sums* ({"mlm": sum of cross-entropies, ...}) and
`batch.counts()` a dict of the numbers they are divided by ({"mlm": labels, ...}). The loss is

    loss = sum over k of  (sum of k over all ranks and micro-batches) / (count of k over the same)

and its gradient is exactly that, whatever the number of ranks and micro-batches and however unevenly the labels
fall: counts are summed over all of them before the first forward. Keys of the module that have no count (correct
predictions) are only reported. Batches have to be on `engine.device`.
"""

from __future__ import annotations

import math
import resource
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from growth_ds import faults
from growth_ds.engine import distributed, ds_config, loss_scale, scaling, scrub, shortcuts
from growth_ds.engine.distributed import RankError
from growth_ds.engine.easing import Easing
from growth_ds.engine.fragments import UpdateScale, for_engine, multipliers, segments
from growth_ds.engine.memory import keep_memory
from growth_ds.engine.pace import Pace
from growth_ds.engine.scrub import live_engines
from growth_ds.engine.state import TensorState
from growth_ds.engine.zero_state import ZeroStore
from growth_ds.errors import Stopped, UserError
from growth_ds.optim.adamw import AdamW
from growth_ds.optim.lamb import Lamb

__all__ = ["StepResult", "ZeroEngine", "live_engines"]

_MAX_KEYS = 8  # positions for counts in the one exchange before a step: fixed, so that a failing rank can take part
ParamGroups = list[dict[str, Any]]


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, equal on all ranks. `losses` are means per key, `loss` their sum.

    `grad_norm` is the norm of the whole gradient before clipping (inf when it overflowed). `skipped`: the gradient was
    not finite and nothing was updated.
    """

    losses: dict[str, float]
    loss: float
    grad_norm: float
    skipped: bool


class ZeroEngine:
    """A module under DeepSpeed with AdamW or LAMB. `init_distributed` comes first; all ranks build it alike.

    Args:
        module: in fp32. It is cast, moved and partitioned in place; rank 0's weights are the ones that count.
        param_groups: [{"params": [...], "weight_decay": x, "name": str, "lr_scale": 1.0 (optional)}, ...] over all
            parameters, or a function that makes it from the module.
        zero: DeepSpeed's `zero_optimization` options ({"stage": 0..3, ...}) or a JSON that has them.
        precision: "fp32", "bf16", "fp16" or "auto".
        clip: largest norm of the gradient; 0 switches clipping off.
        optimizer: {"betas": (b1, b2), "eps": ..., "name": "adamw" (default) or "lamb", "nvlamb": False}; `step` gets
            the lr.
        extra: more DeepSpeed options, merged; UserError when one contradicts ours.
        filled_later: the caller writes every parameter through `state`, so the module's own values need no care.
        update_scale: multipliers of Adam's update for each element (not of the decay), by name and slice; None: all 1.
            A flat master with one that is not None costs 4 more bytes an element.
    """

    def __init__(
        self,
        module: nn.Module,
        param_groups: ParamGroups | Callable[[nn.Module], ParamGroups],
        *,
        zero: dict[str, Any],
        precision: str,
        micro_batch: int,
        accumulation: int,
        clip: float,
        optimizer: dict[str, Any],
        extra: dict[str, Any] | None = None,
        filled_later: bool = False,
        update_scale: UpdateScale | None = None,
    ) -> None:
        self.interrupted: Callable[[], bool] = lambda: False
        """Asked on each rank between the batches of `evaluate`."""
        self._precision = ds_config.resolve_precision(precision)
        self._accumulation = accumulation
        self.pace = Pace(distributed.device().type == "cuda")
        self._clip = clip
        config = ds_config.build(zero, self._precision, micro_batch, accumulation, clip, extra or {})
        self._stage = int(config["zero_optimization"]["stage"])
        groups = param_groups(module) if callable(param_groups) else param_groups
        params = dict(module.named_parameters())
        _check_groups(groups, params)
        self._snapshot = scrub.Snapshot(module)
        shapes = {name: tuple(param.shape) for name, param in params.items()}
        exact = (
            {name: param.detach() for name, param in params.items()}
            if self._precision != "fp32" and not filled_later
            else {}
        )
        if distributed.device().type == "cpu":
            keep_memory(4 * sum(math.prod(shape) for shape in shapes.values()), distributed.world_size())
        self._ds: Any = _initialize(module, groups, config, optimizer)
        scrub.track(self._ds)
        self._fragments = for_engine(self._ds, distributed.rank())
        self._store = ZeroStore(self._fragments, params, shapes)
        self._params, self._frozen = params, frozenset[str]()
        self._easing: Easing | None = None
        scaling.defer(self._ds.optimizer, self._fragments.optimizer, clip)
        shortcuts.take(self._ds.optimizer)
        if update_scale is not None:
            self._fragments.optimizer.multipliers.update(multipliers(self._fragments, params, update_scale))
        if isinstance(self._fragments.optimizer, Lamb):
            self._describe(self._fragments.optimizer, params)
        if self._stage == 0 and self._precision != "fp32":
            _accumulate_in_fp32(params, accumulation)
        if self._stage == 3:
            _register_external(module)
        self._restore_exact(exact)

    def _restore_exact(self, exact: dict[str, Tensor]) -> None:
        """Undo the rounding of the masters: DeepSpeed casts the module to 16 bits before it copies them to fp32.

        Unrounded masters cost nothing to keep until here (the cast makes new tensors) and growth would otherwise drop
        the low bits of every weight each time.
        """
        for name in list(exact):
            weight = exact.pop(name).float()
            self._store.write(name, TensorState(weight, None, None, 0) if self.rank == 0 else None)

    def _describe(self, lamb: Lamb, params: dict[str, nn.Parameter]) -> None:
        """Tell LAMB which parameters its flat tensors are made of, and how to sum their norms over the ranks."""
        lamb.segments, lamb.parameters = segments(self._fragments, params), len(params)
        if self.world_size > 1 and not self._fragments.replicated:
            lamb.reduce = distributed.sum_in_place

    def freeze(self, names: frozenset[str]) -> None:
        """Parameters that steps leave as they are from now on, weight, moments and decay; their gradients are zeros.

        Every rank gives the same names. KeyError for an unknown one.
        """
        if names == self._frozen:
            return
        held = []
        for name in sorted(names):
            fragment = self._fragments.locate(self._params[name])
            if fragment is not None:
                held.append((fragment.master, fragment.offset, fragment.numel))
        self._fragments.optimizer.held, self._frozen = held, names

    def ease(self, progress: float) -> None:
        """Put the multipliers of rates, of groups and of elements, at `progress` in [0, 1] on their way to 1."""
        if self._easing is None and progress > 0.0:
            self._easing = Easing(self._fragments.optimizer)
        if self._easing is not None:
            self._easing.to(progress)

    @property
    def state(self) -> ZeroStore:
        """The full training state, readable and writable by name; collective."""
        return self._store

    @property
    def rank(self) -> int:
        """Global rank."""
        return distributed.rank()

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return distributed.world_size()

    @property
    def device(self) -> torch.device:
        """Where batches have to be."""
        return distributed.device()

    @property
    def precision(self) -> str:
        """ "fp32", "bf16" or "fp16", resolved."""
        return self._precision

    @property
    def stage(self) -> int:
        """ZeRO stage."""
        return self._stage

    @property
    def peak_memory(self) -> int:
        """Most bytes this rank has used: GPU memory, or resident memory of the process without one."""
        if torch.cuda.is_available():
            return int(torch.cuda.max_memory_allocated())
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    @property
    def loss_scale(self) -> dict[str, float] | None:
        """The dynamic scale of fp16 with its counters, None in other precisions; may be set to another engine's."""
        return loss_scale.read(self._ds.optimizer)

    @loss_scale.setter
    def loss_scale(self, values: dict[str, float] | None) -> None:
        loss_scale.restore(self._ds.optimizer, values)

    def step(self, micro_batches: Sequence[Any], lr: float, stop: bool = False) -> StepResult:
        """Forward, backward and one optimizer step on `accumulation` micro-batches at learning rate `lr`.

        Collective. RankError when another rank failed before the forward (unreadable batch, wrong number of them);
        Stopped on all ranks, before anything is done, when any gives `stop`: a launcher's patience is short.
        """
        totals = self._exchange(micro_batches, stop)
        self._store.check_steps()
        for group in self._fragments.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        self._ds.train()
        # DeepSpeed averages over ranks and micro-batches; this factor turns the average into sum / count.
        spread = self.world_size * self._accumulation
        sums = {key: torch.zeros((), dtype=torch.float64, device=self.device) for key in totals}
        norm = 0.0
        for index, batch in enumerate(micro_batches):
            with self.pace.forward():
                output = self._ds(batch)
            parts = [output[key].float() * (spread / count if count else 0.0) for key, count in totals.items()]
            self._ds.backward(torch.stack(parts).sum())
            for key, total in sums.items():
                total += output[key].detach().double()
            if index == len(micro_batches) - 1:
                norm = self._clip_here()
            self._ds.step()
        norm, skipped = self._outcome(norm)
        return self._result(totals, sums, norm, skipped)

    def _exchange(self, micro_batches: Sequence[Any], stop: bool) -> dict[str, int]:
        """Counts per key over all ranks and micro-batches; one small all-reduce. Raises Stopped if any rank stops."""
        counts: dict[str, int] = {}
        error: Exception | None = None
        try:
            if len(micro_batches) != self._accumulation:
                raise ValueError(f"{len(micro_batches)} micro-batches given, accumulation is {self._accumulation}")
            for batch in micro_batches:
                for key, count in batch.counts().items():
                    counts[key] = counts.get(key, 0) + int(count)
            if len(counts) > _MAX_KEYS:
                raise ValueError(f"{len(counts)} loss keys, at most {_MAX_KEYS} are exchanged")
        except Exception as failure:  # any: the other ranks must be told before it leaves here
            counts, error = {}, failure
        keys = sorted(counts)
        vector = [counts[key] for key in keys] + [0] * (_MAX_KEYS - len(keys)) + [stop, error is not None]
        summed = distributed.reduce_integers(vector)
        if error is not None:
            raise error
        if summed[-1]:
            raise RankError("another rank failed before the step; its own message says why")
        if summed[-2]:
            raise Stopped
        return dict(zip(keys, summed, strict=False))

    def _clip_here(self) -> float:
        """Gradient norm before clipping, clipped; only for ZeRO-0 in fp32, NaN elsewhere.

        There DeepSpeed clips without telling the norm and applies a gradient that is not finite: this drops it.
        """
        if not isinstance(self._ds.optimizer, torch.optim.Optimizer):
            return math.nan
        params = list(self._ds.module.parameters())
        norm = float(nn.utils.clip_grad_norm_(params, self._clip or math.inf))
        if not math.isfinite(norm):
            for param in params:
                param.grad = None
        return norm

    def _outcome(self, norm: float) -> tuple[float, bool]:
        """(gradient norm, skipped) of the step that was just made."""
        if isinstance(self._ds.optimizer, torch.optim.Optimizer):
            return (norm, False) if math.isfinite(norm) else (math.inf, True)
        return float(self._ds.get_global_grad_norm()), not self._ds.was_step_applied()

    def _result(self, totals: dict[str, int], sums: dict[str, Tensor], norm: float, skipped: bool) -> StepResult:
        summed = distributed.reduce_floats([float(value) for value in sums.values()])
        losses = {
            key: total / count if count else 0.0 for (key, count), total in zip(totals.items(), summed, strict=True)
        }
        return StepResult(losses, math.fsum(losses.values()), norm, skipped)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Any]) -> tuple[dict[str, float], dict[str, int]]:
        """Sums of everything the module returns and of the counts, over all batches of all ranks, in eval mode.

        Collective: every rank gives the same number of batches (ZeRO-3 gathers weights in each forward). Raises
        Stopped on all ranks, between two batches, when `interrupted` says so on any.
        """
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        was_training = self._ds.module.training
        self._ds.eval()
        try:
            for batch in batches:
                faults.point("validation")
                if distributed.agree(self.interrupted()):
                    raise Stopped
                for key, value in self._ds(batch).items():
                    sums[key] = sums.get(key, 0) + value.detach().double()
                for key, count in batch.counts().items():
                    counts[key] = counts.get(key, 0) + int(count)
        finally:
            self._ds.train(was_training)
        names, keys = sorted(sums), sorted(counts)
        totals = distributed.reduce_floats([float(sums[name]) for name in names])
        whole = distributed.reduce_integers([counts[key] for key in keys])
        return dict(zip(names, totals, strict=True)), dict(zip(keys, whole, strict=True))

    def close(self) -> None:
        """Free optimizer, masters and hooks; the module is a plain one again (under ZeRO-3 without its weights).

        The engine and its `state` cannot be used afterwards. Safe to call twice.
        """
        if self._ds is None:
            return
        scrub.dismantle(self._ds, self._snapshot)
        self._ds = self._fragments = self._store = self._snapshot = self._easing = None  # type: ignore[assignment]


def _check_groups(groups: ParamGroups, params: dict[str, nn.Parameter]) -> None:
    """ValueError unless every parameter is in exactly one group: one left out would have no state to grow."""
    names = {param: name for name, param in params.items()}
    seen: set[str] = set()
    for group in groups:
        for param in group["params"]:
            name = names.get(param)
            if name is None or name in seen:
                raise ValueError(f"parameter groups: {name or 'a tensor of no parameter'} is given twice or foreign")
            seen.add(name)
    if len(seen) < len(params):
        raise ValueError(f"parameter groups: {next(name for name in params if name not in seen)} is in no group")


def _initialize(module: nn.Module, groups: ParamGroups, config: dict[str, Any], options: dict[str, Any]) -> Any:
    """DeepSpeed's engine over our optimizer, so that no op of DeepSpeed's is compiled at the start."""
    import deepspeed
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
    from pydantic import ValidationError

    distributed.quiet_deepspeed()
    for kind in (AdamW, Lamb):
        if kind not in ZERO_SUPPORTED_OPTIMIZERS:  # by type, not by base class: it would warn of an untested optimizer
            ZERO_SUPPORTED_OPTIMIZERS.append(kind)
    optimizer = _optimizer([dict(group, params=list(group["params"])) for group in groups if group["params"]], options)
    try:
        engine, _, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, dist_init_required=False, model_parameters=None
        )
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise UserError(f"engine.zero or engine.deepspeed: DeepSpeed refuses '{where}': {problem['msg']}") from None
    return engine


def _optimizer(groups: ParamGroups, options: dict[str, Any]) -> AdamW | Lamb:
    # lr 0: FP16_UnfusedOptimizer steps once on zero gradients in its constructor, which would decay the weights.
    settings = {"lr": 0.0, "betas": tuple(options["betas"]), "eps": options["eps"]}
    if options.get("name", "adamw") == "lamb":
        return Lamb(groups, **settings, nvlamb=options.get("nvlamb", False))
    try:
        return AdamW(groups, fused=True, **settings)
    except RuntimeError:  # a device or dtype without the fused kernel
        return AdamW(groups, foreach=True, **settings)


def _accumulate_in_fp32(params: dict[str, nn.Parameter], accumulation: int) -> None:
    """ZeRO-0 in 16 bits: let autograd keep `.grad` in fp32, which DeepSpeed then reduces, clips and copies as it is."""
    if hasattr(torch.Tensor, "grad_dtype"):
        for param in params.values():
            param.grad_dtype = torch.float32
    elif accumulation > 1:
        raise UserError("engine.zero.stage: 0 in 16 bits cannot accumulate in fp32 with this torch; use stage 1")


def _register_external(module: nn.Module) -> None:
    """Tell ZeRO-3 which parameters a submodule uses without owning them (tied embeddings in the head).

    The module may name them: `external_parameters = {"submodule": ["parameter name", ...]}`. DeepSpeed notices such
    uses by itself in the first forward, but only through attribute access; named ones are gathered from the start.
    """
    import deepspeed

    named: dict[str, list[str]] = getattr(module, "external_parameters", {})
    for owner, names in named.items():
        for name in names:
            deepspeed.zero.register_external_parameter(module.get_submodule(owner), module.get_parameter(name))
