"""Effects of heads on the answer: against knock-outs made on the host, and against finite differences."""

from __future__ import annotations

import json
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import HOOKED_NAMES, left_as_it_was, prompt, shared, tokenized
from rounding import PASS, assert_agree, of_pass
from torch import Tensor

from metaopt_lens import Demo, ICLPrompt, KnockOut, MetaoptLensError, intervene
from metaopt_lens.interventions import HeadEffects, MomentumAttention, head_effects
from metaopt_lens.models.tiny import load_tiny
from metaopt_lens.prompts import tokenize_label

NAMES = ["bridge:gpt2", "bridge:mistral", "bridge:gpt_oss", *HOOKED_NAMES[:1]]
DEMOS = prompt(3).demos


def prompts() -> list[ICLPrompt]:
    labels = ("w32", "w36 w37", "w40")
    return [
        ICLPrompt(DEMOS, query, instruction="w20", label=label, candidates=labels)
        for query, label in (("w16 w17", "w32"), ("w60", "w36 w37"), ("w61 w62 w63", "w40"))
    ]


def third_token(logits: Tensor) -> Tensor:
    return logits[33]


@cache
def effects(name: str, metric: Any = "label_log_prob", dtype: torch.dtype = torch.float32) -> HeadEffects:
    return head_effects(shared(name, dtype), prompts(), metric=metric, per_demo=True)


def on_the_host(model: Any, text: ICLPrompt) -> Tensor:
    """Mean log-probability of the label's tokens, label and query fed to the host as one sequence."""
    query, label = tokenized(model, text).ids, tokenize_label(text.label or "", text.template, model.tokenizer)
    with torch.no_grad():
        logits = model(torch.tensor([[*query, *label[:-1]]]))[0, len(query) - 1 :]
    return logits.log_softmax(-1)[range(len(label)), list(label)].mean().double()


@pytest.mark.parametrize("name", NAMES)
def test_exact_effects_are_knock_outs_on_the_host(name: str) -> None:
    model, result = shared(name), effects(name)
    for query, text in enumerate(prompts()):
        full = on_the_host(model, text)
        assert_agree(result.in_context[query], full, PASS)
        with intervene(model, KnockOut(text)):
            assert_agree(result.zero_shot[query], on_the_host(model, text), PASS)
        for layer, head in ((0, 0), (1, 2), (2, 3)):
            with intervene(model, KnockOut(text, heads=f"L{layer}H{head}")):
                expected = full - on_the_host(model, text)
            assert_agree(result.exact[query, layer, head], expected, PASS, of=(full,))
        with intervene(model, KnockOut(text, demos=[1])):
            assert_agree(result.demo_exact[query, 1], full - on_the_host(model, text), PASS, of=(full,))
        assert result.demo_exact_per_head is not None
        with intervene(model, KnockOut(text, heads="L1H1", demos=[2])):
            expected = full - on_the_host(model, text)
        assert_agree(result.demo_exact_per_head[query, 1, 1, 2], expected, PASS, of=(full,))
    assert result.exact.abs().max() > 1e-2


# Norms behind attention, norms of queries and keys, parallel blocks, sliding windows, ALiBi, sinks, experts.
KINDS = ["bridge:gemma2", "bridge:gemma3", "bridge:olmo2", "bridge:gptj", "bridge:phi", "bridge:bloom"]
KINDS += ["bridge:mixtral", "native:rotary", *HOOKED_NAMES[1:]]


@pytest.mark.parametrize("name", KINDS)
def test_starting_at_a_layer_gives_the_numbers_of_whole_passes(name: str) -> None:
    """Every head, one whole pass from the tokens of the whole prompt for each; ranks are identical."""
    model = shared(name)
    result = head_effects(model, prompts()[:2], metric="label_log_prob")
    for query, text in enumerate(prompts()[:2]):
        full, slow = on_the_host(model, text), torch.empty(3, 4, dtype=torch.float64)
        for layer, head in product(range(3), range(4)):
            with intervene(model, KnockOut(text, heads=f"L{layer}H{head}")):
                slow[layer, head] = full - on_the_host(model, text)
        assert_agree(result.exact[query], slow, of_pass(name), of=(full,))
        torch.testing.assert_close(result.exact[query], slow, rtol=0, atol=1e-5 * float(full.abs()))
        assert slow.abs().max() > 1e-3


