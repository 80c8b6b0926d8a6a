"""DeepSpeed's own ("rigid") checkpoint folder, read one parameter at a time: ZeRO 0 to 3, any number of ranks.

    <dir>/latest                                           the tag, a folder beside it
    <tag>/mp_rank_00_model_states.pt                       ZeRO 0 to 2: weights of the forward, shapes, step
    <tag>/zero_pp_rank_R_mp_rank_00_model_states.pt        the same for ZeRO-3, without weights, one for each rank
    <tag>/[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt ZeRO 1 to 3: fp32 masters and moments of rank R, flat

ZeRO 1 and 2 write for each rank where in its flat tensors which parameter lies. ZeRO-3 writes no such map: rank r of
n holds elements [r p, (r + 1) p) of each parameter, p = ceil(numel / n), one parameter after the other in the order of
`param_shapes`. Without ZeRO the optimizer's state lies in the model file, without names (see `unnamed.py`).
The files are mapped, not read: memory holds one parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from growth_ds.engine.ds_files import as_count, as_step, check_name, laid_out, load_dict, shapes_in, tag_folder
from growth_ds.engine.state import TensorState
from growth_ds.engine.unnamed import deal
from growth_ds.errors import UserError

MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
MOST_RANKS = 1 << 20
_OPTIMIZER = "zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


@dataclass(frozen=True)
class Piece:
    """A part of a parameter, 1-D, in the order of its elements; without moments where the optimizer has none."""

    weight: Tensor
    exp_avg: Tensor | None
    exp_avg_sq: Tensor | None
    step: int


class Rigid:
    """The states in one tag folder. `stage` is the ZeRO stage, `ranks` the data-parallel size they were saved with."""

    stage: int

    def __init__(self, tag: Path, file: Path, model: dict[str, Any], ranks: int) -> None:
        self.path, self._file, self.ranks = tag, file, ranks
        self.global_steps: int = model["global_steps"]
        self.integer_steps = False
        """Whether Adam's count was saved as an int, as DeepSpeed's own Adam does, and not as a tensor."""
        self.aliases: dict[str, str] = dict(model.get("shared_params") or {})
        """Second names of tied parameters -> the name that has the state."""
        self._shapes: dict[str, tuple[int, ...]] = {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> full shape, in the order of the file."""
        return dict(self._shapes)

    @property
    def moments(self) -> bool:
        """Whether there is optimizer state."""
        with laid_out(self._file):
            return any(piece.exp_avg is not None for name in self._shapes for piece in self._pieces(name))

    @torch.no_grad()
    def read(self, name: str) -> TensorState:
        """The state of one parameter: fp32, full shape, own memory. KeyError for an unknown name, UserError."""
        shape = self._shapes[name]
        with laid_out(self._file):
            return joined(name, shape, list(self._pieces(name)))

    def _pieces(self, name: str) -> Iterator[Piece]:
        raise NotImplementedError

    def _piece(self, state: dict[str, Any], group: dict[str, Any], weight: Tensor, part: slice | None) -> Piece:
        """Of an entry of torch's `state`; `part` of its flat moments, None for all. FusedAdam counts in the group."""
        step = state.get("step", group.get("step", 0))
        self.integer_steps = self.integer_steps or isinstance(step, int)
        if "exp_avg" not in state:
            return Piece(weight, None, None, 0)
        first, second = (state[key].reshape(-1) for key in ("exp_avg", "exp_avg_sq"))
        cut = part or slice(0, first.numel())
        return Piece(weight, first[cut], second[cut], as_step(step))


def joined(name: str, shape: tuple[int, ...], pieces: list[Piece]) -> TensorState:
    """One state of its pieces. ValueError where they do not add up to `shape`, or count different steps."""
    steps = {piece.step for piece in pieces}
    if len(steps) != 1:
        raise ValueError(f"'{name}' has the step counts {sorted(steps)} on different ranks")
    tensors: dict[str, Tensor | None] = {}
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        parts = [getattr(piece, kind) for piece in pieces]
        if kind != "weight" and any(part is None for part in parts):
            tensors[kind] = None
            continue
        flat = torch.cat([part.reshape(-1).float() for part in parts])
        if flat.numel() != math.prod(shape):
            raise ValueError(f"'{name}' has {flat.numel()} elements of {kind}, its shape {list(shape)} another number")
        tensors[kind] = flat.view(shape)
    weight = tensors["weight"]
    assert weight is not None
    return TensorState(weight, tensors["exp_avg"], tensors["exp_avg_sq"], steps.pop())


