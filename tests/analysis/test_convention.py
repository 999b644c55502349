"""Each choice of a `Convention`, changed alone, does what its documentation says and nothing else."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from metaopt_lens.analysis import Convention, cosine, random_like, sim_am, sim_aou, topk_recall, training_attention

GENERATOR = torch.Generator().manual_seed(0)
ZS, ICL, FT = (torch.randn(4, 2, 6, dtype=torch.float64, generator=GENERATOR) for _ in range(3))
MAPS = [torch.randn(4, 2, 3, 5, dtype=torch.float64, generator=GENERATOR) for _ in range(3)]
LENGTHS = torch.tensor([2, 4])
TIED = torch.tensor([[[0.0, 1.0, 1.0, 1.0]]]), torch.tensor([[[0.0, 0.0, 3.0, 1.0]]])
STILL = ICL.clone()
STILL[0] = ZS[0] * (1 + 1e-15)  # the first query is not updated, but for rounding
ZERO = torch.zeros(1, 6, dtype=torch.float64)


def measured(convention: Convention) -> dict[str, Any]:
    """One number, or several, for every choice."""
    weights = training_attention(ZS, FT, LENGTHS, convention=convention)
    return {
        "damping": cosine(ZERO, ZERO + 1, convention=convention).item(),
        "ignores_rounding": sim_aou(STILL, ZS, FT, convention=convention).plain.values[0, 0].item(),
        "centres_maps": sim_am(MAPS[0], MAPS[1], convention=convention).per_head.values,
        "ranks_logarithms": weights.icl_token.sum(-1),
        "shares_ties": topk_recall(*TIED, k=2, convention=convention).per_query.values.item(),
        "random_matches": random_like(ICL, seed=0, convention=convention).norm(dim=-1),
    }


@pytest.mark.parametrize(
    "choice", ["damping", "ignores_rounding", "centres_maps", "ranks_logarithms", "shares_ties", "random_matches"]
)
def test_a_choice_alone(choice: str) -> None:
    published = getattr(Convention.PUBLISHED, choice)
    before, after = measured(Convention.DEFAULT), measured(replace(Convention.DEFAULT, **{choice: published}))
    for name in before:
        same = torch.allclose(torch.as_tensor(before[name]), torch.as_tensor(after[name]), equal_nan=True)
        assert same == (name != choice), name


def test_what_the_choices_give() -> None:
    default, published = measured(Convention.DEFAULT), measured(Convention.PUBLISHED)
    assert default["damping"] != default["damping"]  # NaN: a zero vector has no direction
    assert published["damping"] == 0
    assert default["ignores_rounding"] != default["ignores_rounding"]
    assert -1 <= published["ignores_rounding"] <= 1
    centred = [m - m.mean(-1, keepdim=True) for m in MAPS]
    for found, maps in ((default, centred), (published, MAPS)):
        wanted = torch.nn.functional.cosine_similarity(maps[0], maps[1], dim=-1)
        torch.testing.assert_close(found["centres_maps"], wanted)
    torch.testing.assert_close(published["ranks_logarithms"], torch.ones(4, 2, dtype=torch.float64))
    assert (default["ranks_logarithms"] < 0).all()
    assert default["shares_ties"] == pytest.approx(2 / 3)  # two of three equal entries: each with probability 2/3
    assert published["shares_ties"] in (0.5, 1.0)
    torch.testing.assert_close(default["random_matches"], ICL.norm(dim=-1))
    drawn = random_like(ICL, seed=0, convention=Convention.PUBLISHED)
    assert bool(((drawn >= 0) & (drawn < 1)).all())


def test_the_two_conventions_differ_in_every_choice() -> None:
    for field in fields(Convention):
        assert getattr(Convention.DEFAULT, field.name) != getattr(Convention.PUBLISHED, field.name), field.name