def test_blocks_below_a_head_are_not_run_for_it() -> None:
    """However many heads of the last layer are knocked out, the blocks below are run for the same tokens."""
    model = shared("bridge:llama")
    head_effects(model, prompts(), metric="loss", heads=["L2H0"])  # tries whether it may start at a layer, once
    tokens: list[dict[int, int]] = []
    for heads in (["L2H0"], ["L2H0", "L2H1", "L2H2", "L2H3"]):
        run = dict.fromkeys(range(3), 0)

        def count(z: Tensor, hook: Any, run: dict[int, int] = run) -> None:
            run[int(hook.name.split(".")[1])] += z.shape[0] * z.shape[1]

        with model.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_z", count) for layer in range(3)]):
            head_effects(model, prompts(), metric="loss", heads=heads)
        tokens.append(run)
    assert tokens[0][0] == tokens[1][0]
    assert tokens[0][1] == tokens[1][1]
    longest = 4  # tokens of the longest query, to which the batch of each head's three is padded
    assert tokens[1][2] - tokens[0][2] == 3 * 3 * longest


def test_some_heads_only() -> None:
    model, whole = shared("bridge:gpt2"), effects("bridge:gpt2")
    some = head_effects(model, prompts(), metric="label_log_prob", heads=["L1H2", "L2H0", "L0H1"], layers=[1, 2])
    chosen = torch.zeros(3, 4, dtype=torch.bool)
    chosen[1, 2] = chosen[2, 0] = True
    for found, expected in ((some.exact, whole.exact), (some.first_order, whole.first_order)):
        assert torch.equal(found.isnan(), ~chosen.expand(3, -1, -1))
        assert_agree(found[:, chosen], expected[:, chosen], PASS, of=(whole.in_context,))
    assert_agree(some.demo_exact, whole.demo_exact, PASS, of=(whole.in_context,))
    assert some.ranked() == tuple(ref for ref in whole.ranked() if str(ref) in {"L1H2", "L2H0"})
    assert len(some.to_frame()) == 2
    assert abs(some.correlation) <= 1
    with pytest.raises(MetaoptLensError, match="not all heads were knocked out: call head_effects without heads"):
        some.recovery()
    assert "not all heads were knocked out" in repr(some)
    per_demo = head_effects(model, prompts(), metric="label_log_prob", layers=[2], per_demo=True).demo_exact_per_head
    assert per_demo is not None
    assert whole.demo_exact_per_head is not None
    assert per_demo[:, :2].isnan().all()
    assert_agree(per_demo[:, 2], whole.demo_exact_per_head[:, 2], PASS, of=(whole.in_context,))


def test_estimates_alone_knock_nothing_out(caplog: pytest.LogCaptureFixture) -> None:
    whole = effects("bridge:gpt2")
    with caplog.at_level("INFO", "metaopt_lens"):
        found = head_effects(shared("bridge:gpt2"), prompts(), metric="label_log_prob", exact=False)
    assert [record.message.split(" in ")[0] for record in caplog.records] == ["knock-outs: 3 of 3"]  # the zero-shot end
    assert_agree(found.first_order, whole.first_order, PASS, of=(whole.in_context,))
    assert_agree(found.gain, whole.gain, PASS, of=(whole.in_context,))
    assert found.exact.isnan().all()
    assert found.demo_exact.isnan().all()
    assert torch.equal(found.map, found.first_order.mean(0))
    estimated = found.to_frame()["first_order"] * (1 if float(found.gain.mean()) > 0 else -1)
    assert estimated.is_monotonic_decreasing
    for ask in (lambda: found.correlation, lambda: found.demo_correlation):
        with pytest.raises(MetaoptLensError, match="nothing was knocked out: there is nothing to correlate"):
            ask()
    assert found.plot().data[0].z[0][0] is None
    assert found.plot().layout.annotations[0].text == "not knocked out"


