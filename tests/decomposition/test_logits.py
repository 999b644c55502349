"""Direct logit contributions: they sum to the model's own logit, and are what others compute from the same run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from families import NATIVE, make_hf, make_hooked
from hosts import FLOAT32_SOFTMAX, HOST_NAMES, NATIVE_NAMES, bridge_of, build, build_hf, prompt, requires_hooked, shared
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from metaopt_lens import Decomposition, ICLPrompt, decompose, load_tiny
from metaopt_lens._errors import FileFormatError, ModelMismatchError, OptionError, PromptError, UnsupportedModelError
from metaopt_lens.analysis import contribution_intervals
from metaopt_lens.decomposition import LogitContributions, LogitContributionSet
from metaopt_lens.interventions import HeadEffects, MomentumAttention, intervene

ANSWER, RIVALS = 60, (61, 62)
WORDS: dict[str, Any] = {"answer": "w60", "versus": ["w61", "w62"]}
# transformers' mixture-of-experts kernels have no float64.
NO_DOUBLE = {"bridge:gpt_oss", "bridge:mixtral"}
# These compute RMS norm (or softmax, or the logits' cap) in float32 whatever the dtype: their own float64 is float32's.
FLOAT32_INSIDE = (
    FLOAT32_SOFTMAX
    | {
        f"bridge:{family}"
        for family in ("llama", "llama_mqa", "mistral", "qwen2", "qwen3", "olmo2", "gemma", "gemma2", "gemma3")
    }
    | {"native:rotary"}
)


@cache
def split(name: str, dtype: torch.dtype = torch.float32) -> Decomposition:
    return decompose(shared(name, dtype), prompt(), zero_shot_runs="none")


def host_logits(model: Any, ids: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([list(ids)]))[0, -1]


def uncapped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else cap * torch.atanh(logits / cap)


def difference(logits: Tensor) -> Tensor:
    return logits[ANSWER] - logits[list(RIVALS)].mean()


def terms(found: LogitContributions) -> Tensor:
    """All contributions in one row."""
    return torch.cat(
        [
            found.embedding[None],
            found.zero_shot.flatten(),
            found.meta_gradient.flatten(),
            found.attention_bias,
            found.mlp,
            found.bias[None],
        ]
    )


@pytest.mark.parametrize("name", HOST_NAMES)
def test_contributions_sum_to_the_models_own_logit(name: str) -> None:
    """The host's logits of a pass of its own; a soft-cap is undone first."""
    model, result = shared(name), split(name)
    logits = uncapped(host_logits(model, result.tokenized.ids), result.logits(**WORDS).softcap)
    largest = float(logits.abs().max())
    for versus, own in ((WORDS["versus"], difference(logits)), ((), logits[ANSWER])):
        found = result.logits("w60", versus=versus)
        summed = terms(found).sum()
        assert abs(float(summed - own)) <= 1e-4 * largest
        assert abs(float(found.logit - own)) <= 1e-4 * largest
        assert abs(float(found.total - summed)) <= 1e-5 * largest
    # No part is trivially nothing.
    for part in (found.zero_shot, found.meta_gradient, *([] if name == "hooked:attn_only" else [found.mlp])):
        assert part.abs().sum() > 1e-3 * largest


@pytest.mark.parametrize("name", [name for name in HOST_NAMES if name not in NO_DOUBLE])
def test_contributions_sum_to_the_logit_in_float64(name: str) -> None:
    model, result = shared(name, torch.float64), split(name, torch.float64)
    found = result.logits(**WORDS)
    logits = uncapped(host_logits(model, result.tokenized.ids), found.softcap)
    tolerance = 1e-5 if name in FLOAT32_INSIDE else 1e-9
    assert found.total.dtype == torch.float64
    assert abs(float(terms(found).sum() - difference(logits))) <= tolerance * float(logits.abs().max())


