"""A text that a tiny model learns to read from its neighbours within seconds: every token is the one before plus 1."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from growth_ds.config import Model
from growth_ds.data.batch import Batch
from growth_ds.model.bert import Bert
from growth_ds.model.init import initial
from tests.growth.models import changed, small

WORDS, MASK, LENGTH, MASKED = 16, 19, 16, 2
OLD = small(hidden=24, heads=2, head_size=12, ffn=48, positions=LENGTH, vocab_size=20, init_std=0.1)
NEW = changed(OLD, layers=4, hidden=36, heads=3, ffn=144)


def batch(seed: int, rows: int) -> Batch:
    """Rows with MASKED tokens to guess."""
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.randint(WORDS, (rows, 1), generator=generator) + torch.arange(LENGTH)) % WORDS
    columns = torch.rand(rows, LENGTH, generator=generator).topk(MASKED).indices.sort().values
    positions = (columns + LENGTH * torch.arange(rows)[:, None]).flatten()
    labels = ids.flatten()[positions].clone()
    ids.view(-1)[positions] = MASK
    return Batch(ids, torch.zeros_like(ids), None, positions, labels, None)


@functools.cache
def trained(steps: int = 250, rows: int = 64) -> dict[str, Tensor]:
    """Weights of OLD after some steps: it reads its neighbours by then (ln 16 = 2.77 without, near 1.2 with them)."""
    bert = Bert(OLD)
    with torch.no_grad():
        for name, parameter in bert.named_parameters():
            parameter.copy_(initial(OLD, name, 0))
    optimizer = torch.optim.AdamW(bert.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(steps):
        optimizer.zero_grad()
        (bert(batch(step, rows))["mlm"] / (rows * MASKED)).backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in bert.named_parameters()}


class Trained:
    """OLD as a source that an operator learns from."""

    model: Model = OLD

    def tensor(self, kind: str, name: str) -> Tensor:
        """A weight."""
        return trained()[name]
