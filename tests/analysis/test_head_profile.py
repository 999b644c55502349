"""Scores of heads against their definitions written out, and the table that holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
import torch
from hosts import shared
from scipy import stats

from metaopt_lens import ICLPrompt, compare, decompose, finetune, load_tiny, wrap
from metaopt_lens._errors import OptionError, PromptError
from metaopt_lens.analysis import (
    FunctionVectorHeads,
    HeadProfile,
    attention_scores_of_heads,
    function_vector_heads,
    function_vector_scores,
    head_profile,
    induction_score,
    previous_token_score,
    shuffle_labels,
    spearman_rho,
)
from metaopt_lens.analysis._null_names import OTHER_QUERY
from metaopt_lens.interventions import function_vector, split_queries
from metaopt_lens.runs import tokenize_for

NOUNS = [("apple", "dax"), ("hammer", "wug"), ("pear", "dax"), ("saw", "wug"), ("plum", "dax"), ("drill", "wug")]


def prompts() -> list[ICLPrompt]:
    """Two sets of four demonstrations, two queries each."""
    sets = (NOUNS[:4], NOUNS[2:])
    asked = (("cherry", "dax"), ("pliers", "wug"))
    return [ICLPrompt(demos, query, label=label) for demos in sets for query, label in asked]


@pytest.fixture(scope="module")
def profile() -> HeadProfile:
    return head_profile(load_tiny(), prompts())


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_scores_of_hand_built_patterns() -> None:
    """A head that copies what followed, one that looks one back, and one that looks everywhere."""
    start, period = 1, 5
    n = start + 2 * period
    copies, back = torch.zeros(n, n), torch.zeros(n, n)
    for dst in range(n):
        copies[dst, dst - period + 1 if dst >= start + period else 0] = 1.0
        back[dst, max(dst - 1, 0)] = 1.0
    uniform = torch.ones(n, n).tril()
    uniform = uniform / uniform.sum(-1, keepdim=True)
    patterns = torch.stack([copies, back, uniform])
    induction = induction_score(patterns, period=period, start=start)
    assert induction[0] == 1
    assert induction[1] == 0
    assert float(induction[2]) == pytest.approx(sum(1 / (t + 1) for t in range(6, 11)) / 5)
    previous = previous_token_score(patterns, start=start)
    assert float(previous[0]) == pytest.approx(0.0, abs=1e-6)
    assert previous[1] == 1
    assert float(previous[2]) == pytest.approx(sum(1 / (t + 1) for t in range(2, 11)) / 9)


@pytest.mark.parametrize("name", ["bridge:llama", "bridge:gpt2", "bridge:mistral"])
def test_scores_of_a_model_are_those_of_its_own_patterns(name: str) -> None:
    """From the host's own cache, on the same tokens; a sliding window hides what it hides."""
    model = shared(name)
    induction, previous = attention_scores_of_heads(wrap(model), period=10, n_sequences=2, seed=3)
    tokens = torch.randint(0, 96, (2, 10), generator=torch.Generator().manual_seed(3))
    ids = torch.cat([torch.ones(2, 1, dtype=torch.long), tokens, tokens], dim=1)
    _, cache = model.run_with_cache(ids)
    for layer in range(3):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"]
        for head in range(4):
            slow = [float(pattern[b, head, t, t - 9]) for b in range(2) for t in range(11, 21)]
            assert float(induction[layer, head]) == pytest.approx(sum(slow) / 20, abs=1e-5)
            slow = [float(pattern[b, head, t, t - 1]) for b in range(2) for t in range(2, 21)]
            assert float(previous[layer, head]) == pytest.approx(sum(slow) / 38, abs=1e-5)


