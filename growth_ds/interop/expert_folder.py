"""Export of a model with experts: a folder of plain files that opens itself, for no other library holds such a BERT.

config.json            sizes, with a `model_type` that no library takes for a BERT
model.safetensors      our parameter names -> fp32 tensors, the experts' stacked along the first dimension
routing.safetensors    `expert_of_token` (V,) int64: the expert of each token id
expert_bert.py         the module in plain torch, and `load(folder)`
README.md              the model card, if one is given
tokenizer files        if the checkpoint has them
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from growth_ds.config import Model
from growth_ds.errors import UserError
from growth_ds.interop.huggingface import write_card, write_whole
from growth_ds.interop.tokenizer_files import copy_tokenizer
from growth_ds.model.experts import routing_table
from growth_ds.model.layout import parameter_shapes

MODEL_TYPE = "growth-ds-expert-bert"
LOADER = "expert_bert.py"
KEYS = (
    "layers", "hidden", "heads", "head_size", "ffn", "experts", "positions", "segments", "norm", "nsp", "activation",
    "norm_eps",
)  # fmt: skip
"""Keys of a `model:` block that the loader reads, besides the vocabulary."""


def write_experts(
    model: Model,
    read: Callable[[str], Tensor],
    out: str | Path,
    tokenizer: Path | None = None,
    force: bool = False,
    card: str = "",
) -> None:
    """Write the folder. `read` gives the tensor of each parameter name.

    It appears whole or not at all. Raises UserError for a model without experts, and for an existing `out` unless
    `force`; then only an earlier export (or an empty folder) is replaced.
    """
    if model.experts == 1:
        raise UserError(f"{out}: the model has no experts; export it as a plain BERT")

    def fill(folder: Path) -> None:
        from safetensors.torch import save_file

        write_card(folder, card)
        copy_tokenizer(tokenizer, folder, model.positions)
        config = {"model_type": MODEL_TYPE, "architectures": ["ExpertBert"], "dtype": "float32"}
        config |= {key: getattr(model, key) for key in KEYS} | {"vocab_size": model.vocab}
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file(_tensors(model, read), folder / "model.safetensors", metadata={"format": "pt"})
        save_file({"expert_of_token": routing_table(model).clone()}, folder / "routing.safetensors")
        shutil.copyfile(Path(__file__).with_name(LOADER), folder / LOADER)

    write_whole(Path(out), force, fill)


def _tensors(model: Model, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Our names -> fp32 tensors that share no memory. Raises ValueError for a tensor of another shape."""
    tensors = {}
    for name, shape in parameter_shapes(model).items():
        tensor = read(name).detach().to(device="cpu", dtype=torch.float32)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"'{name}' has shape {tuple(tensor.shape)}, the model says {shape}")
        tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
    return tensors
