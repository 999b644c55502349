"""Where in output space two updates agree: the parts make up the whole, and say where a planted direction lies."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hosts import shared, tokenized

from metaopt_lens import ICLPrompt
from metaopt_lens._errors import PromptError
from metaopt_lens.analysis import Comparison, Controls, compare
from metaopt_lens.analysis._output_parts import PARTS, Subspaces, check_labels, label_subspaces
from metaopt_lens.analysis._output_space import OutputSpace
from metaopt_lens.analysis._pairs import PAIRS, part_name
from metaopt_lens.analysis._query_batch import share_name
from metaopt_lens.analysis._similarity import cosine, unit
from metaopt_lens.decomposition import decompose
from metaopt_lens.finetuning import finetune
from metaopt_lens.models import wrap
from metaopt_lens.runs import Setting, record, through_w_o

F64 = torch.float64
SETTINGS: tuple[Setting, ...] = ("icl", "zs", "ft")
NAMES = ["bridge:gpt2", "bridge:llama", "bridge:gemma2"]
LABELS = ((32, 36, 44), (32, 36, 44), (50, 51), (32, 36, 44), (36, 50))
DEMOS = [("w30 w31", "w32"), ("w34", "w36"), ("w38 w39", "w32"), ("w42", "w36")]
PROMPTS = [ICLPrompt(DEMOS, q, label=label) for q, label in (("w16 w17", "w36"), ("w18", "w32"), ("w19 w20", "w32"))]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("name", NAMES)
def test_parts_recombine_to_the_total_cosine(name: str) -> None:
    """cos = sum of (|u_p| |u'_p| / |u| |u'|) cos_p, and |u|^2 is the sum of the parts' squares, to 1e-12."""
    model = wrap(shared(name, F64))
    info, space = model.info, OutputSpace(wrap(shared(name, F64)))
    first, second = (randn(5, info.n_layers, info.n_heads, info.d_head, seed=s) for s in (0, 1))
    wholes = [through_w_o(model, z).double() for z in (first, second)]
    squares, weighted = [], []
    for part in PARTS:
        parts = [space.part(z, LABELS, part) for z in (first, second)]
        squares.append(torch.stack([p.square().sum(-1) for p in parts]))
        weights = parts[0].norm(dim=-1) * parts[1].norm(dim=-1) / (wholes[0].norm(dim=-1) * wholes[1].norm(dim=-1))
        weighted.append(weights * cosine(*parts))
        assert float(weights.min()) > 0
    sizes = torch.stack([w.square().sum(-1) for w in wholes])
    torch.testing.assert_close(torch.stack(squares).sum(0) / sizes, torch.ones_like(sizes), rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.stack(weighted).sum(0), cosine(*wholes), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_layers_recombine_too(name: str) -> None:
    model = wrap(shared(name, F64))
    space = OutputSpace(model)
    written = randn(5, model.info.n_layers, 1, model.info.d_model)
    squares = [space.stream_part(written, LABELS, part).square().sum(-1) for part in PARTS]
    torch.testing.assert_close(torch.stack(squares).sum(0), written.square().sum(-1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_contrast_part_is_all_that_a_difference_of_logits_sees(name: str) -> None:
    """Direct logit contributions (section 8) come from the contrast part alone, up to the norms' scales."""
    model = wrap(shared(name, F64))
    result = decompose(shared(name, F64), PROMPTS[0])
    z = result.at_last_position().softmax.meta_gradient.detach().double()[None]
    said = result.logits("w36", versus=("w32", "w44"))
    labels = (32, 36, 44)
    space = OutputSpace(model)
    inside = space.part(z, [labels], "contrast")[0]
    for layer in range(model.info.n_layers):
        spaces = label_subspaces(model, labels, layer)
        weights = model.head.w_u.detach().double()
        direction = weights[:, 36] - weights[:, [32, 44]].mean(-1)
        for norm in (model.head.fixed_norm, model.norm_after_attention(layer)):
            direction = direction if norm is None else norm.pulled_back(direction[None], torch.ones(1).double())[0]
        seen = inside[layer] @ (spaces.contrast.mT @ direction.detach())
        scale = said.meta_gradient[layer].detach().double() / seen
        torch.testing.assert_close(scale, scale[:1].expand_as(scale), rtol=1e-4, atol=0)


def test_subspaces_are_orthonormal_and_split_known_directions() -> None:
    directions = randn(3, 10)
    spaces = Subspaces.of(directions)
    both = torch.cat([spaces.contrast, spaces.format], dim=1)
    torch.testing.assert_close(both.mT @ both, torch.eye(3, dtype=F64), rtol=0, atol=1e-12)
    assert [spaces.dims(part) for part in PARTS] == [2, 1, 7]
    difference = directions[0] - directions[2]
    assert float(spaces.coordinates(difference, "contrast").norm()) == pytest.approx(float(difference.norm()))
    for part in ("format", "rest"):
        assert float(spaces.coordinates(difference, part).norm()) < 1e-12  # type: ignore[arg-type]
    assert float(spaces.coordinates(directions.mean(0), "rest").norm()) < 1e-12
    along = directions @ spaces.format
    torch.testing.assert_close(along, along[:1].expand_as(along), rtol=0, atol=1e-12)
    centred = Subspaces.of(directions - directions.mean(0))  # the mean adds nothing: no format
    assert [centred.dims(part) for part in PARTS] == [2, 0, 8]


@cache
def comparison() -> Comparison:
    model = shared("bridge:llama", F64)
    update = finetune(model, PROMPTS[0], lr=1.0, keep_factors=True, progress=False)
    return compare(model, PROMPTS, update, controls=Controls(n_null_draws=4), progress=False)


def test_every_similarity_of_updates_is_split_with_its_nulls() -> None:
    found = comparison()
    for name in (*PAIRS, "SimAOU", "SimAOU unnormalised"):
        for part in PARTS:
            own = found[part_name(name, part)]
            assert {"other query", "random", "shuffled labels", "unrelated text"} <= own.nulls.keys()
            assert own.values.isfinite().any()
            assert all(null.isfinite().any() for null in own.nulls.values()), own.name
    summary = found.summary().set_index("statistic")
    assert set(summary.loc["z total: contrast"].index) >= {"value_low", "excess_low"}


def test_rows_and_shares_of_a_comparison_make_up_its_total() -> None:
    """To float32, in which they are stored."""
    found = comparison()
    shares = [[found.norms[share_name(update, part)] for part in PARTS] for update in ("icl", "ft")]
    for own in shares:
        torch.testing.assert_close(torch.stack(own).sum(0), torch.ones_like(own[0]), rtol=0, atol=1e-6, equal_nan=True)
    terms = [
        (first * second).sqrt() * found[part_name("z total", part)].values
        for part, first, second in zip(PARTS, *shares, strict=True)
    ]
    whole = found["z total, after W_O"].values
    assert whole.isfinite().any()
    torch.testing.assert_close(torch.stack(terms).sum(0), whole, rtol=0, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize(("normalised", "name"), [(True, "SimAOU"), (False, "SimAOU unnormalised")])
def test_sim_aou_in_parts_adds_up(normalised: bool, name: str) -> None:
    """Values of the parts, weighted with what the oracle's own projections say, are the whole."""
    model = wrap(shared("bridge:llama", F64))
    update = finetune(shared("bridge:llama", F64), PROMPTS[0], lr=1.0, progress=False)
    space = OutputSpace(model)
    rows = [tokenized(model.host, p) for p in PROMPTS]
    runs = record(model, rows, settings=("icl", "zs", "ft"), update=update)
    states = [
        space.attention(torch.stack([r[s].z[-1] for r in runs]), update)[:, :, None].double().cpu() for s in SETTINGS
    ]
    icl, zs, ft = (unit(s) if normalised else s for s in states)
    labels = [(32, 36)] * 3
    total = torch.zeros(3, model.info.n_layers, 1, dtype=F64)
    for part in PARTS:
        own = comparison()[part_name(name, part)].values.double()
        sizes = [space.stream_part(u, labels, part).norm(dim=-1) / u.norm(dim=-1) for u in (icl - zs, ft - zs)]
        total += sizes[0] * sizes[1] * own
    torch.testing.assert_close(total, comparison()[name].values.double(), rtol=0, atol=1e-4)


def test_too_few_or_too_many_label_words_are_refused() -> None:
    with pytest.raises(PromptError, match="at least 2 different first tokens, got 1: give candidates"):
        check_labels((5, 5), 8)
    with pytest.raises(PromptError, match=r"9 label words are more than the 8 dimensions .* fewer candidates"):
        check_labels(range(9), 8)
    with pytest.raises(PromptError, match="at least 2 different first tokens"):
        label_subspaces(wrap(shared("bridge:llama", F64)), (3,), 0)


def test_a_comparison_without_contrast_says_so() -> None:
    same = [ICLPrompt([(d, "w32 w33") for d, _ in DEMOS], p.query, candidates=("w32 w33", "w32 w34")) for p in PROMPTS]
    model = shared("bridge:llama", F64)
    update = finetune(model, same[0], lr=1.0, progress=False)
    found = compare(model, same, update, controls="quick", progress=False)
    assert any("parts of output space are left out (contrast needs label words" in note for note in found.notes)
    assert not any(": contrast" in s.name for s in found.statistics)
