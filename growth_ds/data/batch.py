"""The tensors a training step or a validation step works on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch


@dataclass(frozen=True)
class Batch:
    """Tensors of one batch. `attention_mask` None means every position is real; `nsp_labels` 0 is next, 1 is not."""

    ids: torch.Tensor  # int64 [B, T]
    segments: torch.Tensor  # int64 [B, T]
    attention_mask: torch.Tensor | None  # bool [B, T]
    positions: torch.Tensor  # int64 [M], into the flattened B*T
    labels: torch.Tensor  # int64 [M], -100 is no label
    nsp_labels: torch.Tensor | None  # int64 [B]

    def counts(self) -> dict[str, int]:
        """How many predictions each loss of the batch averages over."""
        counted = {"mlm": int((self.labels >= 0).sum())}
        return counted if self.nsp_labels is None else {**counted, "nsp": int((self.nsp_labels >= 0).sum())}

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`; the copy to a GPU is asynchronous, from pinned memory."""
        if torch.device(device).type != "cuda":
            return self._map(lambda tensor: tensor.to(device))
        return self._map(lambda t: (t if t.is_cuda else t.pin_memory()).to(device, non_blocking=True))

    def without_nsp(self) -> Batch:
        """The batch for a model that does not predict next sentences."""
        return replace(self, nsp_labels=None)

    def rows(self, begin: int, end: int) -> Batch:
        """Rows [begin, end) as a batch of their own."""
        count, length = self.ids.shape
        begin, end, _ = slice(begin, end).indices(count)
        k = len(self.positions) // max(count, 1)
        masked = slice(begin * k, end * k)
        return Batch(
            self.ids[begin:end],
            self.segments[begin:end],
            None if self.attention_mask is None else self.attention_mask[begin:end],
            self.positions[masked] - begin * length,
            self.labels[masked],
            None if self.nsp_labels is None else self.nsp_labels[begin:end],
        )

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: function(value) for name, value in values.items() if value is not None})
