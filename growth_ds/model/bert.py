"""BERT as published (Devlin et al. 2019, arXiv 1810.04805): how its parts (`blocks.py`) make a model.

Post-LN by default; `norm: pre` is transformers' MegatronBert (no norm after the embeddings, one after the last layer).
The MLM head runs on the masked positions only, and its decoder is the word embedding. So a training step needs the last
output there alone: its queries, its feed-forward layer and its norms are computed for no other (`asked`). Nor is
padding, but in attention: the real positions of a padded batch stand one behind the other as one row (`Ragged`).
For a while after a growth the forward uses more than the weights: `Bert.ramp`.

Shapes: B rows, T positions, H hidden, N heads, D head size, F ffn, V vocabulary, M = B*K predicted positions of a
batch, K of each row, Q positions of each row that a layer is asked for (K, and with NSP the first), or T.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from growth_ds.config import Model, Stage
from growth_ds.errors import UserError
from growth_ds.model import layout
from growth_ds.model.blocks import Embeddings, Head, Layer, Norm, Ramp, Seen, normed
from growth_ds.model.experts import Routes
from growth_ds.ops.light_attention import Lending, rows_of
from growth_ds.ops.local_attention import Local
from growth_ds.ops.ragged import Ragged, flat_places

RAMPS = frozenset({"norm", "head.norm", "hidden", "ffn", "head", "gate"})
"""Keys of a ramp; `Bert.ramp` says what each does."""


class BatchLike(Protocol):
    """What the model reads of a batch (see `growth_ds.data.loader.Batch`)."""

    ids: Tensor
    segments: Tensor
    attention_mask: Tensor | None
    positions: Tensor  # (M,) into the flattened B*T: as many of each row, row by row
    labels: Tensor
    nsp_labels: Tensor | None


def _take(x: Tensor, asked: Tensor) -> Tensor:
    """Positions `asked` (B, Q) of x (B, T, H): (B, Q, H)."""
    rows, length, width = x.shape
    return x.reshape(rows * length, width).index_select(0, flat_places(asked, length)).view(rows, -1, width)


def pooled(x: Tensor, asked: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """CompoundGrow's short sequence (arXiv 2010.12562): states (B, 1 + W + K, H), and where in it each of `asked` is.

    x (B, T, H): embeddings. The first position stays, W windows of `size` others become the mean of those that are not
    asked for, and each of the K positions that are asked for stands behind them by itself. `asked` (B, Q) has one
    column of zeros at most, for the first position. The first layer's keys and values are x's own.
    """
    rows, length, width = x.shape
    columns = (asked > 0).any(dim=0)  # a row in which nothing can be masked has the first position everywhere
    alone = asked[:, columns]  # (B, K)
    counted = x.new_ones(rows, length).scatter(1, alone, 0.0)[:, 1:]
    missing = -(length - 1) % size
    counted = F.pad(counted, (0, missing)).view(rows, -1, size)
    rest = F.pad(x[:, 1:], (0, 0, 0, missing)).view(rows, -1, size, width)
    total = counted.sum(dim=2, keepdim=True)
    means = (rest * (counted / total.clamp(min=1.0))[..., None]).sum(dim=2)  # a window without context is zeros
    short = torch.cat([x[:, :1], means, _take(x, alone)], dim=1)
    place = torch.arange(alone.shape[1], device=x.device) + 1 + means.shape[1]
    where = torch.zeros_like(asked)
    where[:, columns] = place
    return short, where


def _learning(learns: bool) -> Any:
    """Without a backward for what is computed inside, unless it learns."""
    return nullcontext() if learns else torch.no_grad()


class _Undrawn(TorchFunctionMode):
    """Modules inside do not draw their weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def without_weights(model: Model) -> Bert:
    """The module on "meta". Nothing is drawn there: torch would load its compiler for it, which takes a second."""
    with torch.device("meta"), _Undrawn():
        return Bert(model)


def check_rows(model: Model) -> None:
    """Prove that the layout has a row for every parameter of the module. Raises UserError that names the first."""
    module = without_weights(model)
    try:
        layout.check(model, {name: tuple(parameter.shape) for name, parameter in module.named_parameters()})
    except ValueError as error:
        raise UserError(f"model: {error}") from None


