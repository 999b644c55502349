"""Everything at once on a pretrained language model, compared with plain transformers and torch."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import reviews
from plain import Plain
from rounding import SUM, assert_agree
from torch import Tensor
from typer.testing import CliRunner

from metaopt_lens import Decomposition, ICLPrompt, KnockOut, decompose, finetune, head_effects, intervene, meta_gradient
from metaopt_lens.cli import app
from metaopt_lens.finetuning import WeightUpdate, training_examples
from metaopt_lens.finetuning._losses import layer_causal_losses
from metaopt_lens.models import wrap
from metaopt_lens.models._gguf_cache import cache_folder
from metaopt_lens.prompts import TokenizedPrompt, tokenize_label

LR = 1e-3
DEMOS = reviews(3).demos


def without_demos(tokens: TokenizedPrompt) -> list[int]:
    """Ids of S and Q."""
    inside = tokens.demonstrations
    return [token for i, token in enumerate(tokens.ids) if not inside.start <= i < inside.stop]


def logits(model: Any, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids]))[0].clone()


# ---- the model ----------------------------------------------------------------------------------------------------


def test_the_converted_model_is_the_one_in_the_file(name: str, bridge: Any, plain: Plain) -> None:
    from transformers import AutoModelForCausalLM

    from metaopt_lens.models._gguf_cache import converted
    from metaopt_lens.models._packaged import packaged_source

    with converted(packaged_source(name), dtype=torch.float32, device="cpu") as folder:
        mine = AutoModelForCausalLM.from_pretrained(folder)
    expected = dict(plain.model.named_parameters())
    found = dict(mine.named_parameters())
    assert found.keys() == expected.keys()
    for key, parameter in found.items():
        assert torch.equal(parameter, expected[key]), key
    info = wrap(bridge).info
    assert info.quantization == {"smollm2": "Q4_1 GGUF", "gemma3-270m": "Q4_K_M GGUF"}[name]
    assert info.name == {"smollm2": "SmolLM2-135M-Instruct", "gemma3-270m": "Gemma-3-270M"}[name]
    assert (info.n_layers, info.n_heads) == (plain.n_layers, plain.n_heads)


def test_it_reads_and_writes_english(name: str, bridge: Any, tokens: TokenizedPrompt) -> None:
    """A tokenizer or weights read wrongly give finite nonsense."""
    assert bridge.tokenizer.decode(bridge.tokenizer("in 1987, déjà vu").input_ids, skip_special_tokens=True) == (
        "in 1987, déjà vu"
    )
    ids = bridge.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        best = bridge(ids)[0, -1].argmax()
    assert bridge.tokenizer.decode([int(best)]) in {" Paris", " the", " a"}
    window = getattr(bridge.original_model.config, "sliding_window", None)
    assert window is None or tokens.n_tokens > window


# ---- split, merge, knock-out --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def split(bridge: Any, prompt: ICLPrompt) -> Decomposition:
    return decompose(bridge, prompt)


def test_split_against_a_plain_run(plain: Plain, tokens: TokenizedPrompt, split: Decomposition) -> None:
    seen = plain.attention(tokens.ids)
    inside = tokens.demonstrations.slice
    last = seen.pattern[:, :, -1]  # [layer, head, src]
    meta = torch.einsum("lhs,lshd->lhd", last[..., inside], seen.v[:, inside])
    parts = split.softmax
    assert_agree(parts.zero_shot + parts.meta_gradient, seen.z[:, -1], plain.pass_units)
    assert_agree(parts.meta_gradient, meta, plain.pass_units, of=(seen.z[:, -1],))
    assert_agree(parts.zero_shot, seen.z[:, -1] - meta, plain.pass_units, of=(seen.z[:, -1],))
    mass = last[..., inside].sum(-1)
    assert_agree(parts.mass, mass, plain.pass_units)
    assert 0.05 < float(mass.mean()) < 0.95


def test_zero_shot_runs_against_plain_runs(plain: Plain, tokens: TokenizedPrompt, split: Decomposition) -> None:
    zero_shot = plain.attention(without_demos(tokens)).z[:, -1]
    assert split.z_zero_shot is not None
    assert_agree(split.z_zero_shot, zero_shot, plain.pass_units)
    with plain.hidden(tokens.query.slice, tokens.demonstrations.slice):
        matched = plain.attention(tokens.ids).z[:, -1]
    assert split.z_position_matched is not None
    assert_agree(split.z_position_matched, matched, plain.pass_units)


def test_merge_is_the_in_context_run(bridge: Any, plain: Plain, prompt: ICLPrompt, tokens: TokenizedPrompt) -> None:
    expected = plain.logits(tokens.ids)[tokens.query.slice]
    zero_shot = without_demos(tokens)
    with intervene(bridge, meta_gradient(bridge, prompt)):
        merged = logits(bridge, zero_shot)[-len(expected) :]
    assert_agree(merged, expected, plain.pass_units)
    assert (logits(bridge, zero_shot)[-1] - expected[-1]).abs().max() > 1


def test_knock_outs_are_masks_of_minus_infinity(
    bridge: Any, plain: Plain, prompt: ICLPrompt, tokens: TokenizedPrompt
) -> None:
    query, demos = tokens.query.slice, tokens.demonstrations.slice
    middle = plain.n_layers // 2
    some = {(0, 1), (middle, 0), (middle, plain.n_heads - 1), (plain.n_layers - 1, 2)}
    base = plain.logits(tokens.ids)
    for heads in (None, some):
        with plain.hidden(query, demos, heads):
            expected = plain.logits(tokens.ids)
        names = None if heads is None else [f"L{layer}H{head}" for layer, head in sorted(heads)]
        with intervene(bridge, KnockOut(prompt, heads=names)):
            found = logits(bridge, list(tokens.ids))
        assert_agree(found, expected, plain.pass_units)
        moved = (expected - base).abs().max()
        assert moved > 100 * (found - expected).abs().max()


def test_generation_under_intervene_is_the_in_context_generation(
    bridge: Any, plain: Plain, prompt: ICLPrompt, tokens: TokenizedPrompt
) -> None:
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    ids, zero_shot = torch.tensor([tokens.ids]), torch.tensor([without_demos(tokens)])
    expected = plain.model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, -16:]
    with intervene(bridge, meta_gradient(bridge, prompt)):
        mask = torch.ones_like(zero_shot)
        found = bridge.original_model.generate(zero_shot, attention_mask=mask, **options)[0, -16:]
    assert found.tolist() == expected.tolist()
    alone = bridge.original_model.generate(zero_shot, attention_mask=mask, **options)[0, -16:]
    assert alone.tolist() != expected.tolist()


# ---- finetuning ---------------------------------------------------------------------------------------------------


def sgd_on_own_weights(
    plain: Plain, sequences: list[tuple[int, ...]], ids: list[int]
) -> tuple[Any, list[float], Tensor]:
    """torch.optim.SGD on k_proj and v_proj; the sum of its steps, the losses, and the logits afterwards."""
    weights = {p: [getattr(layer.self_attn, f"{p}_proj").weight for layer in plain.layers] for p in "kv"}
    flat = [w for tensors in weights.values() for w in tensors]
    before = [w.detach().clone() for w in flat]
    total = [torch.zeros_like(w) for w in flat]
    optimizer = torch.optim.SGD(flat, lr=LR)
    plain.model.requires_grad_(False)
    for w in flat:
        w.requires_grad_(True)
    losses = []
    for sequence in sequences:
        tokens = torch.tensor([sequence])
        loss = torch.nn.functional.cross_entropy(plain.model(tokens).logits[0, :-1], tokens[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        for sum_, w in zip(total, flat, strict=True):
            assert w.grad is not None
            sum_.sub_(LR * w.grad)  # the change itself: W_new - W_old has the rounding of W
        optimizer.step()
        losses.append(float(loss.detach()))
    after = plain.logits(ids)
    with torch.no_grad():
        for w, old in zip(flat, before, strict=True):
            w.copy_(old)
            w.requires_grad_(False)
    n = plain.n_layers
    # [kv_head * d_head, d_model] -> [layer, kv_head, d_model, d_head]
    changes = {
        p: torch.stack(total[i * n : (i + 1) * n]).unflatten(1, (plain.n_kv_heads, plain.d_head)).transpose(2, 3)
        for i, p in enumerate("kv")
    }
    return changes, losses, after


def test_finetuning_is_sgd_on_the_models_own_weights(bridge: Any, plain: Plain, tokens: TokenizedPrompt) -> None:
    sequences = [example.ids for example in training_examples(wrap(bridge), DEMOS)]
    zero_shot = without_demos(tokens)
    changes, losses, after = sgd_on_own_weights(plain, sequences, zero_shot)
    update = finetune(bridge, DEMOS, lr=LR, progress=False)
    assert update.losses == pytest.approx(losses, rel=1e-5)
    for p, found in (("k", update.w_k), ("v", update.w_v)):
        assert found is not None
        for layer in range(plain.n_layers):  # forward and back, three times
            assert_agree(found[layer], changes[p][layer], 2 * 3 * plain.pass_units)
            assert changes[p][layer].norm() > 0
    with update.applied(bridge):
        applied = logits(bridge, zero_shot)
    assert_agree(applied, after, 2 * 3 * plain.pass_units)
    moved = (after - plain.logits(zero_shot)).abs().max()
    assert moved > 100 * (applied - after).abs().max()


def test_layer_causal_losses_are_the_plain_models_early_exits(bridge: Any, plain: Plain) -> None:
    model = wrap(bridge)
    examples = training_examples(model, DEMOS[:1])
    with torch.no_grad():
        found = layer_causal_losses(model, examples, [], "block")
    ids = torch.tensor(examples[0].ids)
    exits = plain.early_exits(examples[0].ids)
    expected = torch.stack([torch.nn.functional.cross_entropy(logits[:-1], ids[1:]) for logits in exits])
    assert_agree(found, expected, plain.pass_units)


def test_layer_causal_first_step_of_the_last_layer_is_ordinary_gradient_descents(bridge: Any) -> None:
    ordinary, causal = (finetune(bridge, DEMOS[:1], lr=LR, layer_causal=c, progress=False) for c in (False, True))
    for field, tensor in ordinary.tensors().items():
        assert_agree(causal.tensors()[field][-1], tensor[-1], SUM)
    assert ordinary.w_v is not None
    assert causal.w_v is not None
    assert (causal.w_v[0] - ordinary.w_v[0]).norm() > 0.1 * ordinary.w_v[0].norm()


def test_a_layers_loss_has_zero_gradient_elsewhere(bridge: Any) -> None:
    model = wrap(bridge)
    zero = 0.0 * finetune(model, DEMOS[:1], lr=LR, progress=False)
    update = WeightUpdate(zero.model, **{f: t.clone().requires_grad_() for f, t in zero.tensors().items()})
    losses = layer_causal_losses(model, training_examples(model, DEMOS[:1]), update.hooks(model), "block")
    for layer in (0, model.info.n_layers // 2, model.info.n_layers - 1):
        gradients = torch.autograd.grad(losses[layer], list(update.tensors().values()), retain_graph=True)
        for gradient in gradients:
            norms = gradient.flatten(1).norm(dim=1)
            assert norms[layer] > 0
            assert not norms[[i for i in range(len(norms)) if i != layer]].any()


# ---- effects of heads ---------------------------------------------------------------------------------------------


def test_head_effects_are_explicit_knock_outs(
    bridge: Any, plain: Plain, prompt: ICLPrompt, tokens: TokenizedPrompt
) -> None:
    effects = head_effects(bridge, [prompt], metric="label_log_prob")
    label = tokenize_label("positive", prompt.template, bridge.tokenizer)
    ids = [*tokens.ids, *label[:-1]]
    demos = tokens.demonstrations.slice
    query = slice(tokens.query.start, len(ids))

    def log_prob() -> Tensor:
        ends = plain.logits(ids)[tokens.n_tokens - 1 :].double().log_softmax(-1)
        return ends[range(len(label)), list(label)].mean()

    full = log_prob()
    units = plain.pass_units
    size = plain.logits(ids)[-1].abs().max()
    assert_agree(effects.in_context[0].double(), full, units, of=(size,))
    with plain.hidden(query, demos):
        assert_agree(effects.zero_shot[0].double(), log_prob(), units, of=(size,))
    strongest = [(ref.layer, ref.head) for ref in effects.ranked(2)]
    for layer, head in [*strongest, (0, 0), (plain.n_layers - 1, plain.n_heads - 1)]:
        with plain.hidden(query, demos, {(layer, head)}):
            expected = full - log_prob()
        assert_agree(effects.exact[0, layer, head].double(), expected, units, of=(size,))
    assert float(effects.exact.abs().max()) > 1e-2
    assert float(effects.in_context[0]) > float(effects.zero_shot[0])


# ---- HookedTransformer --------------------------------------------------------------------------------------------


def test_hooked_transformer_on_the_same_weights_agrees(
    name: str, bridge: Any, plain: Plain, prompt: ICLPrompt, tokens: TokenizedPrompt, split: Decomposition
) -> None:
    if name != "smollm2":
        pytest.skip("TransformerLens converts a Llama's weights here; Gemma 3 is tested on bridges")
    pytest.importorskip("transformer_lens.HookedTransformer", reason="HookedTransformer ended with TransformerLens 3.x")
    hooked = hooked_llama(plain, bridge.tokenizer)
    assert_agree(logits(hooked, list(tokens.ids)), plain.logits(tokens.ids), plain.pass_units)
    other = decompose(hooked, prompt, prepend_bos=split.tokenized.bos is not None)
    assert other.tokenized.ids == split.tokenized.ids
    for part in ("zero_shot", "meta_gradient", "update", "mass"):
        assert_agree(getattr(other.softmax, part), getattr(split.softmax, part), plain.pass_units, of=(split.z,))


def hooked_llama(plain: Plain, tokenizer: Any) -> Any:
    """A HookedTransformer built from a config, its weights through TransformerLens's own conversion."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    config = plain.model.config
    cfg = HookedTransformerConfig(
        model_name="SmolLM2-135M-Instruct",
        original_architecture="LlamaForCausalLM",
        d_model=config.hidden_size,
        d_head=config.head_dim,
        n_heads=config.num_attention_heads,
        n_key_value_heads=config.num_key_value_heads,
        d_mlp=config.intermediate_size,
        n_layers=config.num_hidden_layers,
        n_ctx=1024,
        d_vocab=config.vocab_size,
        eps=config.rms_norm_eps,
        act_fn=config.hidden_act,
        normalization_type="RMS",
        final_rms=True,
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_adjacent_pairs=False,
        rotary_dim=config.head_dim,
        rotary_base=config.rope_parameters["rope_theta"],
        device="cpu",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="HookedTransformer is deprecated", category=DeprecationWarning)
        model = HookedTransformer(cfg, tokenizer=tokenizer)
    weights = convert_llama_weights(plain.model, cfg)
    report = model.load_state_dict(weights, strict=False)
    assert not report.unexpected_keys
    assert all("mask" in key or "IGNORE" in key or "rotary" in key for key in report.missing_keys)
    return model.eval()


