"""Runs: the hosts' own values in every setting, shared prefixes, ragged batches, what is kept and what is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from families import bridge_of
from hosts import HOOKED_NAMES, HOST_NAMES, build_hf, host_values, host_z, mask_query_to_demos, prompt, shared
from rounding import PASS, STEP, SUM, assert_agree
from torch import Tensor

from metaopt_lens import WeightUpdate, finetune, wrap
from metaopt_lens._errors import NonFiniteError, OptionError, PromptError, UnsupportedModelError
from metaopt_lens.models import Hook, LensModel
from metaopt_lens.prompts import TokenizedPrompt
from metaopt_lens.runs import (
    Keep,
    Wanted,
    read_queries,
    read_run,
    record,
    record_batches,
    run_shared_prefix,
    softmax_parts,
    tokenize_for,
)

FEW = ["bridge:gpt2", "bridge:gemma2", "bridge:gptj", "bridge:gpt_oss", "bridge:bloom", *HOOKED_NAMES[:4]]
# Two sets of demonstrations, interleaved; queries of different lengths.
TEXTS = [
    prompt(3, query="w16 w17 :"),
    prompt(2, query="w16 :", instruction=None, first=60),
    prompt(3, query="w16 :"),
    prompt(3, query="w19 w20 w21 w22 :"),
]
BASE = ("icl", "zs", "zs_matched")
ALL = (*BASE, "ft", "ft_matched")
TENSORS = ("q", "z", "pattern", "sink", "own_k", "own_v")


def prompts_of(model: LensModel, texts: Sequence[Any] = TEXTS) -> list[TokenizedPrompt]:
    return [tokenize_for(model, text, require_demos=True) for text in texts]


@cache
def update_of(name: str) -> WeightUpdate:
    return finetune(shared(name), TEXTS[0], lr=0.1, progress=False)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("position", ["last", "all"])
def test_runs_are_the_hosts_own_values(name: str, position: Any) -> None:
    model = shared(name)
    prompts = prompts_of(wrap(model))
    for tokens, runs in zip(prompts, record(wrap(model), prompts, position=position), strict=True):
        assert runs.icl.tokens == runs.zs_matched.tokens == tokens
        assert runs.zs.tokens == tokens.zero_shot()
        for run in (runs.icl, runs.zs):
            ids, at = run.tokens.ids, list(run.destinations)
            assert_agree(run.z, host_z(model, ids)[at], PASS)
            pattern = torch.stack(host_values(model, ids, "attn.hook_pattern"))[:, :, at]  # layer head dst src
            assert_agree(run.pattern, pattern.permute(2, 0, 1, 3), PASS)
            v = torch.stack([t.reshape(len(ids), -1, 8) for t in host_values(model, ids, "attn.hook_v")])
            assert_agree(run.v, v, PASS)
            assert run.k.shape == run.v.shape == (3, len(ids), wrap(model).info.n_kv_heads, 8)


@pytest.mark.parametrize("name", HOST_NAMES)
def test_in_every_setting_the_pattern_times_the_values_is_z(name: str) -> None:
    """The position-matched run's pattern has lost D, the finetuned runs' values have the update in them."""
    model, update = wrap(shared(name)), update_of(name)
    for runs in record(model, prompts_of(model), settings=ALL, update=update, position="all"):
        assert list(runs) == list(ALL)
        for setting, run in runs.items():
            assert run.setting == setting
            assert_agree(softmax_parts(run).z, run.z, PASS)
            assert_agree(run.pattern.sum(-1) + run.sink, torch.ones_like(run.sink), SUM)
            assert not run.pattern.masked_select(~run.visible.transpose(0, 1)[:, :, None]).any()
            if setting.endswith("matched"):
                assert not run.pattern[..., run.tokens.demonstrations.slice].any()


@pytest.mark.parametrize("name", ["bridge:gpt2", "bridge:llama", "bridge:gemma2", *HOOKED_NAMES[:2]])
def test_finetuned_runs_are_those_of_the_finetuned_model(name: str) -> None:
    model, update = shared(name), update_of(name)
    for runs in record(wrap(model), prompts_of(wrap(model)), settings=ALL, update=update, position="all"):
        with update.applied(model):
            plain = host_z(model, runs.ft.tokens.ids)[list(runs.ft.destinations)]
            edits = mask_query_to_demos(model, runs.icl.tokens)
            matched = host_z(model, runs.icl.tokens.ids, edits=edits)[list(runs.icl.destinations)]
        assert_agree(runs.ft.z, plain, PASS)
        assert_agree(runs.ft_matched.z, matched, PASS)
        assert (runs.ft.z - runs.zs.z).abs().max() > 1e-3


@pytest.mark.parametrize("name", FEW[:4])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_make_no_difference_and_never_span_two_sets(name: str, batch_size: int) -> None:
    model, update = wrap(shared(name)), update_of(name)
    prompts = prompts_of(model)
    together = record(model, prompts, settings=ALL, update=update, batch_size=batch_size)
    for tokens, ours in zip(prompts, together, strict=True):
        (alone,) = record(model, [tokens], settings=ALL, update=update)
        for setting, run in ours.items():
            for field in TENSORS:
                assert_agree(getattr(run, field), getattr(alone[setting], field), PASS)
    seen = []
    for indices, runs in record_batches(model, prompts, Wanted(BASE), batch_size=batch_size):
        assert len(indices) == len(runs) <= batch_size
        assert len({prompts[i].demonstrations for i in indices}) == 1
        seen += indices
    assert sorted(seen) == list(range(len(prompts)))


def gpu_is_full() -> None:
    raise torch.OutOfMemoryError("no more than two rows")


def allocate_an_exbibyte() -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.parametrize("run_out", [gpu_is_full, allocate_an_exbibyte])
def test_a_batch_that_runs_out_of_memory_is_halved(run_out: Callable[[], None]) -> None:
    """More than two rows do not fit: a hook of the model's user says so, or asks the allocator for too much."""
    host = shared("bridge:gpt2")
    model = wrap(host)
    prompts, sizes = prompts_of(model), []
    whole = record(model, prompts)

    def scarce(z: Tensor, hook: Any) -> None:
        sizes.append(len(z))
        if len(z) > 2:
            run_out()

    with host.hooks(fwd_hooks=[("blocks.1.attn.hook_z", scarce)]):
        for ours, expected in zip(record(model, prompts, batch_size=3), whole, strict=True):
            assert_agree(ours.icl.z, expected.icl.z, PASS)
    assert max(sizes) == 6
    assert 2 in sizes