class _Whole(Rigid):
    """Without ZeRO: whole tensors in the model file; in 16 bits with fp32 copies of the weights beside the moments."""

    stage = 0

    def __init__(self, tag: Path, file: Path, model: dict[str, Any], ranks: int) -> None:
        super().__init__(tag, file, model, ranks)
        self._weights = _distinct(model, self.aliases)
        self._shapes = {name: tuple(weight.shape) for name, weight in self._weights.items()}
        optimizer = model.get("optimizer") or {"state": {}, "param_groups": []}
        inner = optimizer.get("optimizer_state_dict", optimizer)
        self._states, groups = inner["state"], inner["param_groups"]
        if "optimizer_state_dict" in optimizer and "fp32_groups" not in optimizer:
            raise ValueError("no fp32_groups; save under ZeRO-1, whose files can be read")
        copies = [copy for group in optimizer.get("fp32_groups", ()) for copy in group]
        self._groups = {number: group for group in groups for number in group["params"]}
        self._copies = dict(zip(self._groups, copies, strict=True)) if copies else {}
        self._numbers = deal(list(self._weights), groups, self._fits) if groups else {}

    def _fits(self, name: str, number: int) -> bool:
        weight, copy = self._weights[name], self._copies.get(number)
        if copy is not None and copy.shape == weight.shape:
            return torch.equal(copy.to(weight.dtype), weight)
        moment = self._states.get(number, {}).get("exp_avg")
        return copy is None and (moment is None or moment.shape == weight.shape)

    def _pieces(self, name: str) -> Iterator[Piece]:
        number = self._numbers.get(name)
        if number is None:
            yield Piece(self._weights[name], None, None, 0)
            return
        weight = self._copies.get(number, self._weights[name])
        yield self._piece(self._states.get(number, {}), self._groups[number], weight, None)


class _Flat(Rigid):
    """ZeRO 1 and 2: every rank's file says where in its flat tensors which parameter lies."""

    def __init__(self, tag: Path, file: Path, model: dict[str, Any], ranks: int, optimizers: list[Any]) -> None:
        super().__init__(tag, file, model, ranks)
        self._optimizers = optimizers
        self.stage = int(optimizers[0].get("zero_stage", 1))  # BF16_Optimizer, which is ZeRO-1, does not say
        if not isinstance(optimizers[0]["base_optimizer_state"], dict):
            raise ValueError("saved with elastic_checkpoint; save again without it")
        self._shapes = shapes_in(model["param_shapes"])
        weights = _distinct(model, self.aliases)
        self._frozen = {name: weight for name, weight in weights.items() if name not in self._shapes}
        self._shapes |= {name: tuple(weight.shape) for name, weight in self._frozen.items()}

    def _pieces(self, name: str) -> Iterator[Piece]:
        if name in self._frozen:
            yield Piece(self._frozen[name], None, None, 0)
            return
        for optimizer in self._optimizers:
            base = optimizer["base_optimizer_state"]
            for index, mapping in enumerate(optimizer["param_slice_mappings"]):
                if name in mapping:
                    part = slice(mapping[name].start, mapping[name].start + mapping[name].numel)
                    weight = optimizer["single_partition_of_fp32_groups"][index].reshape(-1)[part]
                    yield self._piece(base["state"].get(index, {}), base["param_groups"][index], weight, part)