# ---- the command line, end to end ---------------------------------------------------------------------------------


def invoke(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_run_and_report(name: str, bridge: Any, tmp_path: Path) -> None:
    rows = [
        {"sentence": demo.input, "label": int(demo.label == "positive"), "split": split}
        for split, n, start in (("train", 12, 0), ("validation", 6, 12))
        for demo in reviews(start + n).demos[start:]
    ]
    (tmp_path / "sst2.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {
        "model": name,
        "task": "sst2",
        "shots": 1,  # labels that cannot be shuffled: those controls would repeat everything five times
        "seeds": 1,
        "queries": 2,
        "lr": LR,
        "rules": ["gd"],
        "n_null_draws": 1,
    }
    left_out = {"random_weights": False, "attribution": False, "unrelated": False}
    (tmp_path / "run.json").write_text(json.dumps({**settings, **left_out}), encoding="utf-8")
    out = tmp_path / "run"
    data = ["--data", tmp_path / "sst2.jsonl"]
    shown = invoke("run", "--config", tmp_path / "run.json", *data, "--device", "cpu", "--out", out)
    assert re.search(r"gd: accuracy ZS [01]\.\d+ .*, ICL [01]\.\d+ .*, FT [01]\.\d+", shown)
    info = wrap(bridge).info
    stored = json.loads((out / "model.json").read_text(encoding="utf-8"))
    assert (stored["name"], stored["quantization"]) == (info.name, info.quantization)
    invoke("report", out)
    (page,) = out.glob("*.html")
    text = page.read_text(encoding="utf-8")
    assert info.name in text
    assert info.quantization in text
    assert str(cache_folder(None)) not in text  # a path of this machine


def test_decompose_on_the_command_line(name: str, bridge: Any, tmp_path: Path) -> None:
    lines = [f"{demo.input} : {demo.label}" for demo in reviews(4).demos]
    (tmp_path / "prompt.txt").write_text("\n".join([*lines, "It is a small wonder :"]), encoding="utf-8")
    shown = invoke(
        "decompose", "--model", name, "--prompt", tmp_path / "prompt.txt", "--device", "cpu", "--out", tmp_path
    )
    info = wrap(bridge).info
    assert f"Decomposition of {info.name}" in shown
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"as trained, de-quantised from {info.quantization}" in page