def test_a_single_prompt_that_does_not_fit_and_other_errors_are_passed_on() -> None:
    host = shared("bridge:gpt2")
    model = wrap(host)
    prompts, sizes = prompts_of(model), []

    def fail() -> None:
        raise RuntimeError("something else")

    for cause, message, expected in ((allocate_an_exbibyte, "allocate", [1, 4, 2]), (fail, "something else", [1, 4])):
        sizes.clear()

        def hook(z: Tensor, hook: Any, cause: Callable[[], None] = cause) -> None:
            sizes.append(len(z))
            if len(z) > 1:  # not the demonstrations' pass
                cause()

        with host.hooks(fwd_hooks=[("blocks.1.attn.hook_z", hook)]), pytest.raises(RuntimeError, match=message):
            record(model, [prompts[0], prompts[2]], settings=("icl", "zs_matched"), batch_size=2)
        assert sizes == expected


def test_the_prefix_is_run_once_and_shared() -> None:
    """Queries behind the same demonstrations hold the same tensors; the zero-shot run holds their beginning."""
    model = wrap(shared("bridge:gpt2"))
    first, other, second, _ = record(model, prompts_of(model))
    for layer in range(3):
        pointer = first.icl.prefix.k[layer].data_ptr()  # type: ignore[union-attr]
        for run in (second.icl, second.zs_matched, first.zs):
            assert run.prefix.k[layer].data_ptr() == pointer  # type: ignore[union-attr]
        assert other.icl.prefix.k[layer].data_ptr() != pointer  # type: ignore[union-attr]
    assert first.zs.prefix.n_tokens == len(first.icl.tokens.prefix)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["bridge:gpt2", "bridge:gpt_neox", "bridge:llama", *HOOKED_NAMES[:1]])