@pytest.mark.parametrize("name", HOST_NAMES)
def test_demonstrations_and_tokens_sum_to_the_parts(name: str) -> None:
    result = split(name)
    found, tokens = result.logits(**WORDS), result.tokenized
    largest = float(found.per_token.abs().max())
    per_demo = torch.stack([found.per_token[..., demo.slice].sum(-1) for demo in tokens.demos], dim=-1)
    torch.testing.assert_close(found.per_demo, per_demo, rtol=0, atol=1e-5 * largest)
    torch.testing.assert_close(found.per_demo.sum(-1), found.meta_gradient, rtol=0, atol=1e-4 * largest)
    outside = torch.ones(tokens.n_tokens, dtype=torch.bool)
    outside[tokens.demonstrations.slice] = False
    torch.testing.assert_close(found.per_token[..., outside].sum(-1), found.zero_shot, rtol=0, atol=1e-4 * largest)


# ---- independent computations ----------------------------------------------------------------------------------------


def seen_by_transformers(family: str, ids: list[int]) -> tuple[Any, dict[str, list[Tensor]], Tensor]:
    """A transformers model without any bridge: what o_proj, v_proj, the post-norm and the MLP saw, and the logits."""
    model = build_hf(family)
    seen: dict[str, list[Tensor]] = {"z": [], "v": [], "o": [], "mlp": [], "block": [], "embed": []}

    def keep(name: str, of_input: bool = False) -> Callable[..., None]:
        def store(_module: Any, inputs: Any, output: Any = None) -> None:
            value = inputs[0] if of_input else output[0] if isinstance(output, tuple) else output
            seen[name].append(value.detach()[0].clone())

        return store

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(keep("z", of_input=True))
        layer.self_attn.o_proj.register_forward_hook(keep("o"))
        layer.self_attn.v_proj.register_forward_hook(keep("v"))
        after = layer.post_feedforward_layernorm if family != "llama" else layer.mlp
        after.register_forward_hook(keep("mlp"))
    model.model.layers[0].register_forward_pre_hook(
        lambda _m, args, kwargs: keep("embed", of_input=True)(_m, args or (kwargs["hidden_states"],)), with_kwargs=True
    )
    model.model.norm.register_forward_pre_hook(keep("block", of_input=True))
    with torch.no_grad():
        out = model(torch.tensor([ids]), output_attentions=True)
    seen["pattern"] = [layer[0].detach() for layer in out.attentions]
    return model, seen, out.logits[0, -1]


@pytest.mark.parametrize("family", ["llama", "olmo2", "gemma2", "gemma3"])
def test_contributions_are_those_of_a_plain_transformers_run(family: str) -> None:
    """Every head, MLP and the embedding, from transformers' own modules: with a norm after attention (OLMo-2, Gemma-2
    and 3) its scale at this run's attention output; Gemma's gains are 1 + weight."""
    result = split(f"bridge:{family}")
    found, tokens = result.logits(**WORDS), result.tokenized
    model, seen, _ = seen_by_transformers(family, list(tokens.ids))
    offset = 1.0 if family.startswith("gemma") else 0.0
    eps = model.config.rms_norm_eps

    def rms(x: Tensor) -> Tensor:
        return (x.square().mean() + eps).sqrt()

    w_u = model.lm_head.weight.detach()
    end = seen["block"][0][-1]
    direction = (w_u[ANSWER] - w_u[list(RIVALS)].mean(0)) * (offset + model.model.norm.weight.detach()) / rms(end)
    assert_same(found.embedding, seen["embed"][0][-1] @ direction)
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    d_head = model.model.layers[0].self_attn.head_dim
    for index, layer in enumerate(model.model.layers):
        attn = layer.self_attn
        before = direction
        if family != "llama":
            norm = layer.post_attention_layernorm
            before = direction * (offset + norm.weight.detach()) / rms(seen["o"][index][-1])
        assert_same(found.mlp[index], seen["mlp"][index][-1] @ direction)
        values = seen["v"][index].unflatten(-1, (-1, d_head)).repeat_interleave(group, dim=1)
        for head in range(4):
            w_o = attn.o_proj.weight.detach()[:, head * d_head : (head + 1) * d_head]
            weights = seen["pattern"][index][head, -1]
            parts = (weights[:, None] * values[:, head]) @ w_o.T @ before
            assert_same(found.per_token[index, head], parts)
            assert_same(found.meta_gradient[index, head], parts[tokens.demonstrations.slice].sum())
            own = seen["z"][index][-1, head * d_head : (head + 1) * d_head] @ w_o.T @ before
            assert_same(found.head_total[index, head], own)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected.to(actual), rtol=2e-4, atol=2e-6)


