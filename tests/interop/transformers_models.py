"""Randomised models of the transformers library on disk, and their logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    CamembertConfig,
    CamembertForMaskedLM,
    MegatronBertConfig,
    MegatronBertForMaskedLM,
    MegatronBertForPreTraining,
    MegatronBertModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)
from transformers.utils import logging

from tests.growth.models import Rows, randomise

CONFIGS: dict[str, Any] = {
    "post": BertConfig,
    "pre": MegatronBertConfig,
    "roberta": RobertaConfig,
    "xlm-roberta": XLMRobertaConfig,
    "camembert": CamembertConfig,
}
CLASSES: dict[tuple[str, str], Any] = {
    ("post", "nsp"): BertForPreTraining,
    ("post", "mlm"): BertForMaskedLM,
    ("post", "none"): BertModel,
    ("pre", "nsp"): MegatronBertForPreTraining,
    ("pre", "mlm"): MegatronBertForMaskedLM,
    ("pre", "none"): MegatronBertModel,
    ("roberta", "mlm"): RobertaForMaskedLM,
    ("roberta", "none"): RobertaModel,
    ("xlm-roberta", "mlm"): XLMRobertaForMaskedLM,
    ("camembert", "mlm"): CamembertForMaskedLM,
}
SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "vocab_size": 61,
    "max_position_embeddings": 12,
}
logging.disable_progress_bar()


ROBERTA = {"max_position_embeddings": 14, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
"""What the published models of that family have, at the sizes above."""


def make(norm: str, head: str, seed: int = 0, **config: Any) -> Any:
    """A transformers model, every parameter (norms and biases too) drawn at random."""
    model = CLASSES[norm, head](CONFIGS[norm](**{**SIZES, **config})).eval()
    randomise(model, seed)
    return model


def save(path: Path, norm: str = "post", head: str = "nsp", seed: int = 0, **config: Any) -> Any:
    """Make a model and save it; the model is returned."""
    model = make(norm, head, seed, **config)
    model.save_pretrained(path)
    return model


def load(path: Path, nsp: bool) -> Any:
    """Open a folder by the Auto classes; nothing may be missing from it, left over or made anew."""
    auto = AutoModelForPreTraining if nsp else AutoModelForMaskedLM
    model, info = auto.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), f"transformers complains: {info}"
    return model.eval()


@torch.no_grad()
def logits(model: Any, batch: Rows) -> tuple[Tensor, Tensor | None]:
    """MLM logits [B, T, V], NSP logits [B, 2] or None."""
    mask = None if batch.attention_mask is None else batch.attention_mask.long()
    out = model(input_ids=batch.ids, token_type_ids=batch.segments, attention_mask=mask)
    return (
        (out.prediction_logits, out.seq_relationship_logits)
        if hasattr(out, "prediction_logits")
        else (out.logits, None)
    )