def test_runs_hold_no_more_than_their_own_tensors(name: str) -> None:
    """A run must not keep a whole batch's tensors alive through a view."""
    for runs in record(wrap(shared(name)), prompts_of(wrap(shared(name)))):
        for run in runs.values():
            for field in TENSORS:
                tensor = getattr(run, field)
                assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), field
                assert not tensor.requires_grad
        for tensor in (*runs.icl.prefix.k, *runs.icl.prefix.v):  # type: ignore[union-attr]
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_the_shared_prefix_is_what_a_shorter_one_begins_with_and_nothing_for_nothing() -> None:
    wrapped, ids = wrap(shared("bridge:llama")), [1, 30, 31, 3, 32, 4]
    assert run_shared_prefix(wrapped, []) is None
    prefix = run_shared_prefix(wrapped, ids)
    assert prefix is not None
    assert prefix.n_tokens == len(ids)
    short, direct = prefix.truncate(2), run_shared_prefix(wrapped, ids[:2])
    assert short is not None
    assert direct is not None
    for layer in range(3):
        assert_agree(short.k[layer], direct.k[layer], PASS)
        assert_agree(short.v[layer], direct.v[layer], PASS)
    assert prefix.truncate(0) is None


def silence(values: Tensor, hook: object = None) -> Tensor:
    """Half of every value, or of every head's output, is nothing."""
    return torch.cat([values[..., :4], torch.zeros_like(values[..., 4:])], dim=-1)


class Silenced:
    """An intervention: half of what the heads of layer 0 read (`at` v) or put out (`at` z) is nothing."""

    def __init__(self, at: str) -> None:
        self.at = at

    def hooks(self, model: LensModel) -> list[Hook]:
        return [(model.hook_name(self.at, 0), silence)]


@pytest.mark.parametrize("name", FEW)
def test_any_intervention_changes_the_pass_and_is_seen_by_the_run(name: str) -> None:
    """Later layers see what the edit made of z, as in the host with the same edit."""
    model = shared(name)
    (tokens,) = prompts_of(wrap(model), [TEXTS[0]])
    changed = Silenced("v")
    (runs,) = record(wrap(model), [tokens], settings=("zs", "ft"), update=changed, position="all")
    assert not runs.ft.z[:, 0, :, 4:].any()
    assert_agree(runs.ft.z[:, 0, :, :4], runs.zs.z[:, 0, :, :4], STEP)
    assert (runs.ft.z[:, 1] - runs.zs.z[:, 1]).abs().max() > 1e-4
    zero_shot = runs.ft.tokens
    oracle = host_z(model, zero_shot.ids, edits=[("blocks.0.attn.hook_z", silence_heads)])[zero_shot.query.slice]
    assert_agree(runs.ft.z[:, 1:], oracle[:, 1:], PASS)


def silence_heads(z: Tensor, hook: object = None) -> Tensor:
    """What `silence` does to values, done to the heads' outputs, which may come as heads or side by side."""
    heads = z.reshape(*z.shape[:2], 4, 8)  # [batch, dst, head * d_head] -> [batch, dst, head, d_head]
    return silence(heads).reshape(z.shape)


def test_an_intervention_on_head_outputs_is_refused() -> None:
    """What it leaves is not the sum of parts."""
    model = wrap(shared("bridge:gpt2"))
    with pytest.raises(UnsupportedModelError, match=r"of head L0H\d is not what its attention pattern"):
        record(model, prompts_of(model, [TEXTS[0]]), settings=("ft",), update=Silenced("z"))