def _unit_final_norm(model: Any) -> Any:
    """TransformerLens's attributions know no gain and no bias of the final norm."""
    with torch.no_grad():
        model.ln_final.w.fill_(1.0)
        if "b" in model.ln_final._parameters:
            model.ln_final.b.zero_()
    return model


@requires_hooked
@pytest.mark.parametrize("kind", ["learned", "alibi", "rotary", "partial_rotary_parallel", "attn_only"])
def test_activation_cache_gives_the_same(kind: str) -> None:
    """TransformerLens's own `logit_attrs` of heads and components."""
    model = _unit_final_norm(make_hooked(kind))
    result = decompose(model, prompt())
    found = result.logits("w60", versus=["w61"])
    tokens = torch.tensor([result.tokenized.ids])
    _, cache = model.run_with_cache(tokens)
    heads = cache.stack_head_results(layer=-1, pos_slice=-1)
    asked = {"tokens": torch.tensor([60]), "incorrect_tokens": torch.tensor([61])}
    attributions = cache.logit_attrs(heads, pos_slice=-1, **asked)[:, 0].view(3, 4)
    torch.testing.assert_close(found.head_total, attributions, rtol=1e-4, atol=1e-5)
    parts, labels = cache.decompose_resid(layer=-1, pos_slice=-1, return_labels=True)
    named = dict(zip(labels, cache.logit_attrs(parts, pos_slice=-1, **asked)[:, 0], strict=True))
    embedding = sum(value for label, value in named.items() if "embed" in label)
    torch.testing.assert_close(found.embedding, embedding, rtol=1e-4, atol=1e-5)
    for layer in range(3):
        attention = found.head_total[layer].sum() + found.attention_bias[layer]
        torch.testing.assert_close(attention, named[f"{layer}_attn_out"], rtol=1e-4, atol=1e-5)
        if kind != "attn_only":
            torch.testing.assert_close(found.mlp[layer], named[f"{layer}_mlp_out"], rtol=1e-4, atol=1e-5)


def test_activation_cache_of_a_bridge_gives_the_same() -> None:
    hf_model = make_hf("llama")
    with torch.no_grad():
        hf_model.model.norm.weight.fill_(1.0)
    model = bridge_of(hf_model)
    result = decompose(model, prompt())
    found = result.logits("w60", versus=["w61"])
    _, cache = model.run_with_cache(torch.tensor([result.tokenized.ids]))
    accumulated = cache.accumulated_resid(layer=-1, pos_slice=-1)
    asked = {"tokens": torch.tensor([60]), "incorrect_tokens": torch.tensor([61])}
    before = cache.logit_attrs(accumulated, pos_slice=-1, **asked)[:, 0]
    assert_same(found.embedding, before[0])
    layers = found.head_total.sum(-1) + found.attention_bias + found.mlp
    assert_same(found.embedding + layers.cumsum(0), before[1:])


# ---- a part taken out ------------------------------------------------------------------------------------------------

AT_ONCE = ["bridge:gptj", "bridge:phi", "bridge:gpt_neox", *(["hooked:attn_only", "hooked:partial_rotary_parallel"])]
AFTER = ["bridge:llama", "bridge:gpt2", *NATIVE_NAMES]  # a norm after attention changes its scale too


