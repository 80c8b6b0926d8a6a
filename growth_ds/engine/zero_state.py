"""StateStore over a live DeepSpeed engine: any ZeRO stage, precision and number of ranks, one tensor at a time.

Two ways in and out. Whole tensors through rank 0 (`read`, `write`): every rank puts its fragment into a buffer of
zeros, and the buffers are summed on rank 0 *as bit patterns* (int32), which is exact for every value, negative zeros
and NaN included; or rank 0 broadcasts the full tensor and every rank keeps its fragment. Before either, the ranks
exchange one small vector with a fault flag: a rank that cannot take part makes all of them raise, and none waits. And
each rank its own part (`slice`, `fill`), without any communication.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from growth_ds.engine import distributed
from growth_ds.engine.checksum import checksum, signed
from growth_ds.engine.distributed import RankError
from growth_ds.engine.fragments import Fragment, Fragments
from growth_ds.engine.state import KINDS, StateSlice, TensorState

Make = Callable[[str, int, int], Tensor | None]
"""(kind, begin, end) -> elements [begin, end) of a flattened parameter's weight or moment, fp32; None: zeros."""


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
        self.is_summing = False
        """Whether what is written is summed, so that `verify` finds it if it is not there afterwards."""
        self._put: dict[str, list[int]] = {}  # name -> checksums of what was written here
        self._sent: dict[str, list[int]] = {}  # on rank 0: of the whole tensors that it sent
        fragments.ensure_states()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> full shape, in module parameter order."""
        return dict(self._shapes)

    @torch.no_grad()
    def read(self, name: str) -> TensorState | None:
        """Full fp32 state on rank 0 (tensors of its own on the CPU), None elsewhere. KeyError, RankError."""
        param, shape = self._params[name], self._shapes[name]
        fragment, error = self._locate(param)
        step = self._step_of(fragment.master) if fragment else 0
        fault, step = distributed.reduce_integers([error is not None, step], "max")
        _raise(fault, error, f"reading {name}")
        parts = [self._gather(shape, fragment, self._part(fragment, kind) if fragment else None) for kind in KINDS]
        return None if parts[0] is None else TensorState(parts[0], parts[1], parts[2], step)

    @torch.no_grad()
    def slice(self, name: str) -> StateSlice:
        """This rank's part of the state, fp32 on the CPU. No communication; KeyError, RuntimeError.

        The parts of all ranks fill every tensor once. Of a replicated state (ZeRO-0) each rank has an equal share.
        """
        begin, end = self.span(name)
        fragment = self._fragments.locate(self._params[name])
        if fragment is None:
            step = self._step_of(next(iter(self._fragments.masters())))
            return StateSlice(0, torch.empty(0), torch.empty(0), torch.empty(0), step)
        parts = [self._part(fragment, kind).narrow(0, begin - fragment.start, end - begin).cpu() for kind in KINDS]
        return StateSlice(begin, parts[0], parts[1], parts[2], self._step_of(fragment.master))

    def span(self, name: str) -> tuple[int, int]:
        """(begin, end): which elements of the flattened parameter `slice` gives on this rank."""
        if self._fragments.replicated:
            numel, rank, ranks = _numel(self._shapes[name]), distributed.rank(), distributed.world_size()
            return numel * rank // ranks, numel * (rank + 1) // ranks
        fragment = self._fragments.locate(self._params[name])
        return (fragment.start, fragment.start + fragment.numel) if fragment else (0, 0)

    @torch.no_grad()
    def write(self, name: str, state: TensorState | None) -> None:
        """Replace the state from rank 0's `state`; missing moments become zeros. Collective.

        Rank 0's ValueError (shape, dtype, None) is raised there, and RankError on the other ranks.
        """
        param, shape = self._params[name], self._shapes[name]
        _, error = self._locate(param)
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
        if sure is not None and self.is_summing:
            moments = [sure.exp_avg, sure.exp_avg_sq]
            self._sent[name] = [checksum(sure.weight), *(0 if each is None else checksum(each) for each in moments)]

        def received(kind: str, begin: int, end: int) -> Tensor | None:
            if kind != "weight" and not has_moments:
                return None
            return self._broadcast(shape, getattr(sure, kind) if sure else None)[begin:end]

        self._replace(name, received, step)

    @torch.no_grad()
    def fill(self, name: str, make: Make, step: int) -> None:
        """Replace this rank's part of the state, and what the forward finds of the weight, from `make`.

        No communication: every rank has to do so for every parameter, with the same `step`. `make` is asked for
        ranges on this rank; what it raises leaves the parameter half written.
        """
        self._replace(name, make, step)

    def _replace(self, name: str, make: Make, step: int) -> None:
        """Master and forward weight from one tensor, so that they cannot part; then both moments, then the count."""
        param = self._params[name]
        fragment = self._fragments.locate(param)
        if not self._written:
            self._previous = self._step_of(next(iter(self._fragments.masters())))
        begin, end = self._fragments.forward_range(param)
        weight = make("weight", begin, end)
        assert weight is not None, f"{name}: a weight is never left out"
        self._fragments.write_low_precision(param, weight)
        sums = [self._put_part(fragment, "weight", weight, begin)]
        del weight
        first, last = (fragment.start, fragment.start + fragment.numel) if fragment else (0, 0)
        sums += [self._put_part(fragment, kind, make(kind, first, last), first) for kind in KINDS[1:]]
        if fragment is not None:
            self._set_step(fragment, step)
        if self.is_summing:
            self._put[name] = sums
        self._written[name] = step

    def _put_part(self, fragment: Fragment | None, kind: str, values: Tensor | None, begin: int) -> int:
        """Copy this rank's elements out of `values`, which begin at element `begin`; their checksum if it is wanted."""
        if fragment is None:
            return 0
        target = self._part(fragment, kind)
        if values is None:
            target.zero_()
            return 0
        own = values.reshape(-1).narrow(0, fragment.start - begin, fragment.numel)
        target.copy_(own)
        return checksum(own, fragment.start) if self.is_summing else 0

    @torch.no_grad()
    def verify(self) -> list[int]:
        """Check that every rank holds what was written, and that the forward's weight is the rounded master.

        Returns the checksums of all tensors, three a parameter: the same for any stage and number of ranks.
        Collective. AssertionError names a parameter. DeepSpeed's own setters leave one of the two behind:
        `safe_set_full_fp32_param` the weight, `GatheredParameters` the master. With `is_summing` the sums are compared
        with those of what was written: one parameter's write may have hit another's place.
        """
        bad, sums = "", []
        for name, param in self._params.items():
            fragment, _ = self._locate(param)
            own = [checksum(self._part(fragment, kind), fragment.start) if fragment else 0 for kind in KINDS]
            sums += own
            if self._put and own != self._put.get(name, own):
                bad = bad or name
            if fragment is not None:
                low = self._fragments.low_precision(param, fragment)
                if not torch.equal(fragment.weight.to(low.device).to(low.dtype), low):
                    bad = bad or name
        if distributed.agree(bool(bad)):
            raise AssertionError(f"weight and fp32 master differ, or are not what was written: {bad or 'elsewhere'}")
        totals = self._totals(sums)
        names = [name for name in self._params for _ in KINDS]
        sent = [each for name in self._params for each in self._sent.get(name, [])]
        lost = next((name for name, a, b in zip(names, totals, sent, strict=False) if a != b), "")
        if distributed.agree(bool(lost)):
            raise AssertionError(f"what the ranks hold together is not what rank 0 sent: {lost or 'see rank 0'}")
        return totals

    def _totals(self, sums: list[int]) -> list[int]:
        """The ranks' checksums added up; of a replicated state every rank must have the same. Collective."""
        if not self._fragments.replicated:
            return [signed(each) for each in distributed.reduce_integers(sums)]
        highest = distributed.reduce_integers(sums, "max")
        if highest != [~each for each in distributed.reduce_integers([~each for each in sums], "max")]:
            raise AssertionError("the ranks hold different copies of a replicated state")
        return highest

    @torch.no_grad()
    def options(self, key: str) -> dict[str, float]:
        """Parameter name -> option `key` (weight_decay, ...) of the optimizer group that steps this rank's part."""
        found = {}
        for name, param in self._params.items():
            if self._fragments.locate(param) is not None:
                found[name] = float(self._fragments.group_of(param)[key])
        return found

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
        for record in (self._written, self._put, self._sent):
            record.clear()

    def _locate(self, param: nn.Parameter) -> tuple[Fragment | None, Exception | None]:
        try:
            return self._fragments.locate(param), None
        except (KeyError, IndexError, AttributeError, RuntimeError) as error:
            return None, error

    def _step_of(self, master: Tensor) -> int:
        step = self._fragments.state_of(master)["step"]
        return int(step.item()) if torch.is_tensor(step) else int(step)

    def _set_step(self, fragment: Fragment, step: int) -> None:
        """torch keeps the count as a 0-d tensor, DeepSpeed's own Adam as an int: replace like with like."""
        state = self._fragments.state_of(fragment.master)
        if torch.is_tensor(state["step"]):
            state["step"].fill_(float(step))
        else:
            state["step"] = step

    def _part(self, fragment: Fragment, kind: str) -> Tensor:
        """This rank's elements of the weight or a moment: a flat view."""
        return fragment.weight if kind == "weight" else fragment.of(self._fragments.state_of(fragment.master)[kind])

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


def _raise(fault: int, error: Exception | None, doing: str) -> None:
    if error is not None:
        raise error
    if fault:
        raise RankError(f"another rank failed {doing}; its own message says why")


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
