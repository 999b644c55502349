"""Demonstrations alone and in company: runs apart against the host's own, exact parts, sums with known truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import host_z, shared, tokenized
from hosts import prompt as host_prompt
from torch import Tensor

from metaopt_lens import ICLPrompt, MomentumAttention, intervene, load_tiny, wrap
from metaopt_lens._errors import OptionError, PromptError
from metaopt_lens.analysis import DemonstrationAlgebra, demonstration_algebra
from metaopt_lens.analysis._algebra import (
    APART,
    COMPANY,
    CONSTANT,
    OTHER_TASK,
    PARTS,
    SCALED_SUM,
    SUM,
    additivity,
    exchange,
    sizes_of,
)
from metaopt_lens.runs import record, record_apart, tokenize_for

NOUNS = [("apple", "dax"), ("hammer", "wug"), ("pear", "dax"), ("saw", "wug"), ("plum", "dax"), ("drill", "wug")]
ASKED = [("cherry", "dax"), ("pliers", "wug"), ("peach", "dax"), ("chisel", "wug"), ("lemon", "dax"), ("axe", "wug")]


def prompts(n_sets: int = 1) -> list[ICLPrompt]:
    sets = (NOUNS[:4], NOUNS[2:])[:n_sets]
    return [ICLPrompt(demos, query, label=label) for query, label in ASKED for demos in sets]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- runs apart ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bridge:llama", "bridge:gpt2", "bridge:mistral"])
def test_runs_apart_are_the_hosts_own_with_its_scores_masked(name: str) -> None:
    model = shared(name)
    tokens = [tokenized(model, host_prompt(query=query)) for query in ("w16 w17 :", "w18 :")]
    runs = record_apart(wrap(model), tokens)
    for run, text in zip(runs, tokens, strict=True):
        n_layers = wrap(model).info.n_layers

        def hide(scores: Tensor, hook: Any, text: Any = text) -> Tensor:
            scores = scores.clone()
            for i, dst in enumerate(text.demos):
                for src in text.demos[:i]:
                    scores[..., dst.slice, src.slice] = -torch.inf
            return scores

        edits = [(f"blocks.{layer}.attn.hook_attn_scores", hide) for layer in range(n_layers)]
        expected = host_z(model, text.ids, edits=edits)[-1]
        torch.testing.assert_close(run.z[-1], expected.reshape(run.z[-1].shape), rtol=1e-4, atol=1e-5)
        plain = record(wrap(model), [text], settings=("icl",))[0].icl
        assert (plain.z[-1] - run.z[-1]).abs().max() > 1e-3
        torch.testing.assert_close(plain.v_of(0), run.v_of(0))  # the first layer's have read nothing
        first = text.demos[0].slice
        torch.testing.assert_close(plain.v_of(2)[first], run.v_of(2)[first], rtol=1e-4, atol=1e-5)


def test_one_demonstration_alone_has_no_company_to_miss() -> None:
    model = wrap(shared("bridge:llama"))
    tokens = [tokenized(shared("bridge:llama"), host_prompt(1))]
    apart, plain = record_apart(model, tokens)[0], record(model, tokens, settings=("icl",))[0].icl
    torch.testing.assert_close(apart.z, plain.z, rtol=1e-5, atol=1e-6)


def test_the_model_is_left_as_it_was() -> None:
    model = wrap(shared("bridge:llama"))
    tokens = [tokenized(shared("bridge:llama"), host_prompt())]
    before = record(model, tokens, settings=("icl",))[0].icl.z
    record_apart(model, tokens)
    assert torch.equal(record(model, tokens, settings=("icl",))[0].icl.z, before)


# ---- exchange --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bridge:llama", "bridge:gpt2", "bridge:mistral"])
def test_routing_value_and_interaction_are_the_total(name: str) -> None:
    """Exactly, per demonstration; and each is what its sum over tokens says."""
    model = wrap(shared(name))
    tokens = tokenized(shared(name), host_prompt())
    company = record(model, [tokens], settings=("icl",))[0].icl
    apart = record_apart(model, [tokens])[0]
    found = exchange(company, apart)
    recombined = found.routing + found.value + found.interaction
    assert float((recombined - found.total).abs().max()) < 1e-12
    assert float(found.total.abs().max()) > 1e-3
    # The first has read nobody, but shares a softmax with the others, where it is not out of the window.
    seen = bool(company.visible[:, -1, tokens.demos[0].slice].any())
    assert (float(found.total[:, :, 0].abs().max()) > 1e-3) == seen == (name != "bridge:mistral")
    for layer, head, demo in ((0, 1, 0), (1, 2, 3), (2, 3, 1)):
        kv = head * model.info.n_kv_heads // model.info.n_heads
        total, routing = torch.zeros(model.info.d_head).double(), torch.zeros(model.info.d_head).double()
        for i in range(tokens.demos[demo].start, tokens.demos[demo].stop):
            a, b = (float(run.pattern[-1, layer, head, i]) for run in (company, apart))
            v, w = (run.v_of(layer)[i, kv].double() for run in (company, apart))
            total += a * v - b * w
            routing += (a - b) * w
        torch.testing.assert_close(found.total[layer, head, demo], total, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found.routing[layer, head, demo], routing, rtol=1e-10, atol=1e-12)
    size, square, components = sizes_of(found, eps=1e-7)
    known = ~square.isnan()
    assert known[1:].all()
    assert not known[0].any()
    torch.testing.assert_close(sum(components.values())[known], square[known], rtol=1e-10, atol=1e-12)
    whole = found.company.sum(2).norm(dim=-1)
    torch.testing.assert_close(size, found.total.sum(2).norm(dim=-1) / whole)


# ---- sums ------------------------------------------------------------------------------------------------------------


def test_sums_with_known_truth() -> None:
    """An average of the demonstrations' updates is a scaled sum; unrelated ones explain nothing."""
    n = 10
    alone, noise = normal(n, 2, 3, 8, seed=0), normal(n, 2, 3, 8, seed=1)
    found = additivity(
        alone / 4,
        alone=alone,
        company=noise,
        apart=alone / 4,
        other=normal(n, 2, 3, 8, seed=2),
        folds=torch.arange(n) % 5,
        smallest=torch.zeros(n, 2, 3).double(),
    )
    sets = torch.zeros(n, dtype=torch.int64)
    r = {name: float(found.interval(name, sets).estimate) for name in found.errors}
    assert r[SCALED_SUM] == pytest.approx(1, abs=1e-9)
    assert r[APART] == pytest.approx(1, abs=1e-9)
    assert r[SUM] == pytest.approx(-8)  # 1 - |u/4 - u|^2 / |u/4|^2 = 1 - 9
    for name in (COMPANY, OTHER_TASK, CONSTANT):
        assert r[name] < 0.1