class _Cut(Rigid):
    """ZeRO-3: each parameter cut into equal pieces, the last ones padded."""

    stage = 3

    def __init__(self, tag: Path, file: Path, model: dict[str, Any], ranks: int, optimizers: list[Any]) -> None:
        super().__init__(tag, file, model, ranks)
        self._optimizers = optimizers
        self._shapes = shapes_in(model["param_shapes"])
        self._at: dict[str, tuple[int, int]] = {}
        for index, group in enumerate(model["param_shapes"]):
            offset = 0
            for name in group:
                self._at[name] = index, offset
                offset += -(-math.prod(self._shapes[name]) // ranks)
        for name in model.get("frozen_param_shapes") or {}:
            raise UserError(f"{file}: '{name}' was frozen, which is not read from ZeRO-3; save without frozen ones")

    def _pieces(self, name: str) -> Iterator[Piece]:
        index, offset = self._at[name]
        numel = math.prod(self._shapes[name])
        length = -(-numel // self.ranks)
        for rank, optimizer in enumerate(self._optimizers):
            inner = optimizer["optimizer_state_dict"]
            group: dict[str, Any] = next((one for one in inner["param_groups"] if index in one["params"]), {})
            part = slice(offset, offset + max(0, min(length, numel - rank * length)))
            weight = optimizer["fp32_flat_groups"][index].reshape(-1)[part]
            yield self._piece(inner["state"].get(index, {}), group, weight, part)


def open_rigid(path: Path) -> Rigid:
    """The folder with `latest`, or a tag folder. Raises UserError that names the file that is missing or unfit."""
    tag = tag_folder(path, "latest")
    file = next((tag / name for name in MODEL_FILES if (tag / name).is_file()), None)
    if file is None:
        raise UserError(f"{tag}: no {MODEL_FILES[0]} (nor that of ZeRO-3), no `latest`; give a DeepSpeed checkpoint")
    for pattern in ("*mp_rank_01_*", "layer_*"):
        for other in sorted(tag.glob(pattern)):
            raise UserError(f"{other}: of a model in parts; merge tensor and pipeline parallel parts first")
    model = load_dict(file)
    with laid_out(file):
        ranks = as_count(model["dp_world_size"], "dp_world_size", 1, MOST_RANKS)
        model["global_steps"] = as_count(model.get("global_steps", 0), "global_steps")
        _check_options(file, model)
        if model.get("param_shapes") is None:
            return _Whole(tag, file, model, ranks)
    files = _rank_files(tag, ranks)
    optimizers = []
    for each in files:
        held = load_dict(each)
        with laid_out(each):
            optimizers.append(held["optimizer_state_dict"])
    with laid_out(files[0]):
        kind = _Cut if int(optimizers[0].get("zero_stage", 1)) == 3 else _Flat
        return kind(tag, files[0], model, ranks, optimizers)


def _check_options(file: Path, model: dict[str, Any]) -> None:
    """Raises UserError for an option under which the files do not say truly where a parameter lies."""
    config = model.get("ds_config")
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    for key in ("round_robin_gradients", "mics_shard_size", "zenflow"):
        value = zero.get(key) if isinstance(zero, dict) else None
        if value and value != -1:  # MiCS is off at -1
            raise UserError(f"{file}: saved with {key}, whose files lie otherwise than they say; save without it")


def _rank_files(tag: Path, ranks: int) -> list[Path]:
    """The optimizer's file of every rank. Raises UserError for the first that is missing."""
    names = [_OPTIMIZER, f"bf16_{_OPTIMIZER}"]
    name = next((name for name in reversed(names) if (tag / name.format(rank=0)).is_file()), None)
    if name is None:
        name = next((name for name in reversed(names) if any(tag.glob(name.format(rank="*")))), names[0])
    found: list[Path] = []
    for rank in range(ranks):
        found.append(tag / name.format(rank=rank))
        if not found[-1].is_file():
            raise UserError(f"{found[-1]}: missing, {ranks} ranks saved this checkpoint; copy the files of all of them")
    return found


def _distinct(model: dict[str, Any], aliases: dict[str, str]) -> dict[str, Tensor]:
    """The module's parameters by name, tied ones once; buffers are none. New aliases are noted."""
    found: dict[str, Tensor] = {}
    places: dict[tuple[Any, ...], str] = {}
    for name, tensor in model["module"].items():
        if name in model["buffer_names"] or name in aliases:
            continue
        check_name(name)
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and place in places:
            aliases[name] = places[place]
            continue
        places[place] = name
        found[name] = tensor.detach()
    return found
