"""A growth method in one file: new heads and FFN units copy those of the later half.

python -m growth_ds.testing examples/recipes/halves.py
growth-ds grow CKPT --recipe examples/recipes/halves.py --to MODEL.yaml --out CKPT2
"""

import torch

from growth_ds.growth.axis_map import AxisMap
from growth_ds.growth.recipe import Ask, recipe


@recipe("halves", axes=("heads", "ffn"), exact={"heads": "always", "ffn": "always"})
def halves(ask: Ask) -> AxisMap:
    """New heads and FFN units copy those of the later half: 0 1 2 3 2 3."""
    half = ask.old // 2
    extra = half + torch.arange(ask.extra) % (ask.old - half)
    return AxisMap.even(torch.cat([torch.arange(ask.old), extra]), ask.old)