def test_every_set_by_itself_and_files_keep_it(tmp_path: Path) -> None:
    model = load_tiny()
    other = [("apple", "wug"), ("hammer", "dax")]
    both = demonstration_algebra(model, prompts(2), other=other, n_folds=3)
    alone = demonstration_algebra(model, prompts(2)[1::2], n_folds=3)
    assert both.sets.tolist() == [0, 1] * 6
    for name in alone.additivity.errors:
        torch.testing.assert_close(
            both.additivity.errors[name][1::2], alone.additivity.errors[name], rtol=1e-3, atol=1e-5
        )
    assert OTHER_TASK in both.additivity.errors
    assert OTHER_TASK not in alone.additivity.errors
    assert both.share("value").n_sets == 2
    table = both.to_frame().set_index("quantity")["estimate"]
    assert sum(table[f"company: {part}"] for part in PARTS) == pytest.approx(1)
    assert "over 2 demonstration sets" in repr(both)
    back = DemonstrationAlgebra.load(both.save(tmp_path / "algebra"))
    assert repr(back) == repr(both)
    assert len(both.plot().data) == 2
    with pytest.raises(OptionError, match="there is no part 'keys': choose one of 'routing'"):
        both.share("keys")


def test_one_alone_is_the_run_with_one() -> None:
    """The sum over demonstrations, by hand, from prompts of one demonstration."""
    model, asked = wrap(load_tiny()), prompts()
    found = demonstration_algebra(model, asked, n_folds=3)
    tokens = tokenize_for(model, asked[0])
    runs = record(model, [tokens], settings=("icl", "zs"))[0]
    total = torch.zeros_like(runs.zs.z[-1])
    for demo in asked[0].demos:
        single = tokenize_for(model, asked[0].with_demos([demo]))
        total += record(model, [single], settings=("icl",))[0].icl.z[-1] - runs.zs.z[-1]
    error = (runs.icl.z[-1] - runs.zs.z[-1] - total).double().square().sum(-1)
    torch.testing.assert_close(found.additivity.errors[SUM][0], error, rtol=1e-3, atol=1e-4)


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    model, asked = load_tiny(), prompts()
    with pytest.raises(PromptError, match="demonstration set 0 has one demonstration: company needs at least two"):
        demonstration_algebra(model, [p.with_demos(p.demos[:1]) for p in asked])
    with pytest.raises(
        PromptError, match="needs at least 5 queries behind every demonstration set, got 3: give 2 more"
    ):
        demonstration_algebra(model, asked[:3])
    with pytest.raises(PromptError, match="another task needs at least one demonstration"):
        demonstration_algebra(model, asked, other=[])
    with pytest.raises(PromptError, match="a prompt has no demonstrations to be read apart"):
        record_apart(wrap(model), [tokenize_for(wrap(model), asked[0].zero_shot())])
    with (
        intervene(model, MomentumAttention(0.5)),
        pytest.raises(OptionError, match="momentum attention is on, and its moving average"),
    ):
        demonstration_algebra(model, asked)