def test_every_knock_out_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    """The zero-shot end, 12 heads, 3 demonstrations, 36 pairs of 3 queries; 13 numbers of heads of 2 held-out ones."""
    with caplog.at_level("INFO", "metaopt_lens"):
        head_effects(shared("bridge:gpt2"), prompts(), metric="loss", per_demo=True)
    n = 3 * (1 + 12 + 3 + 36) + 2 * 13
    assert [record.message.split(" in ")[0] for record in caplog.records] == [f"knock-outs: {n} of {n}"]
    caplog.clear()
    with caplog.at_level("INFO", "metaopt_lens"):
        head_effects(shared("bridge:gpt2"), prompts()[:1], metric="loss", exact=False, progress=False)
    assert not caplog.records


def test_the_picture_and_the_demonstrations_table() -> None:
    result = effects("bridge:gpt2")
    figure = result.plot()
    for trace, expected in zip(figure.data[:2], (result.map, result.first_order.mean(0)), strict=True):
        assert torch.equal(torch.tensor(trace.z, dtype=torch.float64), expected)
    frame = result.demos_to_frame()
    assert frame["input"].tolist() == [demo.input for demo in DEMOS]
    assert frame["label"].tolist() == [demo.label for demo in DEMOS]


def test_first_order_effects_are_derivatives() -> None:
    """Central differences along ``z + epsilon (z_without - z)``, in float64."""
    name = "bridge:gpt2"
    model, result = shared(name, torch.float64), effects(name, "label_log_prob", torch.float64)
    for query, text in enumerate(prompts()):
        for layer, head in ((0, 1), (1, 0), (2, 2)):
            values = [on_the_host_towards(model, text, layer, head, epsilon) for epsilon in (1e-4, -1e-4)]
            derivative = (values[0] - values[1]) / 2e-4
            torch.testing.assert_close(result.first_order[query, layer, head], -derivative, rtol=1e-5, atol=1e-8)


def on_the_host_towards(model: Any, text: ICLPrompt, layer: int, head: int, epsilon: float) -> Tensor:
    seen: list[Tensor] = []

    def keep(z: Tensor, hook: Any) -> None:
        seen.append(z)

    def move(z: Tensor, hook: Any) -> Tensor:
        return before + epsilon * (without - before)

    name = f"blocks.{layer}.attn.hook_z"
    with model.hooks(fwd_hooks=[(name, keep)]):
        on_the_host(model, text)
    with intervene(model, KnockOut(text, heads=f"L{layer}H{head}")), model.hooks(fwd_hooks=[(name, keep)]):
        on_the_host(model, text)
    before, without = seen
    with model.hooks(fwd_hooks=[(name, move)]):
        return on_the_host(model, text)


@pytest.mark.parametrize("name", NAMES)
def test_estimates_per_demonstration_and_head(name: str) -> None:
    result = effects(name)
    exact = result.demo_exact_per_head
    assert exact is not None
    assert result.demo_first_order.shape == exact.shape
    # Small effects are linear.
    small = exact.abs() < 0.02 * exact.abs().max()
    close = (result.demo_first_order - exact).abs()[small]
    assert close.max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_heads_are_ranked_on_some_queries_and_added_back_on_others(name: str) -> None:
    result = effects(name)
    held_out = result.held_out.tolist()
    selection = [query for query in range(3) if query not in held_out]
    assert (len(selection), len(held_out)) == (1, 2)
    assert_agree(result.added[:, 0], result.zero_shot[held_out], PASS)
    assert_agree(result.added[:, -1], result.in_context[held_out], PASS)
    sign = 1 if float(result.gain[selection].mean()) > 0 else -1
    ranked_on = result.exact[selection].mean(0).flatten() * sign
    assert ranked_on[result.selection_order].diff().max() <= 0
    order = [f"L{i // 4}H{i % 4}" for i in result.selection_order.tolist()]
    for n in (1, 4):
        with intervene(shared(name), KnockOut(prompts()[held_out[0]], heads=order[n:])):
            alone = on_the_host(shared(name), prompts()[held_out[0]])
        assert_agree(result.added[0, n], alone, PASS)
    found = result.icl_heads(0.5)
    assert found.recovered >= 0.5
    assert [str(head) for head in found.heads] == order[: len(found.heads)]
    curve = result.recovery_to_frame()
    assert curve["added"].tolist() == ["", *order]
    start, end = result.added[:, 0].mean(), result.added[:, -1].mean()
    expected = (result.added.mean(0) - start) / (end - start)
    assert curve["recovered"].tolist() == pytest.approx(expected.tolist(), abs=1e-9)
    assert (curve["recovered"][len(found.heads) :] >= 0.5 - 1e-9).all()
    assert curve["recovered"][len(found.heads) - 1] < 0.5


