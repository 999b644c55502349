"""How many heads recover the gain: the last upward crossing of planted curves, and the coverage of its interval."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from metaopt_lens import MetaoptLensError
from metaopt_lens.interventions import recovery


def test_the_last_upward_crossing_counts() -> None:
    """The curve reaches 90 % with two heads, falls to 40 % with three, and stays above from five on."""
    curve = torch.tensor([0.0, 0.5, 0.95, 0.4, 0.7, 0.92, 0.91, 1.0])
    for gain in (2.0, -3.0):  # a loss falls
        found = recovery(7.0 + gain * curve.repeat(3, 1), 0.9, "held-out queries")
        assert found.n_heads == 5
        torch.testing.assert_close(found.curve, curve.double(), atol=1e-6, rtol=0)
        assert (found.low, found.high) == (5, 5)  # three equal units
    assert recovery(curve[None], 0.5, "held-out queries").n_heads == 4
    assert recovery(curve[None], 1.0, "held-out queries").n_heads == 7


def test_what_cannot_be_known_is_undefined() -> None:
    curve = torch.tensor([[0.0, 0.5, 1.0]])
    one = recovery(curve, 0.9, "demonstration sets")
    assert (one.n_heads, one.low, one.high) == (2, None, None)
    assert one.note == "one of the demonstration sets alone gives no interval"
    unsure = recovery(torch.tensor([[0.0, 0.5, 1.0], [0.0, -0.3, -0.5]]), 0.9, "held-out queries")
    assert (unsure.low, unsure.high) == (None, None)
    assert "the gain itself is not shown to differ from 0, conditional on these demonstrations" in unsure.note
    with pytest.raises(MetaoptLensError, match="not defined for a single query"):
        recovery(torch.empty(0, 3), 0.9, "held-out queries")
    with pytest.raises(MetaoptLensError, match="no gain to recover"):
        recovery(torch.ones(2, 3), 0.9, "held-out queries")
    with pytest.raises(MetaoptLensError, match="share must lie above 0"):
        recovery(curve, 0.0, "held-out queries")


MEAN = torch.cat([torch.linspace(0, 0.96, 13), torch.linspace(0.97, 1.0, 8)])


def _planted(n_units: int, generator: torch.Generator) -> Tensor:
    """Curves around a mean that rises slowly through 90 %, with gains that differ from unit to unit."""
    gain = 3 + 0.5 * torch.randn(n_units, 1, generator=generator)
    steps = 0.15 * torch.randn(n_units, len(MEAN), generator=generator).cumsum(1)
    bridge = steps - steps[:, :1] - torch.linspace(0, 1, len(MEAN)) * (steps[:, -1:] - steps[:, :1])
    return gain * MEAN + bridge  # all units begin at 0 and end at their gain


@pytest.mark.parametrize("n_units", [2, 3, 5, 10])
def test_the_interval_covers_the_planted_crossing(n_units: int) -> None:
    generator = torch.Generator().manual_seed(n_units)
    truth = recovery(
        torch.cat([torch.linspace(0, 0.96, 13), torch.linspace(0.97, 1.0, 8)])[None], 0.9, "held-out queries"
    )
    found = [recovery(_planted(n_units, generator), 0.9, "held-out queries") for _ in range(600)]
    known = [f for f in found if f.low is not None and f.high is not None]
    covered = [f.low <= truth.n_heads <= f.high for f in known]  # type: ignore[operator]
    assert len(known) > (500 if n_units > 2 else 100)
    assert sum(covered) / len(known) >= 0.93
    if n_units == 10:  # and it says something
        assert sum(f.high - f.low for f in known) / len(known) < 10  # type: ignore[operator]
