"""Rigid DeepSpeed folders of ZeRO-3 and of no ZeRO, made without an engine: for tests of names, sizes and refusals.

That the layout is DeepSpeed's own is shown in tests/engine/cases_deepspeed_files.py, on folders that it wrote itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from growth_ds.config import Model
from growth_ds.engine.state import TensorState
from growth_ds.interop import names

KINDS = ("weight", "exp_avg", "exp_avg_sq")


def hugging_face(model: Model, states: Mapping[str, TensorState]) -> dict[str, TensorState]:
    """The same states under transformers' names, fused tensors taken apart."""
    found = {}
    for name, state in states.items():
        keys = names.their_names(model, name)
        parts = [getattr(state, kind).chunk(len(keys)) for kind in KINDS]
        for key, *tensors in zip(keys, *parts, strict=True):
            found[key] = TensorState(*(tensor.clone() for tensor in tensors), state.step)
    return found


def write_zero3(root: Path, states: Mapping[str, TensorState], ranks: int = 2, prefix: str = "") -> Path:
    """`root` with `latest` and one tag of `ranks` ranks; two groups, matrices and the rest. Returns the tag folder."""
    tag = root / "global_step7"
    tag.mkdir(parents=True)
    (root / "latest").write_text("global_step7")
    groups = [[name for name in states if (states[name].weight.ndim > 1) == matrix] for matrix in (True, False)]
    shapes = [{prefix + name: states[name].weight.shape for name in group} for group in groups]
    for rank in range(ranks):
        flat = {kind: [_cut(states, group, kind, rank, ranks) for group in groups] for kind in KINDS}
        entries = {
            index: {
                "step": torch.tensor(7.0),
                "exp_avg": flat["exp_avg"][index],
                "exp_avg_sq": flat["exp_avg_sq"][index],
            }
            for index in range(2)
        }
        inner = {"state": entries, "param_groups": [{"params": [0]}, {"params": [1]}]}
        optimizer = {"zero_stage": 3, "fp32_flat_groups": flat["weight"], "optimizer_state_dict": inner}
        name = f"zero_pp_rank_{rank}_mp_rank_00"
        torch.save({"optimizer_state_dict": optimizer}, tag / f"{name}_optim_states.pt")
        torch.save(_model(ranks, param_shapes=shapes), tag / f"{name}_model_states.pt")
    return tag


def write_plain(root: Path, states: Mapping[str, TensorState], groups: list[list[str]], **more: Any) -> Path:
    """A folder without ZeRO: whole tensors in one file, the optimizer's by number."""
    tag = root / "global_step7"
    tag.mkdir(parents=True)
    (root / "latest").write_text("global_step7")
    order = [name for group in groups for name in group]
    entries = {
        number: {
            "step": torch.tensor(float(states[name].step)),
            "exp_avg": states[name].exp_avg,
            "exp_avg_sq": states[name].exp_avg_sq,
        }
        for number, name in enumerate(order)
    }
    numbers = [{"params": [order.index(name) for name in group]} for group in groups]
    module = {name: state.weight for name, state in states.items()} | more
    optimizer = {"state": entries, "param_groups": numbers}
    torch.save(_model(1, module=module, optimizer=optimizer, buffer_names=["ids"]), tag / "mp_rank_00_model_states.pt")
    return tag


def _model(ranks: int, **more: Any) -> dict[str, Any]:
    common = {"module": {}, "buffer_names": [], "param_shapes": None, "shared_params": {}, "global_steps": 7}
    return {**common, "dp_world_size": ranks, "ds_config": {"zero_optimization": {"stage": 3}}, **more}


def _cut(states: Mapping[str, TensorState], group: list[str], kind: str, rank: int, ranks: int) -> torch.Tensor:
    pieces = []
    for name in group:
        whole = getattr(states[name], kind).reshape(-1)
        length = -(-whole.numel() // ranks)
        padded = torch.cat([whole, torch.full((length * ranks - whole.numel(),), float("nan"))])
        pieces.append(padded[rank * length : (rank + 1) * length])
    return torch.cat(pieces)