@pytest.mark.parametrize("name", [name for name in [*AT_ONCE, *AFTER] if name in HOST_NAMES])
def test_a_part_taken_out_in_the_last_layer_changes_the_logit_by_its_contribution(name: str) -> None:
    """Up to the change of the final norm's scale, which is given. Where the MLP reads what the heads write, what it
    writes is held; where it reads the same stream (parallel blocks) or there is none, nothing is."""
    model, result = shared(name), split(name)
    found = result.logits(**WORDS)
    last, position = 2, result.positions[0]
    for head in range(4):
        part = result.softmax.meta_gradient[last, head]
        mlp_out: list[Tensor] = []
        ends: list[Tensor] = []

        def take_out(z: Tensor, hook: Any, head: int = head, part: Tensor = part) -> Tensor:
            z = z.clone()
            rows = z.reshape(*z.shape[:2], 4, -1)
            rows[0, position, head] -= part
            return z

        def keep(out: Tensor, hook: Any, store: list[Tensor] = mlp_out) -> None:
            store.append(out.clone())

        def hold(out: Tensor, hook: Any, store: list[Tensor] = mlp_out) -> Tensor:
            return store[0]

        def end(out: Tensor, hook: Any, store: list[Tensor] = ends) -> None:
            store.append(out[0, -1].clone())

        ids = torch.tensor([result.tokenized.ids])
        hooks: list[Any] = [(f"blocks.{last}.attn.hook_z", take_out), (f"blocks.{last}.hook_resid_post", end)]
        with torch.no_grad():
            if name in AFTER:
                model.run_with_hooks(ids, fwd_hooks=[(f"blocks.{last}.hook_mlp_out", keep)])
                hooks.append((f"blocks.{last}.hook_mlp_out", hold))
            logits = uncapped(model.run_with_hooks(ids, fwd_hooks=hooks)[0, -1], found.softcap)
        changed = ends[0] - (ends[0].mean() if is_layer_norm(name) else 0.0)
        new_scale = float(changed.square().mean().sqrt())
        old_scale = float(found.scale)
        kept = found.total - found.bias - found.meta_gradient[last, head]
        expected = kept * old_scale / new_scale + found.bias
        torch.testing.assert_close(difference(logits), expected, rtol=1e-4, atol=1e-4)
        assert abs(float(found.meta_gradient[last, head])) > 1e-4


def is_layer_norm(name: str) -> bool:
    return name in {"bridge:gptj", "bridge:phi", "bridge:gpt_neox", "bridge:gpt2", "native:learned"} or (
        name in {"hooked:attn_only", "hooked:partial_rotary_parallel"}
    )


# ---- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bridge:llama", "bridge:gemma3", "bridge:gpt2", *NATIVE_NAMES])
def test_each_token_of_an_answer_is_read_behind_those_before_it(name: str) -> None:
    model, result = shared(name), split(name)
    answer = (60, 61, 62)
    found = result.logits(answer, versus=[(60, 70, 71), (80, 81, 82)])
    assert found.answer == ("w60", "w61", "w62")
    assert found.versus == (("w80",), ("w70",), ())
    cap = found.softcap
    for step, (token, rival) in enumerate(((60, 80), (61, 70), (62, None))):
        logits = uncapped(host_logits(model, [*result.tokenized.ids, *answer[:step]]), cap)
        own = logits[token] - (0.0 if rival is None else logits[rival])
        assert abs(float(found.total[step] - own)) <= 1e-4 * float(logits.abs().max())
        assert abs(float(found.logit[step] - own)) <= 1e-4 * float(logits.abs().max())
    first = result.logits(60, versus=[80])
    torch.testing.assert_close(found.meta_gradient[0], first.meta_gradient, rtol=1e-4, atol=1e-5)
    assert found.per_token.shape == (3, 3, 4, result.tokenized.n_tokens + 2)
    # What a token does not see contributes nothing to it.
    assert not found.per_token[0, ..., -2:].any()
    assert found.per_token[2, ..., -1].any()


def test_by_default_the_label_against_the_other_candidates() -> None:
    text = ICLPrompt([("apple", "dax"), ("hammer", "wug"), ("plum", "dax"), ("saw", "wug")], "pear", label="dax")
    result = decompose(load_tiny(), text)
    found = result.logits()
    assert [token.strip() for token in found.answer] == ["dax"]
    assert [token.strip() for token in found.versus[0]] == ["wug"]
    named = result.logits("dax", versus="wug")
    assert torch.equal(found.per_token, named.per_token)
    assert float(found.logit) > 5  # the model answers right
    frame = found.to_frame()
    assert abs(frame["contribution"].sum() - float(found.logit)) < 1e-3
    assert "dax" in repr(found)
    assert "zero_shot:" in repr(found)


