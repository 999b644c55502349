"""Several prompts at once, results on disk, tables and texts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from families import make_bridge
from hosts import HOOKED_NAMES, HOST_NAMES, prompt, shared
from rounding import PASS, SUM, assert_agree, of_pass, rounding
from torch import Tensor

from metaopt_lens import Decomposition, DecompositionSet, HeadRef, ICLPrompt, decompose, wrap
from metaopt_lens._errors import FileFormatError, ModelMismatchError

# Two sets of demonstrations, interleaved; queries of different lengths; one prompt twice.
PROMPTS = [
    prompt(3, query="w16 :"),
    prompt(2, query="w16 w17 w18 w19 :", instruction=None, first=60),
    prompt(3, query="w22 w23 w24 :"),
    prompt(3, query="w16 :"),
    prompt(2, query="w25 :", instruction=None, first=60),
    prompt(3, query="w26 w27 :"),
]
TENSORS = ("q", "z", "pattern", "sink", "k", "v", "own_k", "own_v")
FEW = ["bridge:gpt2", "bridge:gptj", "bridge:gpt_oss", *HOOKED_NAMES[:1]]


@pytest.mark.parametrize(("name", "batch_size"), [*((name, 2) for name in FEW), (FEW[0], 1), (FEW[0], 8)])
def test_a_set_equals_one_by_one(name: str, batch_size: int) -> None:
    together = decompose(shared(name), PROMPTS, position="all", batch_size=batch_size)
    assert isinstance(together, DecompositionSet)
    assert len(together) == len(PROMPTS)
    for text, ours in zip(PROMPTS, together, strict=True):
        alone = decompose(shared(name), text, position="all")
        assert ours.prompt == text
        assert ours.tokenized == alone.tokenized
        assert ours.positions == alone.positions
        assert list(ours.runs) == ["icl", "zs", "zs_matched"]
        for setting, run in ours.runs.items():
            for field in TENSORS:
                assert_agree(getattr(run, field), getattr(alone.runs[setting], field), PASS)


@pytest.mark.parametrize("name", HOST_NAMES)
def test_ragged_batches_on_every_family(name: str) -> None:
    together = decompose(shared(name), PROMPTS[:3])
    for text, ours in zip(PROMPTS, together, strict=False):
        alone = decompose(shared(name), text)
        for field in ("z", "z_zero_shot", "z_position_matched"):
            assert_agree(getattr(ours, field), getattr(alone, field), of_pass(name))
        assert_agree(ours.linear.total, alone.linear.total, of_pass(name))


@pytest.mark.parametrize("name", FEW)
def test_all_positions_and_single_positions_agree(name: str) -> None:
    text = PROMPTS[1]
    everywhere = decompose(shared(name), text, position="all")
    n = everywhere.tokenized.n_tokens
    assert everywhere.positions == tuple(range(n - 5, n))
    for row, at in enumerate(everywhere.positions):
        one = decompose(shared(name), text, position=at if row % 2 else at - n)
        assert one.positions == (at,)
        for form in ("softmax", "linear"):
            for part in ("zero_shot", "meta_gradient"):
                whole = getattr(getattr(everywhere, form), part)[row]
                assert_agree(getattr(getattr(one, form), part), whole, PASS)
        assert_agree(one.effects.indirect, everywhere.effects.indirect[row], PASS, of=(one.z,))  # type: ignore[index]
        assert_agree(one.softmax.mass, everywhere.softmax.mass[row], PASS)
    last = decompose(shared(name), text)
    assert last.positions == (n - 1,)


def test_sets_are_sequences() -> None:
    together = decompose(shared("bridge:gpt2"), PROMPTS[:3])
    assert isinstance(together[1], Decomposition)
    assert isinstance(together[:2], DecompositionSet)
    assert len(together[1:]) == 2
    assert [d.prompt for d in together] == PROMPTS[:3]
    assert together[-1].prompt == PROMPTS[2]
    assert isinstance(decompose(shared("bridge:gpt2"), PROMPTS[:1]), DecompositionSet)


def test_strings_and_prompts_may_be_mixed() -> None:
    text = "w10 : w11\nw12 : w13\nw14 :"
    both = decompose(shared("bridge:gpt2"), [text, ICLPrompt.from_string(text)])
    assert torch.equal(both[0].z, both[1].z)


# ---- files ----------------------------------------------------------------------------------------------------------


def equal(one: Decomposition, other: Decomposition) -> None:
    assert (one.prompt, one.keep_position_axis, one.provenance) == (
        other.prompt,
        other.keep_position_axis,
        other.provenance,
    )
    assert list(one.runs) == list(other.runs)
    for mine, theirs in zip(one.runs.values(), other.runs.values(), strict=True):
        for name in (*(field.name for field in dataclasses.fields(mine)), "k", "v", "visible"):
            a, b = getattr(mine, name), getattr(theirs, name)
            if isinstance(a, Tensor):
                assert a.dtype == b.dtype
                assert torch.equal(a, b), name
            elif name == "stream":
                assert a is not None
                assert all(torch.equal(tensor, vars(b)[part]) for part, tensor in vars(a).items())
            elif name == "prefix":
                assert (a is None) == (b is None)
                assert a is None or all(map(torch.equal, a.host_k, b.host_k))
            elif name == "rules":
                for x, y in zip(a, b, strict=True):
                    assert (x.scale, x.softcap, x.window) == (y.scale, y.softcap, y.window)
                    for tensor, again in ((x.sinks, y.sinks), (x.alibi_slopes, y.alibi_slopes)):
                        assert (tensor is None and again is None) or torch.equal(tensor, again)
            else:
                assert a == b, name
    assert torch.equal(one.strength, other.strength)


@pytest.mark.parametrize("runs", ["both", "plain", "none"])
@pytest.mark.parametrize("position", ["last", "all"])
def test_round_trip_is_bit_equal(tmp_path: Path, runs: Any, position: Any) -> None:
    result = decompose(shared("bridge:gpt_oss"), PROMPTS[0], position=position, zero_shot_runs=runs)
    assert result.save(tmp_path / "one") == tmp_path / "one.json"
    loaded = Decomposition.load(tmp_path / "one")
    equal(loaded, result)
    assert torch.equal(loaded.softmax.meta_gradient, result.softmax.meta_gradient)
    assert torch.equal(loaded.linear.zero_shot, result.linear.zero_shot)
    assert loaded.source is None
    with pytest.raises(ModelMismatchError, match=r"need the model: call with_model"):
        _ = loaded.residual
    again = Decomposition.load(tmp_path / "one.json", model=shared("bridge:gpt_oss"))
    assert torch.equal(again.residual.meta_gradient, result.residual.meta_gradient)


def test_a_bfloat16_result_keeps_its_dtype(tmp_path: Path) -> None:
    from hosts import build

    result = decompose(build("bridge:gpt2", dtype=torch.bfloat16), PROMPTS[0])
    result.save(tmp_path / "low")
    equal(Decomposition.load(tmp_path / "low"), result)


def test_a_set_round_trip(tmp_path: Path) -> None:
    together = decompose(shared("bridge:gpt2"), PROMPTS)
    assert together.save(tmp_path / "set") == tmp_path / "set" / "index.json"
    loaded = DecompositionSet.load(tmp_path / "set", model=shared("bridge:gpt2"))
    assert len(loaded) == len(together)
    for one, other in zip(loaded, together, strict=True):
        equal(one, other)
        assert one.source is not None


def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    result = decompose(shared("bridge:gpt2"), PROMPTS[0])
    base = tmp_path / "r"
    result.save(base)
    tensors, meta = tmp_path / "r.safetensors", tmp_path / "r.json"
    raw, text = tensors.read_bytes(), meta.read_text()

    with pytest.raises(FileFormatError, match=r"nothing\.safetensors does not exist: a saved decomposition is"):
        Decomposition.load(tmp_path / "nothing")
    tensors.write_bytes(raw[:-7])
    with pytest.raises(FileFormatError, match=r"r\.safetensors is damaged.*SHA-256 differs"):
        Decomposition.load(base)
    tensors.write_bytes(raw[:500] + bytes([raw[500] ^ 1]) + raw[501:])
    with pytest.raises(FileFormatError, match=r"r\.safetensors is damaged"):
        Decomposition.load(base)
    tensors.write_bytes(raw)
    meta.write_text(text[:-30])
    with pytest.raises(FileFormatError, match=r"r\.json is not valid JSON"):
        Decomposition.load(base)
    meta.write_text(text.replace('"kind": "decomposition"', '"kind": "finetuned model"'))
    with pytest.raises(FileFormatError, match=r"does not describe a saved decomposition \(its kind is 'finetuned"):
        Decomposition.load(base)
    body = json.loads(text)
    destinations = body["runs"].pop("destinations")
    meta.write_text(json.dumps(body))
    with pytest.raises(FileFormatError, match=r"is not a complete decomposition: KeyError\('runs\.destinations'\)"):
        Decomposition.load(base)
    del destinations["zs"]  # a run that does not say where it was recorded
    meta.write_text(json.dumps(body | {"runs": body["runs"] | {"destinations": destinations}}))
    with pytest.raises(FileFormatError, match=r"is not a complete decomposition: KeyError\('zs'\)"):
        Decomposition.load(base)
    meta.write_text(text)
    equal(Decomposition.load(base), result)


def test_a_file_of_version_0_1_is_refused_by_name(tmp_path: Path) -> None:
    """Its JSON held the tokens inside the prompt, and of the zero-shot runs z alone."""
    result = decompose(shared("bridge:gpt2"), PROMPTS[0])
    result.save(tmp_path / "old")
    file = tmp_path / "old.json"
    body = json.loads(file.read_text())
    body["prompt"] = {"text": body["prompt"], "tokenized": body.pop("runs")["tokens"]}
    file.write_text(json.dumps(body))
    with pytest.raises(FileFormatError, match=r"old was written by metaopt-lens 0\.1.*decompose the prompt again"):
        Decomposition.load(tmp_path / "old")


def test_results_are_compared_by_identity() -> None:
    one, other = (decompose(shared("bridge:gpt2"), PROMPTS[0]) for _ in range(2))
    assert one == one
    assert one != other
    assert len({one, other, one.runs, one.runs.icl, one.effects, one.softmax, one.linear}) == 7


@pytest.mark.parametrize("position", ["last", "all"])
def test_everything_of_a_decomposition_has_one_shape(position: Any) -> None:
    result = decompose(shared("bridge:gpt2"), PROMPTS[2], position=position)
    shape = ((4,) if position == "all" else ()) + (3, 4, 8)
    parts = (result.softmax.zero_shot, result.linear.total, result.effects.direct, result.momentum)
    for tensor in (result.q, result.z, result.z_zero_shot, result.z_position_matched, *parts):
        assert tensor.shape == shape
    for tensor in (result.sink, result.softmax.mass, result.fidelity):
        assert tensor.shape == shape[:-1]
    assert result.pattern.shape == (*shape[:-1], result.tokenized.n_tokens)
    assert result.runs.icl.z.shape == (4 if position == "all" else 1, 3, 4, 8)


def test_a_damaged_set_is_named(tmp_path: Path) -> None:
    decompose(shared("bridge:gpt2"), PROMPTS[:2]).save(tmp_path / "set")
    with pytest.raises(FileFormatError, match=r"other/index\.json is not the index of a saved set"):
        DecompositionSet.load(tmp_path / "other")
    (tmp_path / "set" / "00001.safetensors").unlink()
    with pytest.raises(FileFormatError, match=r"00001\.safetensors does not exist"):
        DecompositionSet.load(tmp_path / "set")
    (tmp_path / "set" / "index.json").write_text("[1]")
    with pytest.raises(FileFormatError, match=r"index\.json is not the index"):
        DecompositionSet.load(tmp_path / "set")


# ---- tables and texts -----------------------------------------------------------------------------------------------


def test_the_table_holds_the_tensors_numbers() -> None:
    result = decompose(shared("bridge:llama"), PROMPTS[1], position="all")
    frame = result.to_frame()
    w_o = [block.attn.W_O.detach() for block in shared("bridge:llama").blocks]
    assert len(frame) == 5 * 3 * 4
    assert list(frame.columns[:5]) == ["position", "token", "layer", "head", "name"]
    for row, layer, head in [(0, 0, 0), (2, 1, 3), (4, 2, 1)]:
        chosen = frame[
            (frame["position"] == result.positions[row]) & (frame["layer"] == layer) & (frame["head"] == head)
        ]
        assert len(chosen) == 1
        line = chosen.iloc[0]
        at = (row, layer, head)
        effects = result.effects
        assert effects.indirect is not None
        assert effects.position is not None
        expected = {
            "mass": result.softmax.mass[at],
            "meta_gradient_residual_norm": (result.softmax.meta_gradient[at] @ w_o[layer][head]).norm(),
            "z_norm": result.z[at].norm(),
            "zero_shot_norm": result.softmax.zero_shot[at].norm(),
            "meta_gradient_norm": result.softmax.meta_gradient[at].norm(),
            "update_norm": result.softmax.update[at].norm(),
            "fidelity": result.fidelity[at],
            "linear_zero_shot_norm": result.linear.zero_shot[at].norm(),
            "linear_meta_gradient_norm": result.linear.meta_gradient[at].norm(),
            "total_effect_norm": effects.total[at].norm(),
            "direct_effect_norm": effects.direct[at].norm(),
            "indirect_and_position_norm": effects.indirect_and_position[at].norm(),
            "indirect_effect_norm": effects.indirect[at].norm(),
            "position_effect_norm": effects.position[at].norm(),
        }
        for column, value in expected.items():
            assert line[column] == pytest.approx(float(value), rel=rounding(SUM, 1.0)), column
        assert set(frame.columns) == {*expected, "position", "token", "layer", "head", "name"}
        assert line["name"] == f"L{layer}H{head}"
        assert line["token"] == result.tokenized.tokens[result.positions[row]]


def test_the_table_without_zero_shot_runs_and_of_a_set() -> None:
    none = decompose(shared("bridge:gpt2"), PROMPTS[0], zero_shot_runs="none").to_frame()
    assert "total_effect_norm" not in none
    assert len(none) == 12
    together = decompose(shared("bridge:gpt2"), PROMPTS[:3])
    frame = together.to_frame()
    assert isinstance(frame, pd.DataFrame)
    assert frame["query"].tolist() == [0] * 12 + [1] * 12 + [2] * 12
    assert frame["mass"].tolist()[12:24] == together[1].to_frame()["mass"].tolist()


@pytest.mark.parametrize("name", ["bridge:gpt2", "bridge:llama"])
def test_heads_are_ordered_by_their_meta_gradient_in_the_residual_stream(name: str) -> None:
    """Against W_O of the host, one head at a time; the share of z ranks nothing."""
    model = shared(name)
    result = decompose(model, PROMPTS[0])
    expected = torch.stack(
        [
            torch.stack([(result.softmax.meta_gradient[i, h] @ model.blocks[i].attn.W_O[h]).norm() for h in range(4)])
            for i in range(3)
        ]
    ).detach()
    torch.testing.assert_close(result.strength, expected)
    heads = result.heads()
    assert len(heads) == len(set(heads)) == 12
    values = [float(expected[h.layer, h.head]) for h in heads]
    assert values == sorted(values, reverse=True)
    assert result.heads(3) == heads[:3]
    effects = torch.arange(12.0).view(3, 4)
    assert [str(h) for h in result.heads(2, by=effects)] == ["L2H3", "L2H2"]
    frame = result.to_frame().sort_values("meta_gradient_residual_norm", ascending=False)
    assert frame["name"].tolist() == [str(h) for h in heads]


def test_a_head_that_writes_nothing_is_never_the_strongest() -> None:
    """Planted: the head with the largest share of z gets a W_O of 0; it does nothing, so it is last."""
    model = make_bridge("gpt2")
    before = decompose(model, PROMPTS[0])
    share = before.softmax.meta_gradient.norm(dim=-1) / before.z.norm(dim=-1)
    layer, head = divmod(int(share[2].argmax()) + 8, 4)  # the last layer: nothing later changes
    with torch.no_grad():
        wrap(model).w_o(layer)[head].zero_()
    after = decompose(model, PROMPTS[0])
    torch.testing.assert_close(after.softmax.meta_gradient[layer, head], before.softmax.meta_gradient[layer, head])
    assert after.heads()[-1] == HeadRef(layer, head)
    assert float(after.strength[layer, head]) == 0


def test_a_loaded_result_and_a_set_know_the_order(tmp_path: Path) -> None:
    result = decompose(shared("bridge:gpt2"), PROMPTS[0])
    result.save(tmp_path / "one")
    loaded = Decomposition.load(tmp_path / "one")
    assert loaded.source is None
    assert loaded.heads() == result.heads()
    assert repr(loaded) == repr(result)
    together = decompose(shared("bridge:gpt2"), PROMPTS[:3])
    mean = torch.stack([item.strength for item in together]).mean(0).detach()
    values = [float(mean[h.layer, h.head]) for h in together.heads()]
    assert values == sorted(values, reverse=True)
    bare = dataclasses.replace(loaded, stored_strength=None)
    with pytest.raises(ModelMismatchError, match="the strengths of heads need the model"):
        bare.heads()
    assert "residual stream" not in repr(bare)


def test_repr_says_what_it_is() -> None:
    result = decompose(shared("bridge:llama"), PROMPTS[0])
    text = repr(result)
    assert "3 layers x 4 heads" in text
    assert "3 demonstrations in 15 tokens, query of 2 tokens, 4 before" in text
    assert "position 20 (':')" in text
    mass = result.softmax.mass
    assert f"mean {mass.mean():.3f}, highest {mass.max():.3f}" in text
    assert str(result.heads(1)[0]) in text
    assert len(text) < 800
    assert "tensor(" not in text
    everywhere = repr(decompose(shared("bridge:llama"), PROMPTS[0], position="all"))
    assert "at all query positions" in everywhere
    together = repr(decompose(shared("bridge:llama"), PROMPTS[:2]))
    assert together.startswith("DecompositionSet of 2 prompts")
