"""The command ``compile`` and what it is made of, on the bundled model."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from metaopt_lens import ICLPrompt, WeightPatch, intervene, load_tiny
from metaopt_lens._errors import OptionError, PromptError
from metaopt_lens.analysis import Factors, effective_rank, static_curve
from metaopt_lens.cli import app
from metaopt_lens.experiments import CompiledPrompt, compile_prompts, episode_prompts
from metaopt_lens.models import wrap
from metaopt_lens.models.tiny import sample_episode
from metaopt_lens.patches import static_patch
from metaopt_lens.runs import tokenize_for


@cache
def queries(n: int = 12) -> tuple[ICLPrompt, ...]:
    """Different queries behind the same demonstrations, with their labels."""
    found: dict[str, ICLPrompt] = {}
    episode = sample_episode(random.Random(3), n_demos=8, n_categories=2)
    for prompt in episode_prompts(episode):
        found.setdefault(prompt.query, prompt)
    return tuple(found.values())[:n]


@cache
def compiled() -> tuple[Any, CompiledPrompt]:
    model = load_tiny()
    return model, compile_prompts(model, queries())


def test_what_is_said_is_what_two_runs_give() -> None:
    model, found = compiled()
    patch = found.patch
    with torch.no_grad():
        in_context, zero_shot = (
            model(torch.tensor([list(ids)]))[0, -len(patch.query_ids) :]
            for ids in (patch.tokens.ids, patch.zero_shot_ids)
        )
    assert found.off[1] == pytest.approx(float((in_context - zero_shot).abs().max()), rel=1e-4)
    assert found.off[0] < 1e-4 * found.largest
    assert found.off[1] > 1
    best = in_context[-1].softmax(-1).max()
    for setting in ("in context", "patched zero-shot"):
        assert found.top[setting][0].probability == pytest.approx(float(best), abs=1e-4)
    assert found.top["in context"][0].text == found.top["patched zero-shot"][0].text
    shares = found.demo_shares()
    assert shares is not None
    torch.testing.assert_close(shares.sum(-1), torch.ones(len(shares)), rtol=0, atol=1e-3)


def test_the_static_curve_is_what_its_definition_says() -> None:
    model, _ = compiled()
    fitted, asked = queries()[:6], queries()[6:]
    curve = static_curve(model, fitted, asked, n_fit=(2, 6))
    static = static_patch(model, fitted)
    for number, prompt in enumerate(asked):
        whole = tokenize_for(wrap(model), prompt)
        with torch.no_grad():
            expected = model(torch.tensor([whole.ids]))[0, -1].double().log_softmax(-1)
            with intervene(model, static):
                patched = model(torch.tensor([whole.zero_shot().ids]))[0, -1].double().log_softmax(-1)
        torch.testing.assert_close(curve.in_context[number], expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(curve.static[1, number], patched, rtol=0, atol=1e-4)
        divergence = torch.nn.functional.kl_div(patched, expected, log_target=True, reduction="sum")
        assert float(curve.kl_to_in_context[2, number]) == pytest.approx(float(divergence), abs=1e-3)
    frame = curve.to_frame()
    assert list(frame["setting"]) == ["in context", "zero-shot", "static patch, 2 queries", "static patch, 6 queries"]
    assert frame["accuracy"].tolist() == curve.correct.double().mean(1).tolist()
    assert frame["kl_to_in_context"][0] == 0
    change = static.dense(1, "out")
    assert float(curve.effective_rank["out"][1]) == pytest.approx(float(effective_rank(Factors(change.A, change.B))))
    assert "queries" in curve.sentence


def test_it_is_said_where_nothing_stands_before_the_demonstrations() -> None:
    """The first token, on which heads rest, is then a demonstration's in context."""
    model, with_bos = compiled()
    without = compile_prompts(model, queries()[:1], prepend_bos=False)
    assert without.patch.zero_shot_ids == without.patch.query_ids
    assert "Nothing stands before the demonstrations" in without.notes[0]
    assert not any("Nothing stands" in note for note in with_bos.notes)


def test_bad_input() -> None:
    model, fitted, asked = compiled()[0], queries()[:4], queries()[4:6]
    with pytest.raises(OptionError, match=r"n_fit must be from 2 to the 4 fitting queries, got \[1\]"):
        static_curve(model, fitted, asked, n_fit=[1])
    with pytest.raises(PromptError, match="is fitted on and held out"):
        static_curve(model, fitted, fitted[:2])


def test_the_command(tmp_path: Path) -> None:
    rows = [
        {
            "demos": [[d.input, d.label] for d in prompt.demos],
            "query": prompt.query,
            "label": prompt.label,
            "candidates": list(prompt.candidates or ()),
        }
        for prompt in queries()
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    out = tmp_path / "out"
    ran = CliRunner().invoke(
        app, ["compile", "--model", "tiny", "--prompt", str(file), "--finetuning", "--out", str(out)]
    )
    assert ran.exit_code == 0, ran.output
    assert "rank-one changes of gate and in and out" in ran.output.replace("\n", " ")
    assert {path.name for path in out.iterdir()} == {
        "compiled.csv", "compiled.json", "compiled.html", "patch.json", "patch.safetensors"
    }  # fmt: skip
    data = json.loads((out / "compiled.json").read_text(encoding="utf-8"))
    assert data["logits_off_patched"] < 1e-4 * data["largest_logit"]
    assert data["static"]["table"][0]["setting"] == "in context"
    assert data["prompt"][0] == "<bos>"
    first = tmp_path / "first.jsonl"
    first.write_text(json.dumps(rows[0]), encoding="utf-8")
    ran = CliRunner().invoke(
        app, ["compile", "--model", "tiny", "--prompt", str(first), "--no-prepend-bos", "--format", "json"]
    )
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["prompt"][0] == rows[0]["demos"][0][0]
    page = (out / "compiled.html").read_text(encoding="utf-8")
    assert page.count('ml-struck"') == 8
    assert "One patch for all queries" in page
    assert "Beside gradient descent" in page
    cosines = data["finetuning"]["cosines"]
    assert {row["update"] for row in cosines} == {"finetuned", "shuffled labels", "uphill", "unrelated text"}
    assert all(-1 <= row["cosine"] <= 1 for row in cosines)
    assert data["finetuning"]["accuracies"][2]["accuracy"] == data["static"]["table"][-1]["accuracy"]
    assert "mlp_in, mlp_gate, mlp_out" in data["finetuning"]["finetuned"]
    assert WeightPatch.load(out / "patch").matrices == ("gate", "in", "out")
    shown = CliRunner().invoke(app, ["compile", "--model", "tiny", "--prompt", str(file), "--format", "json"])
    plain = json.loads(shown.stdout)
    assert plain["matrices"] == ["gate", "in", "out"]
    assert plain["finetuning"] is None