def test_function_vector_scores_are_those_of_a_slow_loop() -> None:
    """One head after the other, in a plain run of the host on the prompt with shuffled labels."""
    model = load_tiny()
    asked = prompts()[:2]
    mean_z = torch.stack([decompose(model, text).z for text in asked]).mean(0)
    found = function_vector_scores(wrap(model), asked, mean_z, seed=5)
    for number, text in enumerate(asked):
        tokens = tokenize_for(wrap(model), shuffle_labels(text, seed=5 + number))
        ids = torch.tensor([tokens.ids])
        label = model.tokenizer.encode(f" {text.label}", add_special_tokens=False)[-1]
        with torch.no_grad():
            before = model(ids)[0, -1].softmax(-1)[label]
            for layer, head in [(0, 1), (1, 2), (2, 1), (2, 3)]:

                def put(z: Any, hook: Any, layer: int = layer, head: int = head) -> Any:
                    z = z.clone()
                    z.view(*z.shape[:2], 4, -1)[0, -1, head] = mean_z[layer, head]
                    return z

                logits = model.run_with_hooks(ids, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", put)])
                gain = float(logits[0, -1].softmax(-1)[label] - before)
                assert float(found[number, layer, head]) == pytest.approx(gain, abs=1e-5)


def test_rank_correlation_is_scipys() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(40, generator=generator)
    second = (first + torch.randn(40, generator=generator)).round()  # with ties
    assert float(spearman_rho(first, second)) == pytest.approx(stats.spearmanr(first, second).statistic)
    holes = first.clone()
    holes[3] = torch.nan
    kept = [i for i in range(40) if i != 3]
    assert float(spearman_rho(holes, second)) == pytest.approx(stats.spearmanr(first[kept], second[kept]).statistic)
    assert spearman_rho(first, torch.ones(40)).isnan()
    assert spearman_rho(first[:2], second[:2]).isnan()


# ---- the table -------------------------------------------------------------------------------------------------------


def test_columns_are_what_their_own_functions_say(profile: HeadProfile) -> None:
    asked = prompts()
    split = decompose(load_tiny(), asked)
    table = profile.to_frame().set_index("name")
    assert len(table) == 12
    for name, values in {
        "mass": [item.softmax.mass for item in split],
        "zero_shot_logit": [item.logits().zero_shot for item in split],
        "meta_gradient_logit": [item.logits().meta_gradient for item in split],
    }.items():
        mean = torch.stack(values).double().mean(0)
        assert table[name].tolist() == pytest.approx(mean.flatten().tolist(), abs=1e-4)
    # What a head writes in the label space has at least the size of its component along one direction in it.
    assert (table["task_recognition"] >= table["task_learning"].abs() - 1e-4).all()
    assert table["induction"].between(0, 1).all()
    assert "function_vector: " in repr(profile)


def test_task_learning_is_the_contribution_in_units_of_the_residual_stream() -> None:
    """Times the length of the contrast, over the final norm's scale, it is the head's direct contribution."""
    item = decompose(load_tiny(), prompts()[0])
    from metaopt_lens.analysis._head_scores import task_scores

    said = item.logits()
    _, learning = task_scores(item, said)
    ratio = said.head_total / learning
    assert float(ratio.std() / ratio.mean()) < 1e-3


def test_correlations_have_intervals_over_sets(profile: HeadProfile) -> None:
    found = profile.rank_correlation("mass", "meta_gradient_share")
    per_set = []
    for rows in ((0, 1), (2, 3)):
        one, other = (profile.scores[name][list(rows)].mean(0).flatten() for name in ("mass", "meta_gradient_share"))
        per_set.append(stats.spearmanr(one, other).statistic)
    assert float(found.estimate) == pytest.approx(sum(per_set) / 2)
    half = 12.7062 * abs(per_set[0] - per_set[1]) / 2
    assert float(found.high - found.estimate) == pytest.approx(half, rel=1e-4)
    matrix = profile.rank_correlations()
    assert matrix.loc["mass", "mass"] == pytest.approx(1.0)
    assert matrix.loc["mass", "induction"] == pytest.approx(matrix.loc["induction", "mass"])
    one_set = head_profile(load_tiny(), prompts()[:2], exact=False)
    assert "first_order" in one_set.scores
    assert one_set.rank_correlation("mass", "induction").low.isnan()


def test_with_a_comparison_similarities_stand_in_the_table() -> None:
    model, asked = load_tiny(), prompts()[:2]
    found = compare(model, asked, finetune(model, asked[0], lr=0.02), progress=False)
    profile = head_profile(model, asked, comparison=found, exact=False)
    assert profile.to_frame()["cosine"].tolist() == pytest.approx(
        found["z total"].values.double().nanmean(0).flatten().tolist(), abs=1e-6, nan_ok=True
    )
    excess = (found["z total"].values - found["z total"].nulls[OTHER_QUERY]).double().nanmean(0)
    assert profile.to_frame()["excess"].tolist() == pytest.approx(excess.flatten().tolist(), abs=1e-6, nan_ok=True)
    with pytest.raises(OptionError, match="the comparison is of 2 queries, the profile of 4"):
        head_profile(model, prompts(), comparison=found)
    other = ICLPrompt(NOUNS[2:], "cherry", label="dax")
    with pytest.raises(OptionError, match="queries of the comparison stand behind other demonstration sets"):
        head_profile(model, [asked[0], other], comparison=found)


def test_an_update_is_compared_for_the_table() -> None:
    """Given an update instead of a comparison, both columns are those of `compare` with the quick controls."""
    model, asked = load_tiny(), prompts()
    updates = [finetune(model, asked[index], lr=0.02) for index in (0, 2)]
    profile = head_profile(model, asked, update=updates, exact=False)
    found = compare(model, asked, updates, controls="quick", progress=False)["z total"]
    torch.testing.assert_close(profile.scores["cosine"], found.values.double(), rtol=0, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(profile.scores["excess"], found.excess.double(), rtol=0, atol=1e-6, equal_nan=True)
    assert {"cosine", "excess"} <= set(profile.rank_correlations().columns)
    with pytest.raises(OptionError, match="either a comparison or an update"):
        head_profile(model, asked, update=updates, comparison=compare(model, asked, updates, controls="quick"))


# ---- function-vector heads -------------------------------------------------------------------------------------------


def test_a_profile_scores_function_vectors_on_other_prompts_than_they_are_made_from(profile: HeadProfile) -> None:
    """Half of the prompts give the mean outputs that the other half is scored with, written out prompt by prompt."""
    model, asked = wrap(load_tiny()), prompts()
    z = torch.stack([item.z for item in decompose(model, asked)])
    halves = split_queries(len(asked), 0)
    for made_from, scored in (halves, halves[::-1]):
        assert not set(made_from) & set(scored)
        for index in scored:
            expected = function_vector_scores(model, [asked[index]], z[made_from].mean(0), seed=index)
            assert profile.scores["function_vector"][index].flatten().tolist() == pytest.approx(
                expected[0].flatten().tolist(), abs=1e-6
            )


def test_function_vector_heads_are_chosen_and_judged_on_different_prompts() -> None:
    model, asked = load_tiny(), [*prompts(), *(ICLPrompt(NOUNS[:4], query, label="wug") for query in ("axe", "rake"))]
    found = function_vector_heads(model, asked, 3, seed=1)
    assert sorted([*found.selection.tolist(), *found.held_out.tolist()]) == list(range(6))
    chosen = [asked[index] for index in found.selection.tolist()]
    wrapped = wrap(model)
    mean_z = torch.stack([item.z for item in decompose(wrapped, chosen)]).mean(0)
    scores = torch.cat(
        [function_vector_scores(wrapped, [asked[i]], mean_z, seed=1 + i) for i in found.selection.tolist()]
    )
    torch.testing.assert_close(found.chosen_scores.mean(0), scores.double().mean(0), rtol=0, atol=1e-6)
    best = scores.mean(0).flatten().argsort(descending=True)[:3].tolist()
    assert [4 * ref.layer + ref.head for ref in found.heads] == best
    # The vector is made of the prompts that the heads were chosen on, and nothing else.
    expected = function_vector(model, chosen, found.heads)
    torch.testing.assert_close(found.vector.vector, expected.vector)
    assert found.held_out_scores.shape == (len(found.held_out), 3, 4)
    other = torch.cat(
        [function_vector_scores(wrapped, [asked[i]], mean_z, seed=1 + i) for i in found.held_out.tolist()]
    )
    torch.testing.assert_close(found.held_out_scores, other.double(), rtol=0, atol=1e-6)
    assert found.to_frame()["held_out"].tolist() == pytest.approx(
        [float(other.mean(0)[ref.layer, ref.head]) for ref in found.heads], abs=1e-6
    )


def test_function_vector_heads_round_trip_and_refusals(tmp_path: Path) -> None:
    found = function_vector_heads(load_tiny(), prompts(), 2)
    found.save(tmp_path / "heads")
    loaded = FunctionVectorHeads.load(tmp_path / "heads")
    assert loaded.heads == found.heads
    assert torch.equal(loaded.vector.vector, found.vector.vector)
    assert loaded.to_frame().equals(found.to_frame())
    with pytest.raises(PromptError, match="one prompt is not enough"):
        function_vector_heads(load_tiny(), prompts()[:1], 2)
    with pytest.raises(OptionError, match="n must be between 1 and 12"):
        function_vector_heads(load_tiny(), prompts(), 13)


def test_plots(profile: HeadProfile) -> None:
    matrix = profile.plot()
    assert isinstance(matrix, go.Figure)
    assert len(matrix.data[0].z) == len(profile.scores)
    scatter = profile.plot("mass", "meta_gradient_logit")
    assert len(scatter.data[0].x) == 12
    assert "Spearman's rho" in scatter.layout.title.text
    with pytest.raises(OptionError, match="a scatter plot needs two scores"):
        profile.plot("mass")
    with pytest.raises(OptionError, match="there is no score 'size': choose one of mass"):
        profile.plot("mass", "size")


def test_what_a_profile_needs() -> None:
    with pytest.raises(PromptError, match="no prompts: give at least one"):
        head_profile(load_tiny(), [])
    with pytest.raises(PromptError, match="has no label"):
        head_profile(load_tiny(), [ICLPrompt(NOUNS[:4], "cherry")])


def test_a_profile_round_trip(profile: HeadProfile, tmp_path: Path) -> None:
    profile.save(tmp_path / "profile")
    loaded = HeadProfile.load(tmp_path / "profile")
    assert loaded.to_frame().equals(profile.to_frame())
    assert torch.equal(loaded.sets, profile.sets)
    assert loaded.model == profile.model
    assert loaded.provenance == profile.provenance
    one, other = (found.rank_correlation("mass", "knock_out") for found in (loaded, profile))
    assert (float(one.low), float(one.high)) == (float(other.low), float(other.high))


def test_the_bundled_model_has_no_induction_heads() -> None:
    """In its training no noun came twice, so nothing taught it to look behind an earlier copy of a token."""
    induction, _ = attention_scores_of_heads(wrap(load_tiny()))
    assert 0 < float(induction.max()) < 0.1