def test_the_table_is_ranked_over_all_queries() -> None:
    result = effects("bridge:gpt2")
    frame = result.to_frame()
    assert list(frame["rank"]) == list(range(1, 13))
    signed = frame["exact"] * (1 if float(result.gain.mean()) > 0 else -1)
    assert signed.is_monotonic_decreasing
    assert frame["name"].tolist() == [str(head) for head in result.ranked()]
    first = result.ranked(1)[0]
    assert float(result.map[first.layer, first.head]) == pytest.approx(frame["exact"].iloc[0])
    values = result.exact[:, first.layer, first.head].numpy()
    assert frame["exact_std"].iloc[0] == pytest.approx(values.std(ddof=1))


def test_one_query_has_no_spread_and_no_recovery() -> None:
    """0.1 gave a standard deviation of 0.0, and a number of heads ranked and scored on the same query."""
    result = head_effects(shared("bridge:gpt2"), prompts()[:1], metric="label_log_prob")
    assert result.to_frame()["exact_std"].isna().all()
    assert result.to_frame()["first_order_std"].isna().all()
    assert result.added.shape == (0, 13)
    for ask in (result.recovery, result.icl_heads, result.recovery_to_frame):
        with pytest.raises(MetaoptLensError, match="not defined for a single query: heads are ranked on some"):
            ask()
    assert "not defined for a single query" in repr(result)


def test_two_queries_give_a_number_without_an_interval() -> None:
    result = head_effects(shared("bridge:gpt2"), prompts()[:2], metric="label_log_prob")
    found = result.recovery()
    assert (found.n_units, found.low, found.high) == (1, None, None)
    assert "alone gives no interval, conditional on these demonstrations" in found.note


def test_the_split_is_drawn_from_the_seed() -> None:
    model = shared("bridge:gpt2")
    found = {
        seed: tuple(head_effects(model, prompts(), metric="loss", seed=seed).held_out.tolist()) for seed in (0, 1, 2, 3)
    }
    assert found[0] == tuple(effects("bridge:gpt2", "loss").held_out.tolist())
    assert len(set(found.values())) > 1


def test_metrics_agree_with_each_other() -> None:
    name = "bridge:gpt2"
    log_prob, loss, own = effects(name), effects(name, "loss"), effects(name, third_token)
    assert_agree(loss.exact, -log_prob.exact, PASS, of=(loss.in_context,))
    assert_agree(loss.first_order, -log_prob.first_order, PASS)
    assert loss.ranked() == log_prob.ranked()  # by how much of the gain they give, whatever the metric's direction
    assert own.metric == "third_token"
    with torch.no_grad():
        logits = shared(name)(torch.tensor([tokenized(shared(name), prompts()[2]).ids]))
    assert_agree(own.in_context[2], logits[0, -1, 33].double(), PASS, of=(logits[0, -1],))
    difference = effects(name, "logit_difference")
    expected = (logits[0, -1, 40] - (logits[0, -1, 32] + logits[0, -1, 36]) / 2).double()
    assert_agree(difference.in_context[2], expected, PASS, of=(logits[0, -1],))


def test_the_bundled_model() -> None:
    """First-order and exact effects correlate on the logit difference; a few heads are the ICL model."""
    model = load_tiny()
    demos = [Demo("apple", "dax"), Demo("hammer", "wug"), Demo("pear", "dax"), Demo("saw", "wug")]
    texts = [
        ICLPrompt(demos, query, label=label, candidates=("dax", "wug"))
        for query, label in (("cherry", "dax"), ("drill", "wug"), ("plum", "dax"), ("wrench", "wug"))
        if query in model.tokenizer.get_vocab()
    ]
    assert len(texts) >= 2
    with left_as_it_was(model):
        result = head_effects(model, texts)
    assert result.correlation > 0.6
    assert float(result.gain.mean()) > 5
    found = result.icl_heads()
    assert 1 <= len(found.heads) < 12
    assert f"{len(found.heads)} " in repr(result).split("largest effects")[1]
    assert "heads recover 90 % of the gain on" in repr(result)
    assert len(result.demos_to_frame()) == 4
    assert result.demo_correlation > 0