def test_a_notebook_shows_a_table() -> None:
    """The words of the text, each part in a row; what the tokenizer knows as markup is shown, not obeyed."""
    text = ICLPrompt([("apple", "dax"), ("hammer", "wug")], "pear", label="dax", candidates=("dax", "wug"))
    found = decompose(load_tiny(), text).logits()
    markup = found._repr_html_()
    assert f"<tr><td>MLPs</td><td>{float(found.mlp.sum()):+.3f}</td></tr>" in markup
    assert f"<td>{found.heads(1, part='zero_shot')[0]} " in markup
    assert markup.count("<tr>") == 7  # five sums and two lists of heads
    assert "&lt;b&gt;" in replace(found, answer=("<b>",))._repr_html_()
    assert "'<b>'" not in replace(found, answer=("<b>",))._repr_html_()


def test_at_all_positions_the_one_asked_for_is_read() -> None:
    model = shared("bridge:llama")
    everywhere = decompose(model, prompt(), position="all")
    for position in everywhere.positions:
        alone = decompose(model, prompt(), position=position)
        here = everywhere.logits("w60", versus="w61", position=position)
        torch.testing.assert_close(here.per_token, alone.logits("w60", versus="w61").per_token, rtol=1e-4, atol=1e-5)
    with pytest.raises(OptionError, match="an answer of 2 tokens is read behind the whole prompt, not at position"):
        everywhere.logits([60, 61], position=everywhere.positions[0])


def test_several_queries_and_their_means() -> None:
    """Two sets of two queries each: the interval is over sets, the mean the plain mean."""
    model = shared("bridge:llama")
    prompts = [prompt(first=first, query=f"w{q} :") for first in (30, 50) for q in (16, 17)]
    results = decompose(model, prompts)
    found = results.logits(["w80"] * 4, versus=["w81"])
    assert found.sets.tolist() == [0, 0, 1, 1]
    for index, item in enumerate(results):
        alone = item.logits("w80", versus=["w81"])
        assert torch.equal(found[index].meta_gradient, alone.meta_gradient)
    table = contribution_intervals(found).set_index(["name", "part"])
    row = table.loc[("L1H2", "meta_gradient")]
    values = found.meta_gradient[:, 1, 2].double()
    means = values.view(2, 2).mean(1)
    assert row["mean"] == pytest.approx(float(values.mean()))
    assert row["unit"] == "set"
    assert row["n"] == 2
    half = 12.7062 * float(means.std()) / 2**0.5  # Student's t with one degree of freedom
    assert row["high"] - row["mean"] == pytest.approx(half, rel=1e-4)
    total = table.loc[[("embedding", "embedding"), ("MLPs", "mlp"), ("biases", "bias")], "mean"].sum()
    total += table.loc[[("all heads", "zero_shot"), ("all heads", "meta_gradient")], "mean"].sum()
    assert table.loc[("logit", "logit"), "mean"] == pytest.approx(total, rel=1e-4, abs=1e-5)
    assert found.heads(3, part="zero_shot")[0] == found[1:].heads(1, part="zero_shot")[0] or len(found[1:]) == 3
    assert found.to_frame()["query"].nunique() == 4


def test_momentum_is_a_part_of_its_own() -> None:
    model = shared("bridge:llama")
    with intervene(model, MomentumAttention(0.6)):
        result = decompose(model, prompt())
        found = result.logits(**WORDS)
        logits = host_logits(model, result.tokenized.ids)
    assert found.momentum is not None
    assert float(found.momentum.abs().max()) > 1e-2
    assert abs(float(terms(found).sum() + found.momentum.sum() - difference(logits))) <= 1e-4 * float(
        logits.abs().max()
    )
    with pytest.raises(ModelMismatchError, match="the model computes something else now"):
        result.logits([60, 61])


def test_gradients_flow_from_contributions_to_weights() -> None:
    model = build("bridge:llama")
    result = decompose(model, prompt(), grad=True, zero_shot_runs="none")
    found = result.logits(**WORDS)
    found.meta_gradient.sum().backward()
    weight = model.original_model.model.layers[0].self_attn.v_proj.weight
    assert float(weight.grad.norm()) > 0


