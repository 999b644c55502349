"""The published numbers of the golden set, through the public functions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from metaopt_lens.analysis import (
    Convention,
    context_columns,
    finetuning_scores,
    kendall_tau,
    rec2ftp,
    sim_am,
    sim_aou,
    topk_recall,
    training_attention,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "dai2022"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
# the README of the golden set: computed in float64 / in float32
DAI, DEUTCH = 1e-9, 1e-6


@pytest.fixture(scope="module")
def inputs():
    with np.load(GOLDEN / "inputs.npz") as archive:
        return {name: torch.from_numpy(archive[name]) for name in archive}


@pytest.fixture(scope="module")
def right(inputs):
    return {kind: inputs[f"{kind}_pred_label"] == inputs["gold_label"] for kind in ("zs", "icl", "ftzs")}


@pytest.fixture(scope="module", params=["all", "f2t"])
def subset(request, right):
    if request.param == "all":
        return "all", torch.ones(32, dtype=torch.bool)
    return "f2t", ~right["zs"] & right["icl"] & right["ftzs"]


def close(values, expected, tolerance):
    assert values.tolist() == pytest.approx(expected, abs=tolerance, rel=0)


def test_rec2ftp(right):
    result = rec2ftp(right["zs"], right["icl"], right["ftzs"])
    block = EXPECTED["dai2022"]
    assert result.require() == block["Recall2FTP"]
    assert {"both": result.both, "icl": result.icl, "ftzs": result.ft} == block["f2t_counts"]


def test_sim_aou(inputs, subset):
    name, queries = subset
    icl, zs, ft = (inputs[f"{kind}_self_attn_out_hiddens"][queries] for kind in ("icl", "zs", "ftzs"))
    means = sim_aou(icl, zs, ft, convention=Convention.PUBLISHED).normalised.mean()
    close(means, EXPECTED["dai2022"][name]["SimAOU"], DAI)
    close(means, EXPECTED["deutch2024"][name]["SimAOU"], DEUTCH)
    close(means.mean(), EXPECTED["dai2022"][name]["overall"]["SimAOU"], DAI)


def test_sim_am(inputs, subset):
    name, queries = subset
    icl, zs, ft = (inputs[f"{kind}_attn_map"][queries] for kind in ("icl", "zs", "ftzs"))
    settings = {"lengths": inputs["query_len"][queries], "convention": Convention.PUBLISHED}
    close(sim_am(icl, ft, **settings).per_query.mean(), EXPECTED["dai2022"][name]["SimAM"], DAI)
    close(sim_am(icl, zs, **settings).per_query.mean(), EXPECTED["dai2022"][name]["ZSL SimAM"], DAI)
    difference = sim_am(icl, ft, baseline=zs, **settings)
    close(difference.per_query.mean(), EXPECTED["deutch2024"][name]["ICL-FTZS SimAM"], DEUTCH)


@pytest.mark.parametrize("convention", [Convention.PUBLISHED, Convention.DEFAULT], ids=lambda c: c.name)
def test_training_attention(inputs, convention):
    """The default differs only where weights underflow or tie at the k-th place: not here."""
    lengths = inputs["demo_len"] - 1
    kept = torch.ones(len(inputs["ft_attn_q"]), dtype=torch.bool)
    kept[inputs["demo_offset"][:-1]] = False
    scores = finetuning_scores(inputs["ft_attn_q"][kept], inputs["ftzs_attn_q"])
    context = inputs["icl_attn_map_ctx"][:, :, context_columns(lengths)]
    maps = training_attention(context, scores, lengths, convention=convention)
    block = EXPECTED["dai2022"]["training_attention"]
    for level, k, pair in (
        ("example", 5, (maps.icl_example, maps.ft_example)),
        ("token", 100, (maps.icl_token, maps.ft_token)),
    ):
        close(kendall_tau(*pair).mean(), block[f"{level}-level kendall"], DAI)
        recall = topk_recall(*pair, k=k, convention=convention)
        close(recall.per_query.mean(), block[f"{level}-level recall_topk"], DAI)
        assert recall.chance == k / pair[0].shape[-1]


def test_zero_update_counts_only_in_the_published_code(inputs):
    icl, zs, ft = (inputs[f"{kind}_self_attn_out_hiddens"] for kind in ("icl", "zs", "ftzs"))
    published = sim_aou(icl, zs, ft, convention=Convention.PUBLISHED).normalised
    default = sim_aou(icl, zs, ft).normalised
    assert published.values[3, 1] == 0
    assert default.n_defined.tolist() == [32, 31, 32]
    torch.testing.assert_close(default.mean()[1], published.mean()[1] * 32 / 31)
    torch.testing.assert_close(default.mean()[[0, 2]], published.mean()[[0, 2]])
