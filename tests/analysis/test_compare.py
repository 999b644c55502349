"""compare(): every statistic, null, interval and refusal against an independent computation."""

from __future__ import annotations

import dataclasses
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comparison_oracle import Oracle, changed_copy, cos
from hosts import build, host_values, left_as_it_was, shared
from scipy import stats
from torch import Tensor

from metaopt_lens import Demo, ICLPrompt, MetaoptLensError, decompose
from metaopt_lens._errors import ModelMismatchError
from metaopt_lens.analysis import (
    Comparison,
    Controls,
    Convention,
    Measures,
    compare,
    mean_interval,
    randomized_copy,
    shuffle_labels,
    unrelated_update,
)
from metaopt_lens.finetuning import WeightUpdate, finetune
from metaopt_lens.prompts import tokenize_prompt

F64 = torch.float64
WORDS = ("w32", "w36", "w44 w45")
SETS = (
    [("w30 w31", "w32"), ("w34", "w36"), ("w38 w39", "w32"), ("w42", "w36")],
    [("w50 w51 w52", "w36"), ("w54", "w44 w45"), ("w56 w57", "w36")],
)
QUERIES = ("w16 w17", "w18", "w19 w20")
GOLD = (("w36", "w32", "w36"), ("w36", "w44 w45", "w44 w45"))
NAMES = ["bridge:gpt2", "bridge:llama", "bridge:gemma2"]
TOLERANCE = {"bridge:gpt2": 1e-7, "bridge:llama": 5e-5, "bridge:gemma2": 5e-5}  # values are stored in float32


def prompts(index: int) -> list[ICLPrompt]:
    demos = [Demo(*pair) for pair in SETS[index]]
    return [
        ICLPrompt(demos, query, instruction="w21 w22", label=label, candidates=WORDS)
        for query, label in zip(QUERIES, GOLD[index], strict=True)
    ]


@cache
def update_of(name: str, index: int) -> WeightUpdate:
    return finetune(shared(name, F64), prompts(index)[0], lr=1.0, keep_factors=True, progress=False)


def quick(**changes: Any) -> Controls:
    return dataclasses.replace(Controls.of("quick"), **changes)


@cache
def comparison(name: str, convention: Convention = Convention.DEFAULT, **options: Any) -> Comparison:
    options = {
        "progress": False,
        "measures": Measures(subspace_dim=2, convention=convention),
        "controls": quick(n_null_draws=4, shuffled_labels=int(name == "bridge:gpt2")),
    } | options
    updates = [update_of(name, index) for index in range(2)]
    return compare(shared(name, F64), [*prompts(0), *prompts(1)], updates, **options)


@cache
def oracles(name: str) -> list[Oracle]:
    return [Oracle(name, p, update_of(name, index), F64) for index in range(2) for p in prompts(index)]


def check(name: str, statistic: str, expected: list[Tensor], tolerance: float | None = None) -> None:
    found = comparison(name)[statistic].values
    wanted = torch.stack(expected).reshape(found.shape).float()
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance or TOLERANCE[name])
    assert found.isfinite().all()


# ---- statistics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_head_outputs_exact_form(name: str) -> None:
    o = oracles(name)
    ft = [x.z["ft"] - x.z["zs"] for x in o]
    total = [x.z["icl"] - x.z["zs"] for x in o]
    assert min(float(t.norm()) for t in ft) > 1e-2
    check(name, "z total", [cos(a, b) for a, b in zip(total, ft, strict=True)])
    after = [cos(x.through_w_o(a), x.through_w_o(b)) for x, a, b in zip(o, total, ft, strict=True)]
    check(name, "z total, after W_O", after)
    matched = [cos(x.z["icl"] - x.z["zsm"], x.z["ftm"] - x.z["zsm"]) for x in o]
    check(name, "z total, position-matched", matched)
    check(name, "z direct", [cos(x.direct(), b) for x, b in zip(o, ft, strict=True)])
    check(name, "z meta-gradient", [cos(x.meta_gradient(), b) for x, b in zip(o, ft, strict=True)])
    found = comparison(name).norms
    for key, vectors in (("icl", total), ("ft", ft), ("direct", [x.direct() for x in o])):
        torch.testing.assert_close(
            found[key], torch.stack([v.norm(dim=-1) for v in vectors]).float(), rtol=1e-4, atol=1e-6
        )
    mass = torch.stack([x.pattern[:, :, x.tokens.demonstrations.slice].sum(-1) for x in o])
    torch.testing.assert_close(found["mass"], mass.float(), rtol=0, atol=1e-6)