# ---- cost ------------------------------------------------------------------------------------------------------------


class _Made(TorchDispatchMode):
    """Shapes of all tensors that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in inputs:
                self.shapes.add(tuple(tensor.shape))
        return out


@pytest.mark.parametrize("name", ["bridge:llama", f"native:{next(iter(NATIVE))}"])
def test_nothing_of_the_size_of_the_vocabulary_is_computed(name: str) -> None:
    model = shared(name)
    decompose(model, prompt()).logits(**WORDS)  # what is tried once
    with _Made() as made:
        result = decompose(model, prompt())
    assert len(made.shapes) > 20
    # What the model answers is read at the last token of each run: a row of the vocabulary for two runs at once.
    assert not [shape for shape in made.shapes if 96 in shape and math.prod(shape) > 2 * 96]
    with _Made() as made:
        result.logits(**WORDS)
    assert made.shapes
    assert not [shape for shape in made.shapes if 96 in shape]  # the vocabulary


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"answer": []}, PromptError, "the answer has no token: give a word, a token id, or a list of token ids"),
        ({"answer": " "}, PromptError, "the label is empty: give a word"),
        ({"answer": 96}, OptionError, "has token ids 0 to 95, got 96"),
        ({"answer": "w60", "versus": "w60"}, PromptError, "the answer and its rival begin with the same token, 'w60'"),
        ({"answer": "w60", "versus": ["w61", "w60 w7"]}, PromptError, "or versus=\\(\\) for the plain logit"),
        ({}, PromptError, "has no label: name the answer"),
    ],
)
def test_bad_answers(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        split("bridge:llama").logits(**arguments)


def test_without_its_model_a_result_knows_no_logits(tmp_path: Any) -> None:
    result = split("bridge:llama")
    result.save(tmp_path / "split")
    loaded = Decomposition.load(tmp_path / "split")
    with pytest.raises(ModelMismatchError, match="logits need the model: call with_model"):
        loaded.logits("w60")
    again = loaded.with_model(shared("bridge:llama")).logits(**WORDS)
    assert torch.equal(again.per_token, result.logits(**WORDS).per_token)


def test_what_does_not_add_up_is_refused() -> None:
    """A hook that adds to the residual stream behind the parts' back."""
    model = build("bridge:llama")
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", lambda x, hook: x + 0.5)]):
        result = decompose(model, prompt())
    with pytest.raises(UnsupportedModelError, match=r"the contributions in .* miss its logit by"):
        result.logits(**WORDS)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [None, (5, 6)])
def test_contributions_round_trip(tmp_path: Any, answer: Any) -> None:
    """Every tensor bit for bit, texts, ids and versions; one step and several."""
    found = decompose(load_tiny(), ICLPrompt([("apple", "dax"), ("saw", "wug")], "plum", label="dax")).logits(answer)
    found.save(tmp_path / "said")
    loaded = LogitContributions.load(tmp_path / "said")
    for name, value in vars(found).items():
        kept = getattr(loaded, name)
        assert torch.equal(kept, value) if isinstance(value, torch.Tensor) else kept == value, name
    assert loaded.provenance["torch"] == torch.__version__
    assert loaded.to_frame().equals(found.to_frame())
    with pytest.raises(FileFormatError, match="its kind is 'logit contributions'"):
        HeadEffects.load(tmp_path / "said")


def test_contributions_of_several_queries_round_trip(tmp_path: Any) -> None:
    demos = [("apple", "dax"), ("saw", "wug")]
    found = decompose(load_tiny(), [ICLPrompt(demos, query, label="dax") for query in ("plum", "pear")]).logits()
    found.save(tmp_path / "said")
    loaded = LogitContributionSet.load(tmp_path / "said")
    assert torch.equal(loaded.sets, found.sets)
    assert torch.equal(loaded.meta_gradient, found.meta_gradient)
    assert [item.answer for item in loaded] == [item.answer for item in found]
    assert repr(loaded) == repr(found)
