"""The shape of one model, and how a stage inherits it from the stage before."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from growth_ds.config.base import Frozen, whole

EXPERT = "expert"
"""The axis of the experts that a feed-forward layer is made of; models with one have no such axis."""

AXES = {
    "layers": "layer",
    "hidden": "hidden",
    "heads": "head",
    "head_size": "head_size",
    "ffn": "ffn",
    "positions": "position",
    "segments": "segment",
    "vocab_size": "vocab",
    "stored_layers": "stored_layer",
    "experts": EXPERT,
}
"""Config key (plural, as in `model:` and `grow:`) -> name of the axis (singular, as in layouts, plans and ledgers)."""

DEFAULT_VOCAB_SIZE = 30522
"""Entries of the published BERT vocabulary; used where neither the model nor a store says how many there are."""


THIN = "thin_ffn"
"""The axis of the feed-forward units in thin layers."""
FFN_RANK = "ffn_rank"
"""The axis between the two factors of a low-rank feed-forward matrix."""
FACTORS = ("first", "second")
"""Modules of the factors of such a matrix: `x.second.weight` times `x.first.weight` stand for `x.weight`."""


MOST = 1 << 14
"""Layers, and experts: what is named one by one; a number from a damaged file would keep us busy for hours."""
Family = Literal["bert", "roberta", "xlm-roberta", "camembert"]


class Model(Frozen):
    """The shape of one BERT, in units (`ffn`: of the feed-forward layer); two keys follow if not given."""

    layers: int = Field(gt=0, le=MOST)
    """Executed transformer layers."""
    hidden: int = Field(gt=0)
    heads: int = Field(gt=0)
    ffn: int = Field(gt=0)
    thin_ffn: int | None = Field(default=None, gt=0)
    """Units of the feed-forward layer in every `thin_every`-th layer (CompoundGrow's `net2net_layers`); else `ffn`."""
    thin_every: int = Field(default=2, gt=1)
    """With `thin_ffn`: layers 0, thin_every, 2 thin_every, ... are thin."""
    ffn_rank: int | None = Field(default=None, gt=0)
    """Each feed-forward matrix is the product of two with so many units between, smaller than it; else one."""
    experts: int = Field(default=1, gt=0, le=MOST)
    """Feed-forward parts of every layer, of `ffn` units each, of which a position goes through one. 1: a plain BERT."""
    routing_seed: int = Field(default=0, ge=0)
    """With experts: of the table token id -> expert (`growth_ds.model.experts.routing_table`)."""
    light_every: int | None = Field(default=None, gt=1)
    """Light attention (CompoundGrow): the last of so many layers uses the attention probabilities of the one before."""
    head_size: int = Field(gt=0)
    """Units of one attention head; hidden / heads unless given, and kept by a growth."""
    stored_layers: int = Field(gt=0)
    """Layers that own weights; layer i runs stored layer i mod stored_layers. Equal to `layers` unless given."""
    shared_runs: tuple[int, ...] | None = None
    """How many depths in a row each stored layer runs at, from the bottom ([3, 5]: 0 0 0 1 1 1 1 1); else by turns."""
    shared_gradient: Literal["sum", "mean"] = "sum"
    """The gradient of a layer that runs at several depths: the sum over them, or their mean (share, then unshare)."""
    vocab_size: int | None = Field(default=None, gt=0)
    """Entries of the vocabulary; the data store's if not given."""
    positions: int = Field(default=512, gt=0)
    """Rows of the learned position table: the longest sequence in tokens."""
    segments: int = Field(default=2, gt=0)
    norm: Literal["post", "pre"] = "post"
    """Where LayerNorm stands: after the residual sum (BERT) or before the block (transformers' MegatronBert)."""
    nsp: bool = False
    """Whether the model has a pooler and the next-sentence head."""
    activation: Literal["gelu", "gelu_new", "relu"] = "gelu"
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    attention_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    family: Family = "bert"
    """Whose Hugging Face folder `growth-ds export` writes. The three others than BERT (as which MegatronBert counts)
    hold the same parameters under other names, and count the positions of a row over its real tokens alone."""
    norm_eps: float = Field(default=1e-12, gt=0.0)
    init_std: float = Field(default=0.02, gt=0.0)

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = {key: whole(value) for key, value in data.items()}
        if data.get("head_size") is None and isinstance(data.get("hidden"), int) and isinstance(data.get("heads"), int):
            hidden, heads = data["hidden"], data["heads"]
            if heads > 0 and hidden % heads:
                raise ValueError(
                    f"heads {heads} do not divide hidden {hidden}; give a head_size, or heads that divide {hidden}"
                )
            data["head_size"] = hidden // heads if heads > 0 else 1
        runs = data.get("shared_runs")
        if isinstance(runs, (list, tuple)):
            data["shared_runs"] = runs = [whole(run) for run in runs]
            data["stored_layers"] = data.get("stored_layers") or len(runs) or 1
            if runs == [1] * len(runs) and len(runs) == data.get("layers"):
                data["shared_runs"] = None  # nothing is shared, which is said in one way alone
        if data.get("stored_layers") is None and "layers" in data:
            data["stored_layers"] = data["layers"]
        return data

    @model_validator(mode="after")
    def _sharing(self) -> Model:
        runs = self.shared_runs
        if runs is not None:
            if min(runs, default=0) < 1 or sum(runs) != self.layers:
                raise ValueError(f"shared_runs {list(runs)} do not add up to layers {self.layers}; give all depths")
            if len(runs) != self.stored_layers:
                raise ValueError(
                    f"shared_runs {list(runs)} are not {self.stored_layers} stored_layers; give one of them"
                )
            if self.thin_ffn is not None:
                raise ValueError("shared_runs: layers of a run are alike, so none can be thin; remove thin_ffn")
        elif self.layers % self.stored_layers:
            raise ValueError(f"stored_layers {self.stored_layers} do not divide layers {self.layers}")
        return self

    @model_validator(mode="after")
    def _thin(self) -> Model:
        if self.thin_ffn is not None and self.thin_ffn > self.ffn:
            raise ValueError(f"thin_ffn {self.thin_ffn} exceeds ffn {self.ffn}")
        return self

    @model_validator(mode="after")
    def _low_rank(self) -> Model:
        if self.ffn_rank is not None and self.thin_ffn is not None:
            raise ValueError("ffn_rank and thin_ffn: either makes the feed-forward layer smaller; give one")
        whole = self.hidden * self.ffn
        if self.ffn_rank is not None and self.ffn_rank * (self.hidden + self.ffn) >= whole:
            raise ValueError(
                f"ffn_rank {self.ffn_rank} makes no matrix of hidden {self.hidden} x ffn {self.ffn} smaller; give at "
                f"most {(whole - 1) // (self.hidden + self.ffn)}, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _expert_layers(self) -> Model:
        if self.experts > 1 and (self.shares_layers or self.thin_ffn is not None or self.ffn_rank is not None):
            key = "stored_layers" if self.shares_layers else "thin_ffn" if self.thin_ffn is not None else "ffn_rank"
            raise ValueError(f"experts {self.experts} need layers that are alike and share nothing; leave out {key}")
        return self

    @model_validator(mode="after")
    def _of_family(self) -> Model:
        wanted = {"norm": "post", "nsp": False, "activation": "gelu"}
        other = next((key for key, value in wanted.items() if getattr(self, key) != value), None)
        if self.family != "bert" and other is not None:
            value = str(wanted[other]).lower()
            raise ValueError(f"family {self.family} has no model with this {other}; give {other}: {value}")
        return self

    def ffn_of(self, layer: int) -> int:
        """Units of the feed-forward layer in stored layer `layer`."""
        return self.ffn if self.thin_ffn is None or layer % self.thin_every else self.thin_ffn

    @model_validator(mode="after")
    def _light(self) -> Model:
        if self.light_every is not None and (self.light_every > self.layers or self.shares_layers):
            raise ValueError(f"light_every {self.light_every} needs as many layers at least, which share no weights")
        if self.light_every is not None and self.experts > 1:
            raise ValueError("light_every and experts do not go together; leave one of them out")
        return self

    def is_light(self, layer: int) -> bool:
        """Whether a layer attends with the probabilities of the one before it."""
        return self.light_every is not None and layer % self.light_every == self.light_every - 1

    def std_of(self, name: str) -> float:
        """Standard deviation of a matrix's initial weights. Of a factor: the product's is then `init_std`."""
        if self.ffn_rank is None or name.split(".")[-2] not in FACTORS:
            return self.init_std
        return float((self.init_std / self.ffn_rank**0.5) ** 0.5)

    @property
    def shares_layers(self) -> bool:
        """Whether one stored layer runs at more than one depth."""
        return self.stored_layers != self.layers

    @property
    def layer_order(self) -> list[int]:
        """Which stored layer runs at each depth."""
        if self.shared_runs is None:
            return [depth % self.stored_layers for depth in range(self.layers)]
        return [stored for stored, run in enumerate(self.shared_runs) for _ in range(run)]

    @property
    def vocab(self) -> int:
        """Entries of the vocabulary."""
        return self.vocab_size or DEFAULT_VOCAB_SIZE

    def sizes(self) -> dict[str, int]:
        """Axis name -> units."""
        sizes = {axis: self.vocab if key == "vocab_size" else getattr(self, key) for key, axis in AXES.items()}
        if self.experts == 1:
            del sizes[EXPERT]  # digests of growths from before there were experts stay what they were
        sizes |= {} if self.thin_ffn is None else {THIN: self.thin_ffn}
        return sizes if self.ffn_rank is None else {**sizes, FFN_RANK: self.ffn_rank}


def inherit_model(previous: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The keys of a `model:` block, missing ones taken from the model before it.

    The head size is kept by a growth, so it is written out; `stored_layers` follows `layers` unless layers are shared,
    and of it and `shared_runs` a new one ends the old other; `thin_ffn: null` ends thin layers, `ffn_rank: null`
    low-rank ones, `light_every: null` light attention.
    """
    runs = previous.get("shared_runs")
    if isinstance(runs, (list, tuple)) and runs and all(run == 1 for run in runs):  # split to the end: none is shared
        previous = {key: value for key, value in previous.items() if key not in ("shared_runs", "stored_layers")}
    ends = (THIN, FFN_RANK, "light_every")
    merged = {**previous, **{key: value for key, value in given.items() if value is not None or key in ends}}
    unshared = previous.get("stored_layers") in (None, previous.get("layers"))
    if given.get("stored_layers") is None and (unshared or given.get("shared_runs") is not None):
        merged.pop("stored_layers", None)
    if given.get("shared_runs") is None and given.get("stored_layers") is not None:
        merged.pop("shared_runs", None)
    hidden, heads = whole(merged.get("hidden")), whole(merged.get("heads"))
    sized = isinstance(hidden, int) and isinstance(heads, int) and heads > 0
    if merged.get("head_size") is None and sized and hidden % heads == 0:
        merged["head_size"] = hidden // heads
    return merged