def test_batch_size_changes_nothing() -> None:
    one = head_effects(shared("bridge:gpt2"), prompts(), metric="label_log_prob", batch_size=1)
    many = effects("bridge:gpt2")
    assert_agree(one.exact, many.exact, PASS, of=(many.in_context,))
    assert_agree(one.first_order, many.first_order, PASS, of=(many.in_context,))


def test_saved_and_loaded(tmp_path: Path) -> None:
    result = effects("bridge:gpt2")
    result.save(tmp_path / "effects")
    loaded = HeadEffects.load(tmp_path / "effects")
    for name, value in vars(result).items():
        found = getattr(loaded, name)
        assert torch.equal(found, value) if isinstance(value, Tensor) else found == value, name
    assert loaded.ranked() == result.ranked()
    assert repr(loaded) == repr(result)


def test_files_of_0_1_and_incomplete_ones_are_refused(tmp_path: Path) -> None:
    """The former do not say which queries were held out, nor the demonstrations' texts."""
    file = effects("bridge:gpt2").save(tmp_path / "effects")
    meta = json.loads(file.read_text())
    assert meta.keys() == {"kind", "sha256", "provenance", "model", "metric", "n_demos", "demos"}
    processing = meta["model"].pop("processing")
    file.write_text(json.dumps(meta))
    with pytest.raises(MetaoptLensError, match=r"is not a complete head effects: KeyError\('model.processing'\)"):
        HeadEffects.load(file)
    meta["model"]["processing"] = processing
    del meta["demos"]
    file.write_text(json.dumps(meta))
    with pytest.raises(
        MetaoptLensError, match=r"written by metaopt-lens 0\.1, which ranked heads .*: measure them again"
    ):
        HeadEffects.load(file)


def test_refusals() -> None:
    model, texts = shared("bridge:gpt2"), prompts()
    with pytest.raises(MetaoptLensError, match="no prompts"):
        head_effects(model, [])
    with pytest.raises(MetaoptLensError, match="metric must be"):
        head_effects(model, texts, metric="accuracy")
    unlabelled = ICLPrompt(DEMOS, "w16", instruction="w20")
    with pytest.raises(MetaoptLensError, match="needs the label of query 'w16'"):
        head_effects(model, [unlabelled])
    with pytest.raises(MetaoptLensError, match="the demos of query 'w60' are not those of 'w16 w17'"):
        head_effects(model, [texts[0], texts[1].without_demo(0)])
    with pytest.raises(MetaoptLensError, match="3"):
        head_effects(model, texts, heads=["L3H0"])
    with pytest.raises(MetaoptLensError, match="the selection is empty"):
        head_effects(model, texts, heads=["L1H0"], layers=[0])
    with pytest.raises(MetaoptLensError, match="give it with exact=True"):
        head_effects(model, texts, per_demo=True, exact=False)
    momentum = MomentumAttention(torch.full((3, 4), 0.5))
    with (
        intervene(model, momentum),
        pytest.raises(MetaoptLensError, match="momentum attention is on, and head_effects"),
    ):
        head_effects(model, texts)
    clash = ICLPrompt(DEMOS, "w16", instruction="w20", label="w36 w37", candidates=("w36 w37", "w36 w38"))
    with pytest.raises(MetaoptLensError, match="candidates with another first token"):
        head_effects(model, [clash])
    alone = ICLPrompt([("w30", "w32")], "w16", instruction="w20", label="w32")
    with pytest.raises(MetaoptLensError, match="needs other candidates"):
        head_effects(model, [alone])
    with pytest.raises(MetaoptLensError, match="share must lie above 0"):
        effects("bridge:gpt2").icl_heads(0.0)
