"""Mango (Pan et al., arXiv 2310.10699): one full map of all layer matrices, factored as a tensor-ring MPO.

The matrices of all layers, cut into pieces of hidden x hidden, are one tensor M[B, O, I, L]: piece (query, key, value,
out, the pieces of up, those of down), output unit, input unit, layer. Four cores S_X [R, old X, new X, R] in a ring map
it, so that every new weight depends on every old one:

    M_new[c,x,z,y] = sum S_B[p,b,c,q] S_O[q,o,x,r] S_L[r,l,y,s] S_I[s,i,z,p] M[b,o,i,l]

Where a tensor lacks some of the four axes, the ring is closed over the cores that it has (our reading; the paper says
no more than that they share them): vectors of layers by S_O and S_L, vectors and tables outside them by S_O, the square
matrices of the heads by S_O and S_I, the next-sentence classifier, which reads the stream, by S_I. The FFN bias is cut
as its matrix is, and piece c comes from piece c mod (old pieces). The decoder stays the word embedding.

Start (the paper's is not known to us): the rank's first channel is LiGO's, S_O = S_I = [I; M] with rows that sum to 1,
S_L the noisy stack, S_B piece by piece (readers of repeated FFN pieces take their share); every other entry is uniform
within +-0.1 / (old units), so that all get a gradient. An axis that does not grow starts as the identity, and is
learned too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from growth_ds.config import Model
from growth_ds.errors import UserError
from growth_ds.growth import draw
from growth_ds.growth.learned.operator import Blend, Operator, Tables, noisy_stack, uniform_rows

SQUARE = 4
"""Pieces of attention: query, key, value, out."""
QUIET = 0.1
"""Bound of the entries outside the first channel, times the old units."""


class Mango(Operator):
    """Four cores [rank, old, new, rank]."""

    mixed: Tensor
    """S_B, over the pieces."""
    made: Tensor
    """S_O."""
    depth: Tensor
    """S_L."""
    read: Tensor
    """S_I."""

    def __init__(self, old: Model, new: Model, rank: int = 1, blend: Blend | None = None) -> None:
        """Raises UserError where matrices are no multiples of hidden x hidden."""
        super().__init__(old, new, rank, blend)
        self.pieces = (pieces_of(old), pieces_of(new))
        sizes = {
            "mixed": tuple(SQUARE + 2 * count for count in self.pieces),
            "made": (old.hidden, new.hidden),
            "depth": (old.stored_layers, new.stored_layers),
            "read": (old.hidden, new.hidden),
        }
        for name, (before, after) in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(rank, before, after, rank)))

    @torch.no_grad()
    def draw(self, seed: int) -> Mango:
        for name, core in self.named_parameters():
            before = core.shape[1]
            noise = draw.uniform(draw.key(seed, f"mango/{name}"), core.numel()).reshape(core.shape)
            core.copy_((2 * noise - 1) * QUIET / before)
            core[0, :, :, 0] = self._start(name, seed).T
        return self

    def _start(self, name: str, seed: int) -> Tensor:
        """float64 [new, old]: the first channel of a core."""
        if name == "mixed":
            return self._repeated()
        _, old, new, _ = self.get_parameter(name).shape
        if old == new:
            return torch.eye(old, dtype=torch.float64)
        if name == "depth":
            return noisy_stack(new, old, draw.key(seed, "mango/stack"))[0]
        mix = uniform_rows(torch.Size((new - old, old)), draw.key(seed, "mango/width"))  # one for makers and readers
        return torch.cat([torch.eye(old, dtype=torch.float64), mix])

    def _repeated(self) -> Tensor:
        """Every piece from its own, more FFN pieces from the old ones in turn, readers divided among them."""
        old, new = self.pieces
        start = torch.zeros(SQUARE + 2 * new, SQUARE + 2 * old, dtype=torch.float64)
        start[:SQUARE, :SQUARE] = torch.eye(SQUARE, dtype=torch.float64)
        source = torch.arange(new) % old
        share = 1.0 / torch.bincount(source, minlength=old)[source].double()
        start[SQUARE + torch.arange(new), SQUARE + source] = 1.0
        start[SQUARE + new + torch.arange(new), SQUARE + old + source] = share
        return start

    def forward(self, small: Tables) -> dict[str, Tensor]:
        grown = {pattern: self._alone(pattern, table) for pattern, table in small.items() if "{layer}" not in pattern}
        for pattern in small:
            if "{layer}" in pattern and small[pattern].ndim == 2:
                grown[pattern] = self._vectors(pattern, small[pattern])
        return grown | self._matrices(small)

    def _matrices(self, small: Tables) -> dict[str, Tensor]:
        """All matrices of all layers, by the whole ring."""
        name, old, new = "layers.{{layer}}.{}.weight".format, self.old, self.pieces[1]
        qkv = small[name("qkv")].unflatten(1, (3, old.hidden)).movedim(1, 0)
        out = small[name("out")][None]
        up = small[name("up")].unflatten(1, (self.pieces[0], old.hidden)).movedim(1, 0)
        down = small[name("down")].unflatten(2, (self.pieces[0], old.hidden)).movedim(2, 0)
        x = torch.cat([qkv, out, up, down])  # (B, L, O, I)
        x = torch.einsum("pbcq,bloi->pqcloi", self.mixed, x)
        x = torch.einsum("qoxr,pqcloi->prclxi", self.made, x)
        x = torch.einsum("rlys,prclxi->pscyxi", self.depth, x)
        x = torch.einsum("sizp,pscyxi->cyxz", self.read, x)  # (B, L, O, I), grown
        qkv, out, up, down = x.split([3, 1, new, new])
        return {
            name("qkv"): qkv.movedim(0, 1).flatten(1, 2),
            name("out"): out[0],
            name("up"): up.movedim(0, 1).flatten(1, 2),
            name("down"): down.movedim(0, 2).flatten(2, 3),
        }

    def _vectors(self, pattern: str, table: Tensor) -> Tensor:
        """[layers, n * hidden], n vectors of each layer, by S_O and S_L."""
        x = table.unflatten(1, (-1, self.old.hidden))
        if pattern == "layers.{layer}.up.bias":
            x = x[:, torch.arange(self.pieces[1], device=x.device) % self.pieces[0]]
        x = torch.einsum("qoxr,lno->qrlnx", self.made, x)
        return torch.einsum("rlyq,qrlnx->ynx", self.depth, x).flatten(1)

    def _alone(self, pattern: str, table: Tensor) -> Tensor:
        """A tensor outside the layers."""
        if pattern in ("head.bias", "nsp.bias"):
            return table
        if pattern == "nsp.weight":
            return torch.einsum("rizr,ni->nz", self.read, table)
        if pattern in ("head.dense.weight", "pooler.weight"):
            x = torch.einsum("qoxr,oi->qrxi", self.made, table)
            return torch.einsum("rizq,qrxi->xz", self.read, x)
        return torch.einsum("roxr,...o->...x", self.made, table)


def pieces_of(model: Model) -> int:
    """Pieces of hidden x hidden in each FFN matrix. Raises UserError for a model that is not made of such pieces."""
    if model.heads * model.head_size != model.hidden:
        raise UserError(
            f"grow.recipe: mango needs heads x head_size to be hidden, not {model.heads} x {model.head_size} beside "
            f"{model.hidden}; use ligo"
        )
    if model.ffn % model.hidden:
        raise UserError(f"grow.recipe: mango cuts ffn {model.ffn} into pieces of hidden {model.hidden}; use ligo")
    return model.ffn // model.hidden
