"""The table our name -> transformers' names, and config key -> transformers' config key. The inverse is derived.

A row with several names on the right is their concatenation along the first (output) dimension. Post-LN models are
transformers' `Bert*`, pre-LN models its `MegatronBert*`; they differ in the norms only. A model of another family than
BERT is post-LN too, without next-sentence head, and has other names (Liu et al. 2019, arXiv 1907.11692): its position
table begins with rows that no real token reads, see `growth_ds.interop.huggingface`.
"""

from __future__ import annotations

from collections.abc import Mapping

from growth_ds.config import Model
from growth_ds.model.layout import HEAD, NSP, parameter_shapes

_LAYER = "bert.encoder.layer.{layer}."
_ENCODER = {
    "embeddings.word": ("bert.embeddings.word_embeddings",),
    "embeddings.position": ("bert.embeddings.position_embeddings",),
    "embeddings.segment": ("bert.embeddings.token_type_embeddings",),
    "layers.{layer}.qkv": tuple(f"{_LAYER}attention.self.{part}" for part in ("query", "key", "value")),
    "layers.{layer}.out": (f"{_LAYER}attention.output.dense",),
    "layers.{layer}.up": (f"{_LAYER}intermediate.dense",),
    "layers.{layer}.down": (f"{_LAYER}output.dense",),
}
_HEADS = {
    "head.dense": ("cls.predictions.transform.dense",),
    "head.norm": ("cls.predictions.transform.LayerNorm",),
    "head": ("cls.predictions",),  # the bias of the vocabulary; its matrix is the word embedding
    "pooler": ("bert.pooler.dense",),
    "nsp": ("cls.seq_relationship",),
}
MODULES: dict[str, dict[str, tuple[str, ...]]] = {
    "post": _ENCODER
    | {
        "embeddings.norm": ("bert.embeddings.LayerNorm",),
        "layers.{layer}.attention_norm": (f"{_LAYER}attention.output.LayerNorm",),
        "layers.{layer}.ffn_norm": (f"{_LAYER}output.LayerNorm",),
    }
    | _HEADS,
    "pre": _ENCODER
    | {
        "layers.{layer}.attention_norm": (f"{_LAYER}attention.ln",),
        "layers.{layer}.ffn_norm": (f"{_LAYER}ln",),
        "norm": ("bert.encoder.ln",),
    }
    | _HEADS,
}
MODULES["roberta"] = {
    ours: tuple(name.replace("bert.", "roberta.", 1) for name in theirs)
    for ours, theirs in MODULES["post"].items()
    if ours not in _HEADS
} | {
    "head.dense": ("lm_head.dense",),
    "head.norm": ("lm_head.layer_norm",),
    "head": ("lm_head",),
}
"""Style of the names -> our module -> their modules."""

STYLES = {
    # model_type of their config.json -> style of the names, prefix of the classes
    "bert": ("post", "Bert"),
    "megatron-bert": ("pre", "MegatronBert"),
    "roberta": ("roberta", "Roberta"),
    "xlm-roberta": ("roberta", "XLMRoberta"),
    "camembert": ("roberta", "Camembert"),
}

CLASSES = {
    (True, True): "ForPreTraining",
    (True, False): "ForMaskedLM",
    (False, True): "ForNextSentencePrediction",
    (False, False): "Model",
}
"""Is there an MLM head, and a next-sentence head -> the rest of the class's name."""

CONFIG = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size",
    "vocab_size": "vocab_size",
    "positions": "max_position_embeddings",
    "segments": "type_vocab_size",
    "activation": "hidden_act",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "norm_eps": "layer_norm_eps",
    "init_std": "initializer_range",
}
"""Key of our `model:` block -> key of their config.json."""

CONFIG_DEFAULTS = {
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "layer_norm_eps": 1e-12,
    "initializer_range": 0.02,
}
"""What transformers assumes where config.json is silent; the sizes that are not here must be stated."""

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_new", "gelu_pytorch_tanh": "gelu_new", "relu": "relu"}
"""Their `hidden_act` -> ours; the two tanh approximations are one function."""

SUPPORTED: dict[str, tuple[object, ...]] = {
    "model_type": tuple(STYLES),
    "hidden_act": tuple(ACTIVATIONS),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "quantization_config": (None,),
}
"""Keys of config.json that change what is computed -> the values that ours computes."""

ROBERTA_ACTIVATIONS = ("gelu",)
"""As the others, where the head has this one whatever `hidden_act` says."""

TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
    "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
    "lm_head.decoder.bias": "lm_head.bias",
}
"""Names that older files repeat -> the tensor they must be equal to."""

HEAD_NAMES = tuple(HEAD)
NSP_NAMES = tuple(NSP)


def model_type(model: Model) -> str:
    """Their name of a model's kind."""
    return "megatron-bert" if model.norm == "pre" else model.family


def class_of(model: Model, has_head: bool = True) -> str:
    """transformers' class of a model, with or without MLM head."""
    return STYLES[model_type(model)][1] + CLASSES[has_head, model.nsp]


def base_of(kind: str) -> str:
    """What the encoder's names begin with, in models of a `model_type`."""
    return "roberta." if STYLES[kind][0] == "roberta" else "bert."


def their_names(model: Model, name: str, depth: int | None = None) -> tuple[str, ...]:
    """transformers' names of one of our parameters; `depth` overrides the index of its layer. KeyError if unknown."""
    module, _, kind = name.rpartition(".")
    parts = module.split(".")
    index = parts[1] if parts[0] == "layers" else None
    if index is not None:
        module = ".".join(["layers", "{layer}", *parts[2:]])
        index = index if depth is None else str(depth)
    modules = MODULES[STYLES[model_type(model)][0]]
    return tuple(f"{theirs}.{kind}".replace("{layer}", str(index)) for theirs in modules[module])


def name_map(model: Model) -> dict[str, tuple[str, ...]]:
    """Every parameter of a model without shared layers -> transformers' names, in our order."""
    return {name: their_names(model, name) for name in parameter_shapes(model)}


def part_shape(shape: tuple[int, ...], parts: int) -> tuple[int, ...]:
    """Shape of one of the equal `parts` that a tensor of `shape` is concatenated from."""
    return (shape[0] // parts, *shape[1:])


def canonical(key: str, base: str = "bert.") -> str | None:
    """The present name of a tensor in a file of any age; None for buffers that are no weights.

    base: what the encoder's names begin with.
    """
    if key.endswith((".position_ids", ".token_type_ids")):
        return None
    if key.startswith(("embeddings.", "encoder.", "pooler.")):  # saved from BertModel, without the heads
        key = base + key
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):  # files converted from TensorFlow
        if key.endswith(f"LayerNorm{old}"):
            key = key.removesuffix(old) + new
    return key


def config_of(model: Model) -> Mapping[str, object]:
    """The entries of config.json that describe the shape; `positions` are those that real tokens read."""
    return {theirs: getattr(model, ours) for ours, theirs in CONFIG.items()} | {"vocab_size": model.vocab}
