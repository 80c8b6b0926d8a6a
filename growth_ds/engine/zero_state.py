"""StateStore over a live DeepSpeed engine: any ZeRO stage, precision and number of ranks, one tensor at a time.

Reading: every rank puts its fragment into a buffer of zeros, and the buffers are summed on rank 0 *as bit patterns*
(int32), which is exact for every value, negative zeros and NaN included. Writing: rank 0 broadcasts the full tensor,
every rank keeps its fragment and sets the weight of the forward from the same tensor, so that master and weight cannot
part. Before either, the ranks exchange one small vector with a fault flag: a rank that cannot take part makes all of
them raise, and none waits.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from growth_ds.engine import distributed
from growth_ds.engine.distributed import RankError
from growth_ds.engine.fragments import Fragment, Fragments
from growth_ds.engine.state import TensorState


class ZeroStore:
    """The training state of an engine's parameters. Collective: all ranks call the same methods in the same order.

    All parameters share one step count: ZeRO flattens parameters into shared tensors, and Adam counts per tensor. It
    may be changed by writing every parameter with the new count; `check_steps` (called before each optimizer step)
    refuses a half-done change.
    """

    def __init__(
        self, fragments: Fragments, params: dict[str, nn.Parameter], shapes: dict[str, tuple[int, ...]]
    ) -> None:
        self._fragments = fragments
        self._params = params
        self._shapes = shapes
        self._written: dict[str, int] = {}  # since the last optimizer step: name -> step count
        self._previous = 0  # the step count of parameters not written since
        fragments.ensure_states()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> full shape, in module parameter order."""
        return dict(self._shapes)

    @torch.no_grad()
    def read(self, name: str) -> TensorState | None:
        """Full fp32 state on rank 0 (tensors of its own on the CPU), None elsewhere. KeyError, RankError."""
        param, shape = self._params[name], self._shapes[name]
        fragment, error = self._locate(param)
        step = self._step_of(fragment) if fragment else 0
        fault, step = distributed.reduce_integers([error is not None, step], "max")
        _raise(fault, error, f"reading {name}")
        weight = self._gather(shape, fragment, fragment.weight if fragment else None)
        moments = [self._gather(shape, fragment, self._moment(fragment, key)) for key in ("exp_avg", "exp_avg_sq")]
        if weight is None:
            return None
        return TensorState(weight, moments[0], moments[1], step)

    @torch.no_grad()
    def write(self, name: str, state: TensorState | None) -> None:
        """Replace the state from rank 0's `state`; missing moments become zeros.

        Rank 0's ValueError (shape, dtype, None) is raised there, and RankError on the other ranks.
        """
        param, shape = self._params[name], self._shapes[name]
        fragment, error = self._locate(param)
        try:
            if distributed.rank() == 0:
                if state is None:
                    raise ValueError(f"{name}: rank 0 has to give the state that is written")
                state.check(name, shape)
        except ValueError as refusal:
            error = refusal
        sure = state if distributed.rank() == 0 and error is None else None
        header = [error is not None, sure is not None and sure.exp_avg is not None, sure.step if sure else 0]
        fault, has_moments, step = distributed.reduce_integers(header, "max")
        _raise(fault, error, f"writing {name}")
        if not self._written:
            self._previous = _as_int(self._fragments.state_of(next(iter(self._fragments.masters())))["step"])
        full = self._broadcast(shape, sure.weight if sure else None)
        _put(fragment.weight if fragment else None, fragment, full)
        self._fragments.write_low_precision(param, full)
        del full
        for key in ("exp_avg", "exp_avg_sq"):
            target = self._moment(fragment, key)
            if has_moments:
                _put(target, fragment, self._broadcast(shape, getattr(sure, key) if sure else None))
            elif target is not None:
                target.zero_()
        if fragment is not None:
            self._set_step(fragment, step)
        self._written[name] = step

    @torch.no_grad()
    def verify(self) -> None:
        """Check that the weight of the forward is the rounded master everywhere; AssertionError names a parameter.

        Collective. DeepSpeed's own setters leave one of the two behind: `safe_set_full_fp32_param` the weight,
        `GatheredParameters` the master.
        """
        bad = ""
        for name, param in self._params.items():
            fragment, _ = self._locate(param)
            if fragment is None:
                continue
            low = self._fragments.low_precision(param, fragment)
            if not torch.equal(fragment.weight.to(low.device).to(low.dtype), low):
                bad = name
                break
        if distributed.agree(bool(bad)):
            raise AssertionError(f"weight and fp32 master differ: {bad or 'on another rank'}")

    def check_steps(self) -> None:
        """Raise ValueError when parameters were written with a new step count and others were not. Local, same on all.

        Called before every optimizer step: Adam's bias correction would otherwise be wrong for the ones left out.
        """
        if not self._written:
            return
        steps = set(self._written.values())
        if len(steps) > 1:
            raise ValueError(f"states were written with different step counts {sorted(steps)}; Adam's count is shared")
        if self._previous not in steps and len(self._written) < len(self._params):
            left = next(name for name in self._params if name not in self._written)
            raise ValueError(f"step count set to {steps.pop()} for some parameters only; {left} was not written")
        self._written.clear()

    def _locate(self, param: nn.Parameter) -> tuple[Fragment | None, Exception | None]:
        try:
            return self._fragments.locate(param), None
        except (KeyError, IndexError, AttributeError, RuntimeError) as error:
            return None, error

    def _step_of(self, fragment: Fragment) -> int:
        return _as_int(self._fragments.state_of(fragment.master)["step"])

    def _set_step(self, fragment: Fragment, step: int) -> None:
        """torch keeps the count as a 0-d tensor, DeepSpeed's own Adam as an int: replace like with like."""
        state = self._fragments.state_of(fragment.master)
        if torch.is_tensor(state["step"]):
            state["step"].fill_(float(step))
        else:
            state["step"] = step

    def _moment(self, fragment: Fragment | None, key: str) -> Tensor | None:
        return None if fragment is None else fragment.of(self._fragments.state_of(fragment.master)[key])

    def _gather(self, shape: tuple[int, ...], fragment: Fragment | None, piece: Tensor | None) -> Tensor | None:
        """The full fp32 tensor on the CPU of rank 0, None elsewhere. Collective unless every rank holds it whole."""
        if self._fragments.replicated:
            return piece.float().reshape(shape).cpu().clone() if distributed.rank() == 0 and piece is not None else None
        full = torch.zeros(_numel(shape), dtype=torch.float32, device=distributed.device())
        if fragment is not None and piece is not None:
            full.narrow(0, fragment.start, fragment.numel).copy_(piece)
        if distributed.world_size() > 1:
            dist.reduce(full.view(torch.int32), dst=0)
        return full.view(shape).cpu() if distributed.rank() == 0 else None

    def _broadcast(self, shape: tuple[int, ...], value: Tensor | None) -> Tensor:
        """Rank 0's tensor on every rank, flat fp32 on the communication device."""
        if value is not None:
            full = value.detach().reshape(-1).to(distributed.device()).contiguous()
        else:
            full = torch.empty(_numel(shape), dtype=torch.float32, device=distributed.device())
        if distributed.world_size() > 1:
            dist.broadcast(full, src=0)
        return full


def _put(target: Tensor | None, fragment: Fragment | None, full: Tensor) -> None:
    if target is not None and fragment is not None:
        target.copy_(full.narrow(0, fragment.start, fragment.numel))


def _raise(fault: int, error: Exception | None, doing: str) -> None:
    if error is not None:
        raise error
    if fault:
        raise RankError(f"another rank failed {doing}; its own message says why")


def _as_int(step: Tensor | int) -> int:
    return int(step.item()) if torch.is_tensor(step) else int(step)


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
