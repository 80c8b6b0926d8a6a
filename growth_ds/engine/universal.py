"""DeepSpeed's universal checkpoint folder, read and written: what `"checkpoint": {"load_universal": true}` opens.

    <dir>/latest_universal                          the tag, a folder beside it
    <tag>/mp_rank_00_model_states.pt                counters; an engine of ZeRO 1 or 2 reads it
    <tag>/zero_pp_rank_0_mp_rank_00_model_states.pt the same for ZeRO-3
    <tag>/zero/<parameter>/fp32.pt, exp_avg.pt, exp_avg_sq.pt, step.pt
    <tag>/zero/optimizer_state.pt                   parameter groups; for ZeRO-3 the step count too

DeepSpeed's converter writes dicts {"param": tensor of the true shape, "cat_dim": 0} from ZeRO 1 and 2, bare flat
tensors from ZeRO-3. ZeRO 1 and 2 load dicts only, ZeRO-3 of DeepSpeed 0.19 both, older ones bare tensors only. So what
is written here for stage 1 or 2 serves all stages of 0.19, what is written for stage 3 serves ZeRO-3 of any age.

Three properties of DeepSpeed 0.19 that decide what is written, and what the user has to know:

- ZeRO 1 and 2 load as many parameter groups as `param_groups` has entries and silently leave the others as they are:
  there is one entry for each parameter, more than any optimizer has groups.
- ZeRO-3 copies the hyper-parameters of the first entry to every group, so that a group without weight decay gets the
  first one's. The entries here hold no hyper-parameters: every group keeps those that the engine was built with. After
  loading a folder of DeepSpeed's own converter they have to be set again.
- ZeRO-3 gives one and the same step tensor to all groups. An optimizer that counts in place (torch's AdamW) then counts
  once for each group: give every entry of `optimizer.state` a clone of its step before going on.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from growth_ds.engine.ds_files import as_count, as_step, laid_out, load, load_dict, shapes_in, tag_folder
from growth_ds.engine.rigid import MODEL_FILES
from growth_ds.engine.state import TensorState
from growth_ds.errors import UserError
from growth_ds.files import replace_folder, sync

LATEST = "latest_universal"
FILES = {"weight": "fp32.pt", "exp_avg": "exp_avg.pt", "exp_avg_sq": "exp_avg_sq.pt"}
OURS = "growth_ds"
"""Key of the model file under which `write_universal` keeps what only growth_ds reads; DeepSpeed hands it through."""
RELEASE = "0.19.8"
"""The DeepSpeed release whose layout is written; its loader asks for one."""


class Universal:
    """The states in one tag folder, read one parameter at a time."""

    def __init__(self, tag: Path) -> None:
        """Raises UserError that names the file that is missing or unfit."""
        self.path = tag
        self._zero = tag / "zero"
        file = next((tag / name for name in MODEL_FILES if (tag / name).is_file()), None)
        if not self._zero.is_dir() or file is None:
            lacking = self._zero if not self._zero.is_dir() else tag / MODEL_FILES[0]
            raise UserError(f"{lacking}: missing from a universal checkpoint; convert the checkpoint again")
        model = load_dict(file)
        with laid_out(file):
            self.global_steps = as_count(model.get("global_steps", 0), "global_steps")
            self.aliases: dict[str, str] = dict(model.get("shared_params") or {})
            self.ours: dict[str, Any] = dict(model.get(OURS) or {})
            known = shapes_in(model.get("param_shapes") or [])
        present = sorted(entry.name for entry in self._zero.iterdir() if entry.is_dir())
        names = [name for name in known if name in present] + [name for name in present if name not in known]
        for name in known:
            if name not in present:
                raise UserError(f"{self._zero / name}: missing, {file.name} lists it; convert the checkpoint again")
        self._shapes = {name: self._shape(name, known) for name in names}
        self.moments = any((self._zero / name / FILES["exp_avg"]).is_file() for name in names)
        self._step = self._common_step() if self.moments else 0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> full shape."""
        return dict(self._shapes)

    @property
    def integer_steps(self) -> bool:
        """Whether Adam's count was saved as an int, as DeepSpeed's own Adam does, and not as a tensor."""
        return isinstance(self._step, int)

    @torch.no_grad()
    def read(self, name: str) -> TensorState:
        """The state of one parameter: fp32, full shape, own memory. KeyError for an unknown name, UserError."""
        shape, folder = self._shapes[name], self._zero / name
        tensors: dict[str, Tensor | None] = {}
        for kind, file in FILES.items():
            if kind != "weight" and not (folder / file).is_file():
                tensors[kind] = None
                continue
            with laid_out(folder / file):
                tensors[kind] = _tensor(load(folder / file)).float().reshape(shape).clone()
        weight, first, second = (tensors[kind] for kind in FILES)
        assert weight is not None
        if (first is None) != (second is None):
            raise UserError(f"{folder}: has one of {', '.join(FILES.values())} and not the others; convert again")
        step = load(folder / "step.pt") if (folder / "step.pt").is_file() else self._step
        with laid_out(folder):
            return TensorState(weight, first, second, 0 if first is None else as_step(step))

    def _shape(self, name: str, known: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        file = self._zero / name / FILES["weight"]
        held = load(file)
        with laid_out(file):
            if isinstance(held, dict):
                return tuple(held["param"].shape)
            if name not in known:
                raise ValueError(f"a flat tensor, and {MODEL_FILES[1]} does not say its shape")
            held.view(known[name])  # ValueError's kin where the number of elements is another
        return known[name]

    def _common_step(self) -> Any:
        """Of the first parameter that has one in a file of its own, else of `optimizer_state.pt`, as it is there."""
        for name in self._shapes:
            if (self._zero / name / "step.pt").is_file():
                return load(self._zero / name / "step.pt")
        file = self._zero / "optimizer_state.pt"
        held = load_dict(file)
        with laid_out(file):
            inner = held.get("optimizer_state_dict", held)  # only that of ZeRO-3 has one
            first = inner.get("state", {}).get(0, {})
            return first["step"] if "step" in first else inner["param_groups"][0]["step"]  # FusedAdam's place


def _tensor(held: Any) -> Tensor:
    tensor = held["param"] if isinstance(held, dict) else held
    if not isinstance(tensor, Tensor):
        raise TypeError(f"holds {type(tensor).__name__}, not a tensor")
    return tensor


def open_universal(path: Path) -> Universal:
    """The folder with `latest_universal`, or a tag folder. Raises UserError."""
    return Universal(tag_folder(path, LATEST))


def write_universal(
    out: Path, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], TensorState], *, zero: int,
    global_steps: int, integer_steps: bool = False, ours: Mapping[str, Any] | None = None,
    aliases: Mapping[str, str] | None = None,
) -> str:  # fmt: skip
    """Write `out`, whole or not at all; returns its tag. An older folder of that name is replaced.

    `shapes` are the parameters, `read` gives their states one at a time; missing moments become zeros. `zero` is the
    stage that will load it (1 and 2: see above, also 3). `integer_steps`: count in ints, for DeepSpeed's own Adam.
    `ours`: plain values that are kept in the model files. Raises UserError for a name that is no folder's, for step
    counts that differ (the flat tensors of ZeRO share one), and where nothing can be written.
    """
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    tag = f"global_step{global_steps}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        (temporary / tag / "zero").mkdir(parents=True)
        step = _write_parameters(temporary / tag / "zero", shapes, read, zero, integer_steps)
        _write_common(temporary / tag, shapes, _count(step, integer_steps), zero, global_steps, ours, aliases)
        (temporary / LATEST).write_text(tag, encoding="utf-8")
        for path in (*sorted(temporary.rglob("*")), temporary):
            sync(path)
        replace_folder(temporary, out)
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written ({error.strerror or error}); give a folder that can", "GDS-O01"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return tag