class Bert(nn.Module):
    """The model. `forward(batch)` gives the sums that a training step divides by global counts."""

    external_parameters: ClassVar[dict[str, list[str]]] = {"head": ["embeddings.word.weight"]}
    """Parameters that a submodule uses but does not own; ZeRO-3 must gather them for it."""

    activation_checkpointing: bool = False
    """Whether a training step keeps the inputs of layers alone and computes each layer again in the backward."""

    ramp: Ramp | None = None
    """What the forward uses besides the weights, set from outside before each step; None: the plain model.

    fp32 tensors on any device, all optional:
    "norm" (H,): weights >= 0 of the elements in the mean and variance of every norm, of any scale.
    "head.norm" (H,): the same for the norm of the MLM head alone.
    "hidden" (H,): mask on the output of every norm and on the pooled output.
    "ffn" (F,): mask on the FFN's activations. "head" (N,): mask on each attention head's values before `out`.
    "gate" (depths,): g of each executed layer, x + g (layer(x) - x).
    """

    pool: int = 1
    """Neighbouring positions that go through the layers as one (`pooled`), where only some positions are asked for."""

    attention_window: int | None = None
    """Positions to either side that each attends to (`growth_ds.ops.local_attention`), in rows without padding; None:
    all. Set from outside, in training and evaluation alike; the weights are the same."""

    window: tuple[int, int] | None = None
    """(first layer that learns, layers that run) of a training step, set from outside before each; None: all, all."""

    path: frozenset[int] | None = None
    """The depths that a training step runs, the last among them, set from outside before each step; None: all."""

    order: tuple[int, ...] | None = None
    """The stored layer that a training step runs at each depth (`take_order`); None: `layer_order`."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.times: list[int] = []
        """At how many depths each stored layer runs in a training step."""
        self.embeddings = Embeddings(model)
        self.layers = nn.ModuleList(
            Layer(model, model.ffn_of(layer), model.is_light(layer)) for layer in range(model.stored_layers)
        )
        self.norm = Norm(model.hidden, eps=model.norm_eps) if model.norm == "pre" else None
        self.head = Head(model)
        self.pooler = nn.Linear(model.hidden, model.hidden) if model.nsp else None
        self.nsp = nn.Linear(model.hidden, 2) if model.nsp else None
        self.take_order(None)

    @property
    def layer_order(self) -> list[int]:
        """Which stored layer runs at each depth."""
        return self.model.layer_order

    def take_order(self, order: tuple[int, ...] | None) -> None:
        """Set which stored layer training steps run at each depth from now on, every one somewhere; None: as ever."""
        self.order, ran = order, self.layer_order if order is None else list(order)
        self.times[:] = [ran.count(stored) for stored in range(self.model.stored_layers)]

    def compile_layers(self, **options: Any) -> None:
        """Run every layer as `torch.compile(**options)` makes it: one graph for all, with the fused ops as calls."""
        for layer in self.layers:
            layer.compile(**options)

    def read_as(self, stage: Stage) -> None:
        """Read rows as a stage has it: pooled, and within its window."""
        self.pool, self.attention_window = stage.pool, stage.attention_window

    def average_shared(self) -> None:
        """Where the model asks for it, divide the gradient of a stored layer by the number of depths it runs at.

        Once, when its parameters are those that will be trained (Yang et al., arXiv 2110.03848, section 3.1).
        """
        times = self.times  # not self: a parameter that knows its module is freed late

        def divided(stored: int) -> Callable[[Tensor], Tensor]:
            return lambda gradient: gradient if times[stored] == 1 else gradient / times[stored]

        for stored, layer in enumerate(self.layers if self.model.shared_gradient == "mean" else ()):
            for parameter in layer.parameters():
                parameter.register_hook(divided(stored))

    def encode(
        self, ids: Tensor, segments: Tensor, attention_mask: Tensor | None = None, asked: Tensor | None = None
    ) -> Tensor:
        """Hidden states (B, T, H), or (B, Q, H) of the positions `asked` (B, Q) int64 of each row.

        ids, segments (B, T) int64; attention_mask (B, T) bool, None = no padding. With padding every row
        has a real position, those that are asked for are real, and without `asked` the states of padding are zeros.
        """
        is_light = self.model.light_every is not None  # then rows keep their padding
        ragged, where = Ragged.of(None if is_light else attention_mask), asked
        if ragged is not None and asked is not None:
            where = ragged.find(asked)
        order, gates = self.layer_order, self._gates()
        if self.training and self.order is not None:
            order, gates = list(self.order), [gates[stored] for stored in self.order]
        first, depths = self.window if self.training and self.window is not None else (0, len(order))
        with _learning(first == 0):
            x = self.embeddings(ids, segments, ramp=self.ramp, ragged=ragged)
        zero: Tensor | float = 0.0  # with gradients of zeros
        if first:
            zero = 0.0 * self.embeddings(ids[:1, :1], segments[:1, :1], ramp=self.ramp).sum()
        routes = Routes.of(self.model, ids, ragged)
        kept: Tensor | None = None
        if self.pool > 1 and ragged is None and asked is not None:
            kept, where = pooled(x, asked, self.pool)
        seen = ragged if self.attention_window is None else self._local(ragged, where)
        lent: Tensor | None = None  # probabilities of the layer before, if the next one uses them
        for depth, (stored, gate) in enumerate(zip(order, gates, strict=True)):
            if depth == depths - 1 and where is not None:
                kept, routes = _take(x, where), routes and routes.taken(where)
            runs = depth < depths and not (self.training and self.path is not None and depth not in self.path)
            if not (runs and depth >= first):
                zero = zero + self._left_out(self.layers[stored], x)
            if not runs:
                continue
            with _learning(depth >= first):
                if is_light:
                    y, lent = self._lending(depth, x, kept, where, attention_mask, lent)
                else:
                    y = self._layer(self.layers[stored], x, kept, seen, routes=routes)
            # A closed gate gives x to the last bit; its layer is computed, for ZeRO expects every gradient.
            if gate != 1.0:
                x = x if kept is None else kept
                y = x + gate * (y - x)
            x, kept = y, None
        x = x + zero if isinstance(zero, Tensor) else x
        x = x if self.norm is None else normed(self.norm, x, self.ramp)
        if is_light and attention_mask is not None and asked is None:
            return x * attention_mask[..., None]
        if ragged is None:
            return x
        return ragged.spread(x) if asked is None else x.view(*asked.shape, -1)

    def _left_out(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Zero, with a gradient of zeros for a layer that does not run: one position goes through it. ZeRO waits for
        every gradient, and in stage 3 gathers a weight only where its module is called."""
        return 0.0 * self._layer(layer, x[:1, :1].detach(), None, None).sum()

    def _local(self, ragged: Ragged | None, where: Tensor | None) -> Local:
        assert self.attention_window is not None
        if ragged is not None or self.pool > 1:
            raise UserError("attention_window: rows with padding or pooled positions need full attention")
        return Local(self.attention_window, where)

    def _lending(
        self, depth: int, x: Tensor, kept: Tensor | None, where: Tensor | None, mask: Tensor | None, lent: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """One layer of a model with light attention; beside its output its probabilities, if the next one uses them."""
        if self.model.is_light(depth):
            assert lent is not None, "a light layer is never the first"
            lent = lent if kept is None or where is None else rows_of(lent, where)
            return self._layer(self.layers[depth], x, kept, None, lent=lent), None
        lends = depth + 1 < self.model.layers and self.model.is_light(depth + 1)
        y = self._layer(self.layers[depth], x, kept, Lending(mask) if lends or mask is not None else None)
        return y if isinstance(y, tuple) else (y, None)

    def _layer(self, layer: nn.Module, x: Tensor, kept: Tensor | None, ragged: Seen, **more: Any) -> Any:
        if not (self.activation_checkpointing and torch.is_grad_enabled()):
            return layer(x, ramp=self.ramp, kept=kept, ragged=ragged, **more)
        # It restores torch's random state, from which every dropout comes.
        return checkpoint(layer, x, ramp=self.ramp, kept=kept, ragged=ragged, use_reentrant=False, **more)

    def _gates(self) -> list[float]:
        """The gate of each depth; ValueError for a ramp that the model does not know."""
        unknown = sorted(set(self.ramp or ()) - RAMPS)
        if unknown:
            raise ValueError(f"ramp: {unknown[0]!r} is unknown; there are {', '.join(sorted(RAMPS))}")
        if self.ramp is None or "gate" not in self.ramp:
            return [1.0] * self.model.layers
        return self.ramp["gate"].tolist()

    def next_sentence(self, first: Tensor) -> Tensor | None:
        """Hidden states (B, H) of the rows' first positions -> logits (B, 2): next, not next; None without the head."""
        if self.pooler is None or self.nsp is None:
            return None
        pooled = torch.tanh(self.pooler(first))
        if self.ramp is not None and "hidden" in self.ramp:
            pooled = pooled * self.ramp["hidden"].to(pooled)
        return self.nsp(pooled)

    def predict(self, ids: Tensor, segments: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Every position's MLM logits (B, T, V) and the NSP logits (B, 2) or None. Those of padding mean nothing."""
        hidden = self.encode(ids, segments, mask)
        return self.head(hidden, self.embeddings.word.weight, ramp=self.ramp), self.next_sentence(hidden[:, 0])

    def forward(self, batch: BatchLike) -> dict[str, Any]:
        """Scalar sums over the batch: "mlm" (labels >= 0) and "nsp" loss in nats; in eval mode "mlm_correct"."""
        rows, length = batch.ids.shape
        asked = batch.positions.view(rows, -1) - torch.arange(rows, device=batch.positions.device)[:, None] * length
        predicted = asked.shape[1]
        nsp_labels = None if self.nsp is None else batch.nsp_labels
        if nsp_labels is not None:
            asked = F.pad(asked, (0, 1))  # the first position of each row too
        hidden = self.encode(batch.ids, batch.segments, batch.attention_mask, asked)  # (B, Q, H)
        masked = hidden[:, :predicted].flatten(0, 1)  # (M, H)
        loss, correct = self.head(masked, self.embeddings.word.weight, ramp=self.ramp, labels=batch.labels)
        sums = {"mlm": loss} if self.training else {"mlm": loss, "mlm_correct": correct}
        if nsp_labels is not None:
            answers = self.next_sentence(hidden[:, -1])
            assert answers is not None
            sums["nsp"] = F.cross_entropy(answers.float(), nsp_labels, reduction="sum")
        return sums