# ---- what is kept beyond the attention ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bridge:gpt2", "bridge:llama", "bridge:gemma2", "bridge:gpt_neox", *HOOKED_NAMES[:3]])
def test_residuals_inputs_queries_and_logits_are_the_hosts(name: str) -> None:
    model, asked = shared(name), (7, 30, 2)
    keep = Keep(residual=True, attention_input=True, raw_q=True, logits=asked, n_top=4)
    prompts = prompts_of(wrap(model))
    plain = record(wrap(model), prompts, position="all")
    for runs, bare in zip(record(wrap(model), prompts, keep=keep, position="all"), plain, strict=True):
        for setting in BASE:
            run = runs[setting]
            for field in TENSORS:  # what is kept changes nothing
                assert_agree(getattr(run, field), getattr(bare[setting], field), STEP)
            assert bare[setting].residual is bare[setting].attention_input is bare[setting].raw_q is None
            assert bare[setting].logits is bare[setting].log_normaliser is None
            edits = mask_query_to_demos(model, run.tokens) if setting == "zs_matched" else ()
            ids, at = run.tokens.ids, list(run.destinations)
            before = torch.stack(host_values(model, ids, "hook_resid_pre", edits=edits))[:, at]
            after = host_values(model, ids, "hook_resid_post", edits=edits)[-1][at]
            assert_agree(run.residual, torch.cat([before, after[None]]).transpose(0, 1), PASS)  # type: ignore[arg-type]
            raw = torch.stack([q.reshape(len(ids), 4, 8) for q in host_values(model, ids, "attn.hook_q", edits=edits)])
            assert_agree(run.raw_q, raw[:, at].transpose(0, 1), PASS)  # type: ignore[arg-type]
            logits = wrap(model).early_exit(after[None])[0]
            assert_agree(run.logits, logits[:, list(asked)], PASS)  # type: ignore[arg-type]
            assert_agree(run.logits - run.log_normaliser[:, None], logits.log_softmax(-1)[:, list(asked)], PASS)  # type: ignore[index, operator]
            assert run.asked == asked
            best = logits.sort(descending=True)
            torch.testing.assert_close(run.top_tokens, best.indices[:, :4])
            assert_agree(run.top_logits, best.values[:, :4], PASS)  # type: ignore[arg-type]
            places = best.indices.argsort() + 1  # of every token
            assert run.ranks is not None
            assert run.ranks.tolist() == places[:, list(asked)].tolist()


@pytest.mark.parametrize("name", ["bridge:llama", "bridge:gemma2", *HOOKED_NAMES[:1]])
def test_logits_are_computed_at_the_destinations_only(name: str) -> None:
    model, seen = wrap(shared(name)), []
    prompts = prompts_of(model)
    record(model, prompts, keep=Keep(logits=(7,)))  # tries, once, whether a pass may be cut short

    def count(x: Tensor, hook: Any) -> None:
        seen.append(x.shape[0] * x.shape[1])

    point = "ln_final.hook_normalized"
    with shared(name).hooks(fwd_hooks=[(point, count)]):
        record(model, prompts, keep=Keep(logits=(7,)))
        assert sum(seen) == len(prompts) * len(BASE)
        seen.clear()
        record(model, prompts, keep=Keep(residual=True))
        record(model, prompts)
    assert sum(seen) <= len(prompts) * len(BASE)


@pytest.mark.parametrize("name", ["bridge:gpt2", "bridge:gemma2", *HOOKED_NAMES[:1]])
def test_an_answer_read_from_a_run_is_that_of_a_pass_of_its_own(name: str) -> None:
    model, candidates = wrap(shared(name)), [(7,), (30,), (7,), (2,)]
    prompts = prompts_of(model)
    for tokens, runs in zip(prompts, record(model, prompts, keep=Keep(logits=(2, 7, 30), n_top=3)), strict=True):
        for run, prefix, query in (
            (runs.icl, None, tokens.ids),
            (runs.zs, None, tokens.zero_shot().ids),
            (runs.icl, runs.icl.prefix, tokens.ids[tokens.query.start :]),
        ):
            (expected,) = read_queries(model, prefix, [query], candidates, n_top=3)
            found = read_run(run, candidates)
            assert_agree(found.scores, expected.scores, PASS)
            assert_agree(found.log_probs, expected.log_probs, PASS)
            assert found.ranks.tolist() == expected.ranks.tolist()
            assert [token for token, _ in found.top] == [token for token, _ in expected.top]
            for (_, one), (_, other) in zip(found.top, expected.top, strict=True):
                assert one == pytest.approx(other, rel=1e-4)