def _write_parameters(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], TensorState], zero: int, integer: bool
) -> int:
    """Files of all parameters; their step count."""
    common: tuple[str, int] | None = None
    for name in shapes:
        if Path(name).name != name or not name.isprintable() or len(name.encode()) > 200:
            raise UserError(f"{folder.parent.parent.name}: parameter {name[:100]!r} cannot name a folder; rename it")
        state = read(name)
        if state.exp_avg is not None:
            common = common or (name, state.step)
            if state.step != common[1]:
                counts = f"'{name}' counts {state.step} steps, '{common[0]}' {common[1]}"
                raise UserError(f"{counts}; ZeRO keeps one count for all, so train on until they are equal")
        (folder / name).mkdir()
        for kind, file in FILES.items():
            tensor = getattr(state, kind)
            tensor = torch.zeros_like(state.weight) if tensor is None else tensor
            tensor = tensor.detach().to("cpu", torch.float32).contiguous().clone()
            torch.save(tensor.view(-1) if zero == 3 else {"cat_dim": 0, "param": tensor}, folder / name / file)
    step = common[1] if common else 0
    for name in shapes if zero != 3 else ():
        torch.save(_count(step, integer), folder / name / "step.pt")
    return step


def _count(step: int, integer: bool) -> int | Tensor:
    """In the form that the optimizer counts in: torch's takes a 0-d fp32 tensor."""
    return step if integer else torch.tensor(float(step))


def _write_common(
    tag: Path, shapes: Mapping[str, tuple[int, ...]], step: int | Tensor, zero: int, global_steps: int,
    ours: Mapping[str, Any] | None, aliases: Mapping[str, str] | None,
) -> None:  # fmt: skip
    groups: list[dict[str, Any]] = [{"params": []} for _ in shapes]
    inner = {"state": {0: {"step": step}}, "param_groups": groups}
    torch.save(
        {"ds_version": RELEASE, "zero_stage": zero, "param_groups": groups, "optimizer_state_dict": inner},
        tag / "zero" / "optimizer_state.pt",
    )
    model = {
        "module": {},  # an engine that loads a universal folder takes its weights from zero/
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [{name: torch.Size(shape) for name, shape in shapes.items()}],
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": dict(aliases or {}),
        "lr_scheduler": None,
        "skipped_steps": 0,
        "global_steps": global_steps,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_version": RELEASE,
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.2},
        OURS: dict(ours or {}),
    }
    for name in MODEL_FILES:
        torch.save(model, tag / name)