def test_the_in_context_side_is_what_decompose_says() -> None:
    name = "bridge:gpt2"
    for row, (prompt, oracle) in enumerate(zip([*prompts(0), *prompts(1)], oracles(name), strict=True)):
        result = decompose(shared(name, F64), prompt)
        ft = oracle.z["ft"] - oracle.z["zs"]
        for statistic, vector in (
            ("z total", result.effects.total),
            ("z direct", result.effects.direct),
            ("z meta-gradient", result.softmax.meta_gradient),
        ):
            found = comparison(name)[statistic].values[row]
            torch.testing.assert_close(found, cos(vector, ft).float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_linear_form_and_matrices_written_out(name: str) -> None:
    linear, frobenius, left, right, rank_icl, rank_ft = [], [], [], [], [], []
    for x in oracles(name):
        icl, ft = x.matrices
        linear.append(cos(torch.einsum("lhde,lhe->lhd", icl, x.q), torch.einsum("lhde,lhe->lhd", ft, x.q)))
        inner = (icl * ft).sum((-2, -1))
        frobenius.append(inner / (torch.linalg.matrix_norm(icl) * torch.linalg.matrix_norm(ft)))
        (u0, s0, v0), (u1, s1, v1) = (torch.linalg.svd(m) for m in (icl, ft))
        left.append(torch.linalg.svdvals(u0[..., :2].mT @ u1[..., :2]).square().mean(-1))
        right.append(torch.linalg.svdvals(v0[..., :2, :] @ v1[..., :2, :].mT).square().mean(-1))
        for ranks, s in ((rank_icl, s0), (rank_ft, s1)):
            share = s / s.sum(-1, keepdim=True)
            ranks.append(torch.special.entr(share).sum(-1).exp())
    check(name, "linear", linear)
    check(name, "matrices", frobenius)
    loose = 1e-6 if name == "bridge:gpt2" else 1e-3  # singular vectors of close singular values turn easily
    check(name, "subspaces left", left, loose)
    check(name, "subspaces right", right, loose)
    for key, ranks in (("rank_icl", rank_icl), ("rank_ft", rank_ft)):
        torch.testing.assert_close(comparison(name).norms[key], torch.stack(ranks).float(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_layer_metrics(name: str) -> None:
    plain, normalised, null = [], [], []
    maps: dict[str, list[Tensor]] = {"SimAM ICL-FT": [], "SimAM ICL-ZS": [], "SimAM difference": []}
    for x in oracles(name):
        icl, zs, ft = (x.hidden[k].double() for k in ("icl", "zs", "ft"))
        plain.append(cos(icl - zs, ft - zs))
        unit = {k: h / h.norm(dim=-1, keepdim=True) for k, h in (("icl", icl), ("zs", zs), ("ft", ft))}
        normalised.append(cos(unit["icl"] - unit["zs"], unit["ft"] - unit["zs"]))
        null.append(0.5 * ((1 - cos(icl, zs)) * (1 - cos(ft, zs))).sqrt())
        a, z, f = (x.scores(k).double() for k in ("icl", "zs", "ft"))
        for key, first, second in (("SimAM ICL-FT", a, f), ("SimAM ICL-ZS", a, z), ("SimAM difference", a - z, f - z)):
            first, second = (m - m.mean(-1, keepdim=True) for m in (first, second))
            maps[key].append(cos(first, second).mean(-1))
    check(name, "SimAOU", normalised)
    check(name, "SimAOU unnormalised", plain)
    loose = 1e-5 if name == "bridge:gpt2" else 2e-3  # maps of two or three tokens, centred: little is left of them
    for key, values in maps.items():
        if key == "SimAM difference" and name != "bridge:gpt2":  # relative positions: nothing to compare in layer 0
            found = comparison(name)[key].values[..., 0]
            assert found[:, 0].isnan().all()
            torch.testing.assert_close(found[:, 1:], torch.stack(values)[:, 1:].float(), rtol=0, atol=loose)
            continue
        check(name, key, values, loose)
    analytic = comparison(name)["SimAOU"].nulls["analytic"]
    torch.testing.assert_close(analytic, torch.stack(null)[..., None].float(), rtol=0, atol=TOLERANCE[name])


def test_layer_metrics_by_the_published_codes_choices() -> None:
    name = "bridge:gpt2"
    found = comparison(name, convention=Convention.PUBLISHED)
    for row, x in enumerate(oracles(name)):
        value = cos(x.scores("icl"), x.scores("ft")).mean(-1)  # raw scores, not centred
        torch.testing.assert_close(found["SimAM ICL-FT"].values[row, :, 0], value.float(), rtol=0, atol=1e-5)
    assert found.settings["convention"] == "published"
    torch.testing.assert_close(found["z total"].values, comparison(name)["z total"].values)


def _training_maps(name: str, index: int) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """Scores of every query over the demonstrations' tokens, in context and in finetuning."""
    base = shared(name, F64)
    d_head = update_of(name, index).model.d_head
    scale = d_head**-0.5 / torch.arange(1, 4)  # this gpt2 scales by the layer's number too
    tokens, lengths = [], []
    for number, (text, label) in enumerate(SETS[index]):
        model = base
        if number:
            before = finetune(base, SETS[index][:number], lr=1.0, progress=False)
            model = changed_copy(name, before, F64)
        ids = [1, *(int(w[1:]) for w in text.split()), 3, *(int(w[1:]) for w in label.split())]
        q = host_values(model, ids, "attn.hook_q")
        tokens.append(torch.stack([t.reshape(len(t), -1)[1:] for t in q], dim=1) * scale[:, None])
        lengths.append(len(ids) - 1)
    trained = torch.cat(tokens)  # [src, layer, d_q]
    icl, ft = [], []
    for x in oracles(name)[3 * index : 3 * index + 3]:
        q = host_values(x.tuned, x.tokens.zero_shot().ids, "attn.hook_q")
        last = torch.stack([t.reshape(len(t), -1)[-1] for t in q]) * scale[:, None]
        icl.append(x.context_scores())
        ft.append(torch.einsum("sld,ld->ls", trained, last))
    return icl, ft, lengths


@pytest.mark.parametrize("convention", [Convention.DEFAULT, Convention.PUBLISHED], ids=lambda c: c.name)
def test_attention_to_training_tokens(convention: Convention) -> None:
    name = "bridge:gpt2"
    published = convention == Convention.PUBLISHED
    found = comparison(name, convention=convention)
    k = {"token": 6, "example": 1}  # half of the smaller set: 12 tokens, 3 demonstrations
    for index in range(2):
        icl, ft, lengths = _training_maps(name, index)
        for query, (a, b) in enumerate(zip(icl, ft, strict=True)):
            for layer in range(3):
                row = 3 * index + query
                # Words that stand in one place in several demonstrations are tied in layer 0, but for rounding.
                pair = [(m[layer] if published else m[layer].round(decimals=9)).softmax(-1) for m in (a, b)]
                sums = [torch.stack([part.sum() for part in p.split(lengths)]) for p in pair]
                for level, (first, second) in (("token", pair), ("example", sums)):
                    tau = stats.kendalltau(first.numpy(), second.numpy()).statistic
                    noise = 0.05 if published and layer == 0 else 1e-6
                    value = float(found[f"Kendall, {level} level"].values[row, layer, 0])
                    assert value == pytest.approx(tau, abs=noise)
                    top = [set(np.argsort(-v.numpy())[: k[level]].tolist()) for v in (first, second)]
                    recall = found[f"top-{k[level]} recall, {level} level"]
                    assert float(recall.values[row, layer, 0]) == pytest.approx(len(top[0] & top[1]) / k[level])
                    assert float(recall.nulls["chance"][row, layer, 0]) == pytest.approx(k[level] / len(first))
    assert not found["Kendall, token level"].nulls["chance"].any()


# ---- nulls --------------------------------------------------------------------------------------------------------


@cache
def pair_comparison(top_k: int | None = None, **controls: Any) -> Comparison:
    """Two queries: the only way to shuffle them is to swap them."""
    return compare(
        shared("bridge:gpt2", F64),
        prompts(0)[:2],
        update_of("bridge:gpt2", 0),
        controls=Controls(**{"n_null_draws": 4, "unrelated_text": False} | controls),
        measures=Measures(subspace_dim=2, top_k=top_k),
        seed=3,
        progress=False,
    )


def test_other_query_null_is_the_other_querys_finetuning_update() -> None:
    found = pair_comparison()
    first, second = oracles("bridge:gpt2")[:2]
    for row, (x, other) in enumerate(((first, second), (second, first))):
        ft = other.z["ft"] - other.z["zs"]
        for statistic, icl in (
            ("z total", x.z["icl"] - x.z["zs"]),
            ("z direct", x.direct()),
            ("z meta-gradient", x.meta_gradient()),
        ):
            swapped = found[statistic].nulls["other query"][row]
            torch.testing.assert_close(swapped, cos(icl, ft).float(), rtol=0, atol=1e-6)
        plain = cos(x.hidden["icl"] - x.hidden["zs"], other.hidden["ft"] - other.hidden["zs"])
        torch.testing.assert_close(
            found["SimAOU unnormalised"].nulls["other query"][row, :, 0], plain.float(), rtol=0, atol=1e-6
        )
        moved = x.hidden["zs"] + other.hidden["ft"] - other.hidden["zs"]
        unit = [h / h.norm(dim=-1, keepdim=True) for h in (x.hidden["icl"], x.hidden["zs"], moved)]
        normalised = cos(unit[0] - unit[1], unit[2] - unit[1])
        torch.testing.assert_close(
            found["SimAOU"].nulls["other query"][row, :, 0], normalised.float(), rtol=0, atol=1e-6
        )
    assert found["z total"].main_null == "other query"


def test_attention_maps_are_shuffled_among_queries_of_one_length() -> None:
    """The first and third query have two words, the second one has none of its length."""
    found = comparison("bridge:gpt2")["SimAM ICL-FT"]
    x, other = oracles("bridge:gpt2")[0], oracles("bridge:gpt2")[2]
    a, b = (m - m.mean(-1, keepdim=True) for m in (x.scores("icl"), other.scores("ft")))
    torch.testing.assert_close(found.nulls["other query"][0, :, 0], cos(a, b).mean(-1).float(), rtol=0, atol=1e-5)
    assert found.nulls["other query"][1].isnan().all()
    difference = comparison("bridge:gpt2")["SimAM difference"]
    a, b = x.scores("icl") - x.scores("zs"), other.scores("ft") - other.scores("zs")
    a, b = (m - m.mean(-1, keepdim=True) for m in (a, b))
    torch.testing.assert_close(difference.nulls["other query"][0, :, 0], cos(a, b).mean(-1).float(), rtol=0, atol=1e-5)


def test_random_null_is_zero_mean_and_its_expectation_is_known() -> None:
    found = pair_comparison(n_null_draws=400)
    for statistic in ("z total", "linear"):  # the cosine with an isotropic vector of d dimensions: variance 1/d
        draws = found[statistic].nulls["random"]
        assert draws.abs().max() < 5 / math.sqrt(8 * 400)
    after = found["z total, after W_O"].nulls["random"]
    assert after.abs().max() < 5 / math.sqrt(32 * 400)
    assert not found["matrices"].nulls["random"].any()
    for side in ("left", "right"):
        assert set(found[f"subspaces {side}"].nulls) >= {"rotated"}


def test_shuffled_labels_null_is_the_shuffled_prompts_in_context_update() -> None:
    found = pair_comparison()
    demos = shuffle_labels(prompts(0)[0], seed=3).demos
    assert [d.label for d in demos] != [d.label for d in prompts(0)[0].demos]
    for row in range(2):
        x = Oracle("bridge:gpt2", prompts(0)[row].with_demos(demos), update_of("bridge:gpt2", 0), F64)
        ft = x.z["ft"] - x.z["zs"]
        icl, memory = x.matrices
        for statistic, value in (
            ("z total", cos(x.z["icl"] - x.z["zs"], ft)),
            ("z total, position-matched", cos(x.z["icl"] - x.z["zsm"], x.z["ftm"] - x.z["zsm"])),
            ("z direct", cos(x.direct(), ft)),
            ("linear", cos(torch.einsum("lhde,lhe->lhd", icl, x.q), torch.einsum("lhde,lhe->lhd", memory, x.q))),
            ("matrices", cos(icl.flatten(2), memory.flatten(2))),
        ):
            null = found[statistic].nulls["shuffled labels"][row]
            torch.testing.assert_close(null, value.float(), rtol=0, atol=1e-6)
        plain = cos(x.hidden["icl"] - x.hidden["zs"], x.hidden["ft"] - x.hidden["zs"])
        null = found["SimAOU unnormalised"].nulls["shuffled labels"][row, :, 0]
        torch.testing.assert_close(null, plain.float(), rtol=0, atol=1e-6)
    assert "shuffled labels" not in pair_comparison(shuffled_labels=0)["z total"].nulls


def test_a_control_is_the_same_in_context_update_against_another_finetuning_update_of_equal_norm() -> None:
    name = "bridge:gpt2"
    update = update_of(name, 0)
    control = unrelated_update(shared(name, F64), ["w70 w71 w72", "w80 w81"], like=update)
    assert control.norm() == pytest.approx(update.norm())
    assert len(control.losses) == len(update.losses)
    found = compare(
        shared(name, F64),
        prompts(0)[:2],
        update,
        controls=quick(updates={"unrelated": control}),
        progress=False,
    )
    alone = compare(
        shared(name, F64),
        prompts(0)[:2],
        control,
        controls="quick",
        progress=False,
        allow_other_training=True,
    )
    for statistic in alone.statistics:
        if "level" in statistic.name:  # needs the control's own factors
            continue
        torch.testing.assert_close(
            found[statistic.name].nulls["unrelated"], statistic.values, rtol=0, atol=1e-6, equal_nan=True
        )
    for row in range(2):
        x = Oracle(name, prompts(0)[row], control, F64)
        value = cos(x.z["icl"] - x.z["zs"], x.z["ft"] - x.z["zs"])
        torch.testing.assert_close(found["z total"].nulls["unrelated"][row], value.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("keep", [False, True])
def test_random_weights_null_is_the_whole_pipeline_on_a_permuted_copy(keep: bool) -> None:
    name = "bridge:gpt2"
    twin = randomized_copy(shared(name, F64), seed=3, keep_embeddings=keep)
    own = finetune(twin, prompts(0)[0], lr=1.0, progress=False)
    expected = compare(twin, prompts(0)[:2], own, controls="quick", measures=Measures(subspace_dim=2), progress=False)
    found = pair_comparison(random_weights=True)
    label = "random weights, trained embeddings" if keep else "random weights"
    for statistic in ("z total", "linear", "matrices", "SimAOU", "SimAM difference"):
        null = found[statistic].nulls[label]
        torch.testing.assert_close(null, expected[statistic].values, rtol=0, atol=1e-6)
    pairs = zip(shared(name, F64).named_parameters(), twin.parameters(), strict=True)
    embeddings = [(a, b) for (n, a), b in pairs if ("wte" in n or "wpe" in n or "lm_head" in n) and a.any()]
    assert [bool(torch.equal(a, b)) for a, b in embeddings] == [keep] * 3


# ---- intervals and tests ------------------------------------------------------------------------------------------


def test_intervals_of_one_set_are_conditional_and_of_several_are_not() -> None:
    one, two = pair_comparison(), comparison("bridge:gpt2")
    assert one.scope == "conditional on these demonstrations"
    assert one.interval(one["z total"].values).label == one.scope
    assert two.scope == "over 2 demonstration sets"
    assert two.interval(two["z total"].values).label == two.scope
    assert two.sets.tolist() == [0, 0, 0, 1, 1, 1]
    assert two.n_demos == (4, 3)


def test_table_has_estimate_interval_excess_and_adjusted_p() -> None:
    found = comparison("bridge:gpt2")
    statistic = found["z total"]
    frame = found.to_frame()
    rows = frame[frame["statistic"] == "z total"].reset_index(drop=True)
    assert rows[["layer", "head"]].values.tolist() == [[layer, head] for layer in range(3) for head in range(4)]
    direct = mean_interval(statistic.values, sets=found.sets)
    np.testing.assert_allclose(rows["value"], direct.estimate.flatten())
    np.testing.assert_allclose(rows["low"], direct.low.flatten())
    np.testing.assert_allclose(rows["high"], direct.high.flatten())
    excess = (statistic.values - statistic.nulls["other query"]).double()
    by_set = torch.stack([excess[:3].mean(0), excess[3:].mean(0)])
    np.testing.assert_allclose(rows["excess"], by_set.mean(0).flatten(), atol=1e-7)
    assert rows[["p", "p_adjusted"]].isna().all(axis=None)  # two sets are too few to test
    summary = found.summary().set_index("statistic")
    assert summary[["significant", "of"]].isna().all(axis=None)
    assert summary.loc["z total", ["undefined", "values"]].tolist() == [0, 6 * 12]
    np.testing.assert_allclose(rows["null: random"], torch.stack([t.mean(0) for t in statistic.nulls["random"].split(3)]).mean(0).flatten(), atol=1e-7)  # fmt: skip  # noqa: E501
    layers = frame[frame["statistic"] == "SimAOU"]
    assert layers["head"].tolist() == [-1, -1, -1]
    queries = found.to_frame(per_query=True)
    one = queries[(queries["statistic"] == "z total") & (queries["query"] == 4)]
    np.testing.assert_allclose(one["value"], statistic.values[4].flatten())
    assert one["set"].unique().tolist() == [1]


def test_with_three_sets_or_more_the_sets_are_tested() -> None:
    found = comparison("bridge:gpt2")
    tripled = dataclasses.replace(found, sets=torch.tensor([0, 0, 1, 1, 2, 2]), n_demos=(4, 4, 3))
    rows = tripled.to_frame()
    rows = rows[rows["statistic"] == "linear"]
    excess = (found["linear"].values - found["linear"].nulls["other query"]).double().numpy()
    means = np.stack([excess[:2].mean(0), excess[2:4].mean(0), excess[4:].mean(0)])
    p = stats.ttest_1samp(means, 0.0, axis=0).pvalue.flatten()
    np.testing.assert_allclose(rows["p"], p, rtol=1e-6)
    np.testing.assert_allclose(rows["p_adjusted"], stats.false_discovery_control(p), rtol=1e-6)
    adjusted = (rows["p_adjusted"] < 0.05).sum()
    summary = tripled.summary().set_index("statistic")
    assert summary.loc["linear", ["significant", "of"]].tolist() == [adjusted, 12]


def test_summary_is_the_mean_over_heads() -> None:
    found = comparison("bridge:gpt2")
    frame = found.summary().set_index("statistic")
    for statistic in found.statistics:
        means = statistic.values.double().nanmean((1, 2))
        expected = torch.stack([means[:3].nanmean(), means[3:].nanmean()]).mean()
        assert frame.loc[statistic.name, "value"] == pytest.approx(float(expected), abs=1e-6)
        assert frame.loc[statistic.name, "main_null"] in statistic.nulls
    assert set(found["z total"].nulls) == {"other query", "random", "shuffled labels"}


# ---- predictions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bridge:gpt2", "bridge:llama"])
def test_predictions_accuracies_and_recall(name: str) -> None:
    found = comparison(name)
    labels = [[32], [36], [44, 45]]
    for setting in ("zs", "icl", "ft"):
        assert getattr(found, setting).tolist() == [x.prediction(setting, labels) for x in oracles(name)]
    gold = [WORDS.index(label) for labels_ in GOLD for label in labels_]
    assert found.gold is not None
    assert found.gold.tolist() == gold
    table = found.accuracies().set_index("quantity")
    hits = {}
    for setting in ("zs", "icl", "ft"):
        hits[setting] = [int(p == g) for p, g in zip(getattr(found, setting).tolist(), gold, strict=True)]
        assert table.loc[f"accuracy {setting.upper()}", "value"] == pytest.approx(sum(hits[setting]) / 6)
    agree = (found.icl == found.ft).double().mean()  # type: ignore[attr-defined]
    assert table.loc["agreement ICL-FT", "value"] == pytest.approx(float(agree))
    recall = found.rec2ftp()
    wrong = [i for i in range(6) if not hits["zs"][i]]
    assert recall.ft == sum(hits["ft"][i] for i in wrong)
    assert recall.both == sum(hits["ft"][i] and hits["icl"][i] for i in wrong)
    assert recall.zs_wrong == len(wrong)


def test_recall_is_undefined_where_finetuning_corrected_nothing() -> None:
    found = compare(
        shared("bridge:gpt2", F64), prompts(0)[:2], 1e-9 * update_of("bridge:gpt2", 0), progress=False, batch_size=2
    )
    recall = found.rec2ftp()
    assert recall.value is None
    assert recall.undefined is not None
    with pytest.raises(MetaoptLensError, match="finetuning corrected none of the"):
        recall.require()


def test_queries_without_gold_labels() -> None:
    model, update = shared("bridge:gpt2", F64), update_of("bridge:gpt2", 0)
    first, second = prompts(0)[:2]
    bare = ICLPrompt(second.demos, second.query, instruction="w21 w22", candidates=WORDS)
    found = compare(model, [first, bare], update, progress=False)
    assert found.gold is not None
    assert found.gold.tolist() == [1, -1]
    assert found.icl is not None
    for metric in (found.accuracies, found.rec2ftp):
        with pytest.raises(MetaoptLensError, match=r"query 1 has no gold label: set ICLPrompt\(\.\.\., label="):
            metric()


def test_each_query_chooses_among_its_own_candidates() -> None:
    name = "bridge:gpt2"
    model = shared(name, F64)
    first = [dataclasses.replace(p) for p in prompts(0)[:2]]
    own = [ICLPrompt(p.demos, p.query, instruction=p.instruction, candidates=("w36", "w60")) for p in first]
    # No candidates: the labels of the prompt's own demonstrations, not those of the other set.
    second = [ICLPrompt(p.demos, p.query, instruction=p.instruction) for p in prompts(1)[:2]]
    found = compare(model, [*own, *second], [update_of(name, 0), update_of(name, 1)], progress=False)
    assert found.settings["candidates"] == ["w36", "w60", "w44 w45"]
    ids = {"w36": [36], "w60": [60], "w44 w45": [44, 45]}
    for row, allowed in enumerate([("w36", "w60")] * 2 + [("w36", "w44 w45")] * 2):
        x = oracles(name)[(0, 1, 3, 4)[row]]
        for setting in ("zs", "icl", "ft"):
            best = allowed[x.prediction(setting, [ids[word] for word in allowed])]
            assert found.settings["candidates"][int(getattr(found, setting)[row])] == best


def test_open_answers_are_compared_by_the_rule_of_predictions() -> None:
    """Every query has a right label of its own that no demonstration has: it is a candidate of that query alone."""
    name = "bridge:gpt2"
    given = [
        ICLPrompt(p.demos, p.query, instruction=p.instruction, label=label)
        for p, label in zip(prompts(0)[:2], ("w60", "w61 w62"), strict=True)
    ]
    found = compare(shared(name, F64), given, update_of(name, 0), progress=False, controls="quick")
    names = found.settings["candidates"]
    assert names == ["w32", "w36", "w60", "w61 w62"]
    assert found.gold is not None
    assert [names[i] for i in found.gold.tolist()] == ["w60", "w61 w62"]
    ids = {"w32": [32], "w36": [36], "w60": [60], "w61 w62": [61, 62]}
    for row, own in enumerate((("w32", "w36", "w60"), ("w32", "w36", "w61 w62"))):
        x = oracles(name)[row]
        for setting in ("zs", "icl", "ft"):
            assert names[int(getattr(found, setting)[row])] == own[x.prediction(setting, [ids[w] for w in own])]
            absolute = found.answers[setting.upper()]
            total = sum(x.probability(setting, ids[word]) for word in own)
            assert float(absolute.candidate_mass[row]) == pytest.approx(total, rel=1e-4)
            assert int(absolute.label_rank[row]) == x.rank(setting, ids[own[2]][0])
    table = found.accuracies().set_index("quantity")
    right = [int(i) == int(g) for i, g in zip(found.icl, found.gold, strict=True)]  # type: ignore[arg-type]
    assert table.loc["accuracy ICL", "value"] == pytest.approx(sum(right) / 2)


def test_a_single_label_gives_no_predictions() -> None:
    demos = [("w30", "w32"), ("w31", "w32")]
    model = shared("bridge:gpt2", F64)
    update = finetune(model, demos, lr=0.5, progress=False)
    found = compare(model, [ICLPrompt(demos, "w16"), ICLPrompt(demos, "w17")], update, progress=False)
    assert found.icl is None
    with pytest.raises(MetaoptLensError, match="there are no predictions: give the prompts candidates"):
        found.accuracies()
    assert "shuffled labels" not in found["z total"].nulls  # nothing to shuffle


# ---- batches, order, storage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bridge:gpt2", "bridge:llama"])
def test_results_do_not_depend_on_the_batch_size(name: str) -> None:
    whole, single = comparison(name), comparison(name, batch_size=1)
    tolerance = 1e-7 if name == "bridge:gpt2" else 1e-4
    for a, b in zip(whole.statistics, single.statistics, strict=True):
        torch.testing.assert_close(a.values, b.values, rtol=0, atol=tolerance, equal_nan=True)
        for label, null in a.nulls.items():
            torch.testing.assert_close(null, b.nulls[label], rtol=0, atol=tolerance, equal_nan=True)
    assert torch.equal(whole.icl, single.icl)  # type: ignore[arg-type]


def test_queries_come_back_in_the_order_they_were_given() -> None:
    """Sets may be interleaved; every row still belongs to its prompt."""
    name = "bridge:gpt2"
    together = comparison(name)
    order = [3, 0, 4, 1, 5, 2]
    mixed = [[*prompts(0), *prompts(1)][i] for i in order]
    found = compare(
        shared(name, F64),
        mixed,
        [update_of(name, 1), update_of(name, 0)],
        progress=False,
        measures=Measures(subspace_dim=2),
    )
    assert found.sets.tolist() == [0, 1, 0, 1, 0, 1]
    assert found.n_demos == (3, 4)
    for statistic in together.statistics:
        torch.testing.assert_close(found[statistic.name].values, statistic.values[order], rtol=0, atol=1e-7)
    for key, tensor in together.norms.items():
        torch.testing.assert_close(found.norms[key], tensor[order], rtol=0, atol=1e-6)
    for key in ("gold", "zs", "icl", "ft"):
        names = [[c.settings["candidates"][int(i)] for i in getattr(c, key)] for c in (found, together)]
        assert names[0] == [names[1][i] for i in order]


@pytest.mark.parametrize("controls", ["standard", Controls(random_weights=True, unrelated_text=False)])
def test_the_model_is_left_as_it_was(controls: Any) -> None:
    model = build("bridge:llama")
    update = finetune(model, prompts(0)[0], lr=1.0, progress=False)
    with left_as_it_was(model):
        compare(model, prompts(0)[:2], update, progress=False, controls=controls)


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    found = comparison("bridge:gpt2")
    loaded = Comparison.load(found.save(tmp_path / "comparison"))
    for a, b in zip(found.statistics, loaded.statistics, strict=True):
        assert (a.name, a.description, a.level, list(a.nulls)) == (b.name, b.description, b.level, list(b.nulls))
        assert torch.equal(a.values, b.values)
        for label, null in a.nulls.items():
            torch.testing.assert_close(null, b.nulls[label], rtol=0, atol=0, equal_nan=True)
    assert list(loaded.norms) == list(found.norms)
    assert all(torch.equal(t.nan_to_num(9), loaded.norms[name].nan_to_num(9)) for name, t in found.norms.items())
    assert torch.equal(loaded.sets, found.sets)
    assert (loaded.model, loaded.n_demos, loaded.provenance) == (found.model, found.n_demos, found.provenance)
    assert loaded.to_frame().equals(found.to_frame())
    assert loaded.settings["finetuning"][0]["lr"] == 1.0
    assert repr(loaded) == repr(found)
    assert loaded.accuracies().equals(found.accuracies())
    path = tmp_path / "comparison.json"
    path.write_text(path.read_text().replace('"n_demos"', '"demos"'))
    with pytest.raises(MetaoptLensError, match="is not a complete comparison"):
        Comparison.load(path)


def test_same_seed_same_numbers() -> None:
    first, again = pair_comparison(), pair_comparison.__wrapped__()
    for a, b in zip(first.statistics, again.statistics, strict=True):
        for label, null in a.nulls.items():
            assert torch.equal(null, b.nulls[label])


def test_subspaces_of_too_small_a_rank_are_undefined_for_that_head_only() -> None:
    """Keys and values of one head are not changed there, so its dW_FT is 0."""
    name = "bridge:gpt2"
    update = update_of(name, 0)
    heads = [f"L{layer}H{head}" for layer in range(3) for head in range(4) if (layer, head) != (1, 2)]
    found = compare(
        shared(name, F64), prompts(0)[:2], update.select(heads), progress=False, measures=Measures(subspace_dim=2)
    )
    for side in ("left", "right"):
        missing = found[f"subspaces {side}"].values.isnan().all(0)
        assert missing.nonzero().tolist() == [[1, 2]]
    frame = found.to_frame()
    row = frame[(frame["statistic"] == "subspaces left") & (frame["layer"] == 1) & (frame["head"] == 2)]
    assert row[["value", "low", "p"]].isna().all(axis=None)
    assert row["undefined"].item() == row["queries"].item() == 2
    assert int(frame["undefined"].sum()) == sum(s.n_undefined for s in found.statistics)


# ---- refusals -----------------------------------------------------------------------------------------------------


def refused(message: str, prompts_: list[ICLPrompt] | None = None, update: Any = None, **options: Any) -> None:
    given = prompts(0) if prompts_ is None else prompts_
    with pytest.raises(MetaoptLensError, match=message):
        compare(shared("bridge:gpt2", F64), given, update or update_of("bridge:gpt2", 0), progress=False, **options)


def test_prompts_that_cannot_be_compared() -> None:
    refused("no prompts: give at least one", [])
    refused("demonstration set 0 has a single query; the other-query null needs at least two", prompts(0)[:1])
    refused("no demonstrations", [p.with_demos(()) for p in prompts(0)])


def test_as_many_updates_as_sets() -> None:
    both = [*prompts(0), *prompts(1)]
    refused(r"there are 2 demonstration sets, so update must be 2 weight updates.*got 1", both)
    one = update_of("bridge:gpt2", 0)
    refused("so control 'text' must be 1 weight updates.*got 2", controls=Controls(updates={"text": [one, one]}))


def test_candidates_that_cannot_be_told_apart() -> None:
    bare = [ICLPrompt(p.demos, p.query) for p in prompts(0)]
    refused("the candidate labels 'w32' and ' w32' have the same token ids", bare, candidates=("w32", " w32"))
    refused(
        "the candidate labels 'w44' and 'w44 w45' share their first token; score whole labels with scoring='mean'",
        bare,
        candidates=("w44", "w44 w45"),
        measures=Measures(scoring="first"),
    )
    refused(
        "of query 0 is not among its candidates .* add it to them, or leave candidates out", candidates=("w32", "w60")
    )
    refused("at least two candidate labels", bare, candidates=("w32",))
    options: dict[str, Any] = {
        "measures": Measures(scoring="first"),
        "candidates": ("w32", "w44 w45"),
        "progress": False,
    }
    unlabelled = [ICLPrompt(p.demos, p.query) for p in prompts(0)]
    found = compare(shared("bridge:gpt2", F64), unlabelled, update_of("bridge:gpt2", 0), **options)
    assert found.settings["scoring"] == "first"
    for row, prompt in enumerate(unlabelled):
        x = Oracle("bridge:gpt2", prompt, update_of("bridge:gpt2", 0), F64)
        for setting in ("zs", "icl", "ft"):
            assert int(getattr(found, setting)[row]) == x.prediction(setting, [[32], [44]])


def test_counts_that_make_no_sense() -> None:
    with pytest.raises(MetaoptLensError, match="n_null_draws must be at least 1, got 0"):
        Controls(n_null_draws=0)
    with pytest.raises(MetaoptLensError, match="shuffled_labels must be a number of draws, 0 for none, got -1"):
        Controls(shuffled_labels=-1)
    with pytest.raises(MetaoptLensError, match="subspace_dim must be at least 1, got 0"):
        Measures(subspace_dim=0)
    refused("top_k must be from 1 to the 14 demonstration tokens there are, got 15", measures=Measures(top_k=15))
    refused("top_k must be from 1 to the 14 demonstration tokens there are, got 0", measures=Measures(top_k=0))
    refused("controls must be 'quick', 'standard', 'sceptic' or Controls\\(...\\), got 'strict'", controls="strict")
    found = pair_comparison(top_k=14)
    assert bool((found["top-14 recall, token level"].values == 1).all())


def test_updates_that_do_not_belong_here() -> None:
    refused("the update was made with", update=update_of("bridge:llama", 0))
    queries = finetune(shared("bridge:gpt2", F64), prompts(0)[0], lr=0.1, projections=("q",), progress=False)
    refused("the update changes neither keys nor values, which the linear form compares", update=queries)
    refused(
        "this update does not say how it was made",
        update=update_of("bridge:gpt2", 0) + queries,
        controls=Controls(random_weights=True),
    )
    refused("there is no statistic 'z'; this comparison has 'z total'", update=None) if False else None
    with pytest.raises(MetaoptLensError, match="there is no statistic 'z'; this comparison has 'z total'"):
        pair_comparison()["z"]


def test_controls_that_cannot_be_made() -> None:
    model, update = shared("bridge:gpt2", F64), update_of("bridge:gpt2", 0)
    with pytest.raises(MetaoptLensError, match=r"does not say how it was made \(it is a sum\)"):
        unrelated_update(model, ["w70 w71"], like=update + update)

    class Mine(torch.optim.SGD):
        pass

    own = finetune(model, prompts(0)[0], lr=0.1, optimizer=Mine, progress=False)
    with pytest.raises(MetaoptLensError, match="was made with Mine, which is not in torch"):
        unrelated_update(model, ["w70 w71"], like=own)


# ---- updates know what they were trained on -------------------------------------------------------------------------


def test_swapped_updates_are_refused_and_the_set_is_named() -> None:
    """0.1 compared them without a word."""
    model = shared("bridge:gpt2", F64)
    swapped = [update_of("bridge:gpt2", 1), update_of("bridge:gpt2", 0)]
    both = [*prompts(0)[:2], *prompts(1)[:2]]
    with pytest.raises(
        ModelMismatchError, match=r"update of set 0 was not trained on .* but on those of set 1: .*order"
    ):
        compare(model, both, swapped, progress=False)
    other = finetune(model, prompts(0)[0].demos[:1], lr=0.1, progress=False)
    with pytest.raises(ModelMismatchError, match=r"set 1 was not .* on other tokens.*allow_other_training=True"):
        compare(model, both, [update_of("bridge:gpt2", 0), other], progress=False)
    with pytest.raises(ModelMismatchError, match="another choice of BOS: give both the same prepend_bos"):
        compare(model, prompts(0)[:2], update_of("bridge:gpt2", 0), prepend_bos=False, progress=False)
    found = compare(model, both, swapped, allow_other_training=True, controls="quick", progress=False)
    assert len(found.n_demos) == 2


def test_training_ids_are_the_demonstrations_and_survive_algebra_and_files(tmp_path: Path) -> None:
    model = shared("bridge:gpt2", F64)
    mine, other = update_of("bridge:gpt2", 0), update_of("bridge:gpt2", 1)
    tokens = tokenize_prompt(prompts(0)[0], model.tokenizer)
    start = tokens.ids[: 1 if tokens.bos else 0]
    spans = zip(tokens.demo_inputs, tokens.labels, strict=True)
    assert mine.trained_on == tuple(start + tokens.ids[text.start : label.stop] for text, label in spans)
    for same in (0.5 * mine, -mine, mine + 2.0 * mine, mine.select(["L0H0"])):
        assert same.trained_on == mine.trained_on
    assert (mine + other).trained_on is None
    mine.save(tmp_path / "update")
    assert WeightUpdate.load(tmp_path / "update").trained_on == mine.trained_on
    file = tmp_path / "update.json"
    meta = json.loads(file.read_text())
    del meta["trained_on"]  # as 0.1 wrote it
    file.write_text(json.dumps(meta))
    assert WeightUpdate.load(tmp_path / "update").trained_on is None
