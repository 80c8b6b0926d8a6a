"""What a growth says of single layers besides which one they copy: values that replace the copied ones.

Identity insertion needs them: a new layer that writes nothing, and, where LayerNorm stands after
the residual sum, the hand-over of the norm: the layer before normalises without weight and bias, and the new one ends
with the weight and bias that the layer before had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

BODY_OUT = (
    "layers.{layer}.out.weight",
    "layers.{layer}.out.bias",
    "layers.{layer}.down.weight",
    "layers.{layer}.down.bias",
)
INNER, OUTER = "layers.{layer}.attention_norm", "layers.{layer}.ffn_norm"
"""What writes a layer's output, and its norms under post-LN: behind the attention, and at the end."""

Overrides = Mapping[str, Mapping[int, str]]
"""Parameter name in the layout -> new stored layer -> "0", "1", or "layer k": as in old stored layer k."""


def body_out(low_rank: bool) -> tuple[str, ...]:
    """`BODY_OUT`; where `down` is two factors, with the one that writes."""
    return (*BODY_OUT[:2], "layers.{layer}.down.second.weight", BODY_OUT[3]) if low_rank else BODY_OUT


def identities(
    source: Sequence[int], inserted: Sequence[bool], pre_norm: bool, low_rank: bool = False
) -> dict[str, dict[int, str]]:
    """Overrides that make the inserted layers compute nothing.

    `source`: old layer of each new one; `inserted`: which of them are new. A new layer may copy any old one; it stands
    behind a layer that is not new. Raises ValueError if the first layer is inserted.
    """
    if inserted[0]:
        raise ValueError("the first layer cannot be inserted: there is no layer before it whose norm it could take")
    rules: dict[str, dict[int, str]] = {}

    def norm(prefix: str, layer: int, weight: str, bias: str) -> None:
        rules.setdefault(f"{prefix}.weight", {})[layer] = weight
        rules.setdefault(f"{prefix}.bias", {})[layer] = bias

    own = 0  # the old layer whose function the last kept layer computes
    for layer, is_new in enumerate(inserted):
        if not is_new:
            own = source[layer]
            continue
        for pattern in body_out(low_rank):
            rules.setdefault(pattern, {})[layer] = "0"
        if not pre_norm:
            norm(OUTER, layer - 1, "1", "0")
            norm(INNER, layer, "1", "0")
            norm(OUTER, layer, f"layer {own}", f"layer {own}")
    return rules