def test_what_was_not_kept_cannot_be_read() -> None:
    model = wrap(shared("bridge:gpt2"))
    (bare,) = record(model, prompts_of(model, TEXTS[:1]), settings=("icl",))
    with pytest.raises(OptionError, match=r"the run has no logits: record the prompt with keep=Keep\(logits=\.\.\.\)"):
        read_run(bare.icl, [(7,)])
    (runs,) = record(model, prompts_of(model, TEXTS[:1]), settings=("icl",), keep=Keep(logits=(7, 9)))
    for wrong in ((8,), (7, 9)):
        with pytest.raises(OptionError, match=r"logits of tokens \[7, 9\], and the candidate \[.*\] is not one of"):
            read_run(runs.icl, [(7,), wrong])


@pytest.mark.parametrize("name", ["bridge:gpt2", "bridge:llama", *HOOKED_NAMES[:1]])
def test_the_attention_input_times_the_weights_is_the_raw_query(name: str) -> None:
    model = shared(name)
    keep = Keep(raw_q=True, attention_input=True)
    for runs in record(wrap(model), prompts_of(wrap(model)), keep=keep):
        for layer in range(3):
            attn = model.blocks[layer].attn
            bias = attn.b_Q if attn.b_Q is not None else 0.0
            q = torch.einsum("tm,hmd->thd", runs.icl.attention_input[:, layer], attn.W_Q) + bias  # type: ignore[index]
            assert_agree(runs.icl.raw_q[:, layer], q.detach(), PASS)  # type: ignore[index]


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_nan_names_the_first_layer() -> None:
    model = bridge_of(build_hf("llama"))
    wrapped = wrap(model)
    with torch.no_grad():
        model.blocks[1].attn.k.original_component.weight[0, 0] = torch.inf
    prompts = prompts_of(wrapped)
    with pytest.raises(NonFiniteError, match=r"the keys of layer 1 hold NaN or infinity.*load the model in float32"):
        record(wrapped, prompts)
    no_start = [tokenize_for(wrapped, prompt(2, instruction=None), prepend_bos=False)]
    with pytest.raises(NonFiniteError, match=r"layer 1 hold NaN"):
        record(wrapped, no_start, settings=("zs",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": ()}, r"no settings: name at least one of 'icl', 'zs'"),
        ({"settings": ("icl", "ft")}, r"setting 'ft' runs the changed model: give it the update"),
        ({"batch_size": 0}, r"batch_size must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    model = wrap(shared("bridge:gpt2"))
    with pytest.raises(OptionError, match=message):
        record(model, prompts_of(model), **options)


def test_a_run_that_was_not_made_names_those_that_were() -> None:
    model = wrap(shared("bridge:gpt2"))
    (runs,) = record(model, prompts_of(model, TEXTS[:1]), settings=("icl",))
    assert "zs" not in runs
    with pytest.raises(OptionError, match=r"the run 'zs' was not made, only 'icl': record the prompt with settings"):
        _ = runs.zs


def test_prompts_without_demonstrations_have_a_zero_shot_run_only() -> None:
    model = wrap(shared("bridge:gpt2"))
    prompts = [tokenize_for(model, prompt(0, query="w16 w17 :"))]
    (runs,) = record(model, prompts, settings=("zs",))
    assert_agree(runs.zs.z, host_z(shared("bridge:gpt2"), prompts[0].ids)[-1:], PASS)
    with pytest.raises(PromptError, match=r"a prompt has no demonstrations.*settings=\('zs',\)"):
        record(model, prompts)
