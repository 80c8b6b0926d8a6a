"""The passes that are left out change no number: the engine beside itself with all of DeepSpeed's own."""

from __future__ import annotations

import pytest

from growth_ds.engine import shortcuts


@pytest.mark.parametrize(
    ("name", "offload"),
    [
        ("DeepSpeedZeroOptimizer_Stage3", False),
        ("DeepSpeedZeroOptimizer", True),
        ("DeepSpeedZeroOptimizer", False),  # of a DeepSpeed whose names are others
    ],
)
def test_other_optimizers_stay_as_they_are(name, offload):
    other = type(name, (), {"cpu_offload": offload})()
    shortcuts.take(other)
    assert vars(other) == {}
