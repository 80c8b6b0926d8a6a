from __future__ import annotations

import pytest
import torch

from growth_ds.ops import philox


def test_known_answers():
    """Those published with Random123 for philox4x32-10: counter 0 and key 0; the key of all ones by our own counter."""
    assert [f"{word:08x}" for word in philox.words(torch.tensor([0]), 1, 4)[0].tolist()] == [
        "6627e8d5",
        "e169c58d",
        "bc57ac4c",
        "9b00dbd8",
    ]


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_statistics_of_the_mask(p):
    rows, width = 512, 512
    first, second = (philox.keep(torch.tensor([seed]), p, rows, width).double() for seed in (1, 2))
    n = rows * width
    assert abs(first.mean() - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5

    def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]) * a.numel() ** 0.5

    pairs = [(first, second), (first[:, 1:], first[:, :-1]), (first[1:], first[:-1]), (first[:, 4:], first[:, :-4])]
    assert max(abs(correlation(a, b)) for a, b in pairs) < 5


def test_a_width_that_is_no_multiple_of_four_is_a_part_of_one_that_is():
    seed = torch.tensor([99])
    assert torch.equal(philox.words(seed, 5, 10), philox.words(seed, 7, 12)[:5, :10])


def test_the_seed_follows_torchs_generator():
    torch.manual_seed(3)
    first, second = philox.new_seed(torch.device("cpu")), philox.new_seed(torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(philox.new_seed(torch.device("cpu")), first)
    assert not torch.equal(first, second)
