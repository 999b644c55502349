"""The page is one file that carries everything, and says what the result says."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hosts import hide_demos, host_values
from rich.console import Console
from shown import cards, prompt

from metaopt_lens import Decomposition, DecompositionSet, ICLPrompt, decompose, head_effects, load_tiny, wrap
from metaopt_lens._errors import HeadError, OptionError, PromptError
from metaopt_lens.prompts import ContextPrompt
from metaopt_lens.runs import Runs, predict_labels
from metaopt_lens.viz import labels_text, write_page
from metaopt_lens.viz._segments import visible_token
from metaopt_lens.viz._table import signed


def _markup(path: Path) -> str:
    """The page without scripts and style sheets."""
    text = path.read_text(encoding="utf-8")
    return re.sub(r"<(script|style)\b.*?</\1>", "", text, flags=re.DOTALL)


def _of_model(result: Decomposition, **changed: Any) -> Decomposition:
    """The same result, of a model that says something else about itself."""
    runs = {name: replace(run, model=replace(run.model, **changed)) for name, run in result.runs.items()}
    return replace(result, runs=Runs(runs))


def test_both_libraries_are_inlined_once(result: Decomposition, tmp_path: Path) -> None:
    path = write_page(result, tmp_path / "page.html")
    text = path.read_text(encoding="utf-8")
    assert text.count("var CircuitsVis=") == 1
    assert len(re.findall(r"plotly\.js v\d", text)) == 1
    assert path.stat().st_size < 8_000_000


def test_nothing_is_loaded_from_elsewhere(result: Decomposition, tmp_path: Path) -> None:
    path = write_page(result, tmp_path / "page.html")
    markup = _markup(path)
    assert not re.search(r"<(link|iframe|img|object|embed)\b", markup)
    assert not re.search(r"""\b(src|href)\s*=""", markup)
    assert not re.search(r"<script[^>]+src", path.read_text(encoding="utf-8")[:2000])
    assert "default-src 'none'" in markup
    assert "sourceMappingURL" not in path.read_text(encoding="utf-8")


def test_the_page_says_what_was_decomposed(result: Decomposition, tmp_path: Path) -> None:
    markup = _markup(write_page(result, tmp_path / "page.html"))
    assert "z = zero_shot + meta_gradient" in markup
    assert "metaopt-lens-tiny" in markup
    assert "3 layers × 4 heads" in markup
    assert "as trained" in markup
    assert "Processed weights" not in markup
    for demo in result.prompt.demos:
        assert f"<pre>{demo.input}: <mark>{demo.label}</mark></pre>" in markup
    assert "<span>query</span><pre>plum:</pre>" in markup
    for name, value in result.provenance.items():
        assert name in markup
        assert str(value) in markup


def test_every_head_is_in_the_table_with_its_numbers(result: Decomposition, tmp_path: Path) -> None:
    markup = _markup(write_page(result, tmp_path / "page.html"))
    frame = result.to_frame().set_index("name")
    rows = dict(re.findall(r'<tr><td data-order="\d+">(L\dH\d)</td>(.*?)</tr>', markup))
    assert list(rows) == list(frame.index)
    for name, cells in rows.items():
        values = [float(v) for v in re.findall(r'data-order="([^"]+)"', cells)]
        assert values[0] == pytest.approx(frame.loc[name, "mass"])
        assert values[1] == pytest.approx(frame.loc[name, "meta_gradient_residual_norm"])
        assert values[3] == pytest.approx(frame.loc[name, "fidelity"])


def test_maps_of_mass_norms_fidelity_and_effects(tiny: Any, result: Decomposition, tmp_path: Path) -> None:
    always = ["mass", "meta_gradient_residual_norm", "fidelity", "zero_shot_norm", "meta_gradient_norm"]
    both = [*always, "total_effect_norm", "direct_effect_norm", "indirect_effect_norm", "position_effect_norm"]
    plain = [*always, "total_effect_norm", "direct_effect_norm", "indirect_and_position_norm"]
    for runs, expected in (("both", both), ("plain", plain), ("none", always)):
        found = result if runs == "both" else decompose(tiny, prompt(), zero_shot_runs=runs)
        markup = _markup(write_page(found, tmp_path / f"{runs}.html"))
        assert re.findall(r'id="ml-map-(\w+)"', markup) == expected


def test_the_views_show_the_heads_asked_for(result: Decomposition, tmp_path: Path) -> None:
    markup = _markup(write_page(result, tmp_path / "page.html", heads=["L0H1", "L2H3"], title="Two <heads>"))
    assert [card.head for card in cards(markup)] == ["L0H1", "L2H3"] * 2
    assert "<h1>Two &lt;heads&gt;</h1>" in markup
    with pytest.raises(HeadError, match="no head L9H9"):
        write_page(result, tmp_path / "none.html", heads=["L9H9"])
    assert not (tmp_path / "none.html").exists()


def test_processed_weights_are_noted(result: Decomposition, tmp_path: Path) -> None:
    folded = _of_model(result, processing=("folded norms",))
    markup = _markup(write_page(folded, tmp_path / "page.html"))
    assert "<b>Processed weights:</b> folded norms" in markup


def test_prompt_text_is_escaped(result: Decomposition, tmp_path: Path) -> None:
    nasty = ICLPrompt([("<script>alert(1)</script>", "a & b")] * 4, "</pre><b>")
    stranger = replace(result, prompt=nasty, source=None, stored_strength=result.strength)
    path = write_page(stranger, tmp_path / "page.html")
    markup = _markup(path)
    assert "<script>alert" not in path.read_text(encoding="utf-8")
    assert "</pre><b>" not in markup
    assert "<span>query</span><pre>&lt;/pre&gt;&lt;b&gt;:</pre>" in markup
    assert "&lt;script&gt;alert(1)&lt;/script&gt;: <mark>a &amp; b</mark>" in markup


def test_a_machine_path_is_not_shown(result: Decomposition, tmp_path: Path) -> None:
    local = _of_model(result, name=str(tmp_path / "my-model"))
    markup = _markup(write_page(local, tmp_path / "page.html"))
    assert "my-model" in markup
    assert str(tmp_path) not in markup


def test_answers_of_the_model_are_shown(tiny: Any, result: Decomposition, tmp_path: Path) -> None:
    answer = predict_labels(tiny, result.prompt, result.tokenized)
    markup = _markup(write_page(result, tmp_path / "page.html", predictions=[answer]))
    own = answer.in_context_vocabulary
    assert "<td>dax ✓</td>" in markup
    assert "<td>wug</td>" in markup
    assert f"{float(own.probabilities[0]):.1%}<small>{float(answer.in_context_shares[0]):.1%}</small>" in markup
    assert f"<code>{own.top[0].text.strip()}</code> {own.top[0].probability:.1%}" in markup
    assert "✓ marks the right label" in markup
    with pytest.raises(OptionError, match="one for each of the 1 prompts, got 2"):
        write_page(result, tmp_path / "page.html", predictions=[answer, answer])


def test_an_open_answer_is_on_the_page(tiny: Any, tmp_path: Path) -> None:
    """The right label is that of no demonstration: it is listed, with its probability and rank, and the warning."""
    item = decompose(tiny, ICLPrompt(prompt().demos, "plum", label="kiki"))
    answer = item.predict()
    own = answer.in_context_vocabulary
    markup = _markup(write_page(item, tmp_path / "page.html", predictions=[answer]))
    assert "<td>kiki ✓</td>" in markup
    assert f"{float(own.probabilities[2]):.1%}<small>" in markup
    ranks = f"{answer.zero_shot_vocabulary.rank} zero-shot and {own.rank} in context"
    assert f"first token (kiki) in the whole vocabulary: {ranks}" in markup
    assert answer.mass_note is not None
    assert answer.mass_note in markup


def test_no_tick_is_explained_where_there_is_none(tiny: Any, tmp_path: Path) -> None:
    """A right label outside the candidates asked for, an unknown one, and no candidates at all."""
    item = decompose(tiny, prompt())
    outside = item.predict(labels=["kiki", "bouba"])
    unknown = decompose(tiny, ICLPrompt(prompt().demos, "plum")).predict()
    none = item.predict(labels=[])
    for number, answer in enumerate((outside, unknown, none)):
        markup = _markup(write_page(item, tmp_path / f"{number}.html", predictions=[answer]))
        assert "✓" not in markup
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(labels_text(answer))
        printed = console.export_text()
        assert "✓" not in printed
        assert "Most probable next tokens" in printed


def test_both_settings_are_named_on_a_narrow_terminal(tiny: Any) -> None:
    """However long the tokens are: one column for each setting."""
    console = Console(width=50, record=True, file=io.StringIO())
    answer = decompose(tiny, prompt()).predict(labels=[])
    longest = dataclasses.replace(answer.zero_shot_vocabulary.top[0], text=30 * "x")
    vocabulary = dataclasses.replace(answer.zero_shot_vocabulary, top=(longest, *answer.zero_shot_vocabulary.top[1:]))
    console.print(labels_text(dataclasses.replace(answer, zero_shot_vocabulary=vocabulary)))
    printed = console.export_text()
    assert "zero-shot" in printed
    assert "in context" in printed
    for token in answer.in_context_vocabulary.top:
        assert f"{token.probability:.1%}" in printed


def test_a_set_shows_its_first_prompts_and_says_how_many_it_leaves_out(
    several: DecompositionSet, tmp_path: Path
) -> None:
    markup = _markup(write_page(several, tmp_path / "page.html", heads=["L1H1"], max_prompts=2))
    assert "Prompt 1 of 3" in markup
    assert "Prompt 2 of 3" in markup
    assert "1 more prompts are not shown" in markup
    assert len(cards(markup)) == 2 * 2
    assert "Means over 3 prompts or positions" in markup
    with pytest.raises(OptionError, match="max_prompts must be at least 1"):
        write_page(several, tmp_path / "page.html", max_prompts=0)
    with pytest.raises(OptionError, match="empty"):
        write_page(DecompositionSet(()), tmp_path / "page.html")


# ---- what was found --------------------------------------------------------------------------------------------------


def _found(markup: str) -> dict[str, Any]:
    """What the page's script reads."""
    (stored,) = re.findall(r'class="ml-found" data-found="([^"]*)"', markup)
    found: dict[str, Any] = json.loads(unescape(stored))
    return found


def _default(markup: str) -> dict[str, Any]:
    """What is read at the prompt's end."""
    stored = _found(markup)
    view: dict[str, Any] = stored["views"][stored["default"]]
    return view


def _numbers(packed: dict[str, Any], n_heads: int) -> torch.Tensor:
    """Half-precision numbers of a view, ``[head, src]``, heads counted through the model."""
    halves = np.frombuffer(base64.b64decode(packed["data"]), dtype="<f2").astype(np.float64)
    return torch.from_numpy(halves * packed["unit"]).reshape(n_heads, -1)  # (head src) -> head src


def test_the_page_leads_with_what_was_found(result: Decomposition, tmp_path: Path) -> None:
    """The model's own first choices, the answer's logit and its parts, before maps and norms."""
    answer = result.predict()
    markup = _markup(write_page(result, tmp_path / "page.html", predictions=[answer]))
    assert markup.index("What was found") < markup.index("<h2>Prompt</h2>") < markup.index("All heads")
    own = answer.in_context_vocabulary.top[0]
    assert f"first choice is <code>{own.text}</code> ({own.probability:.1%})" in markup
    said = result.logits()
    assert f"is <b>{signed(float(said.logit))}</b>" in markup
    sums = re.findall(r"</i></span><span>([^<]*)</span>", markup)
    numbers = [said.zero_shot.sum(), said.meta_gradient.sum(), said.mlp.sum(), said.embedding]
    assert sums[:4] == [signed(float(value)) for value in numbers]


def test_maps_tokens_and_cards_hold_the_contributions(tiny: Any, result: Decomposition, tmp_path: Path) -> None:
    markup = _markup(write_page(result, tmp_path / "page.html"))
    said, stored = result.logits(), _found(markup)
    effects = head_effects(tiny, result.prompt, progress=False)
    view, names = stored["views"][stored["default"]], stored["heads"]
    tokens, attention = (_numbers(view[name], len(names)) for name in ("tokens", "attention"))
    for index, name in enumerate(names):
        layer, number = int(name[1]), int(name[3])
        assert view["zs"][index] == pytest.approx(float(said.zero_shot[layer, number]), rel=1e-3, abs=1e-6)
        assert view["mg"][index] == pytest.approx(float(said.meta_gradient[layer, number]), rel=1e-3, abs=1e-6)
        assert tokens[index].tolist() == pytest.approx(said.per_token[layer, number].tolist(), rel=1e-3, abs=1e-6)
        assert attention[index].tolist() == pytest.approx(result.pattern[layer, number].tolist(), rel=1e-3, abs=1e-6)
        assert view["exact"][name] == pytest.approx(float(effects.exact[0, layer, number]), rel=1e-3, abs=1e-3)
        assert view["first"][index] == pytest.approx(float(effects.first_order[0, layer, number]), rel=1e-3, abs=1e-3)
        words = result.lens(name, "meta_gradient", top=6)
        assert view["words"][name]["meta_gradient"][0] == [visible_token(word.token) for word in words.promoted]
        cell = f'<td data-head="{name}" style="background:[^"]*" title="{name} '
        assert len(re.findall(cell, markup)) == 2
    without = effects.in_context[0] - effects.demo_exact[0]
    assert [view["without"][str(demo)] for demo in range(4)] == pytest.approx(without.tolist(), rel=1e-3)
    # Both maps have one scale: the strongest cell of either is the only one in full colour.
    assert len(re.findall(r'<td data-head="[^"]*" style="background:rgba\([^)]*, 1\.000\)"', markup)) == 1


def test_demonstrations_switched_off_together_are_runs_with_them_masked(
    tiny: Any, result: Decomposition, tmp_path: Path
) -> None:
    """Every selection of four, against the host's own run with its scores from query to demonstrations masked."""
    view = _default(_markup(write_page(result, tmp_path / "page.html")))
    assert len(view["without"]) == 15
    tokens, host = result.tokenized, tiny.host
    right, (wrong,) = result.logits().token_ids[0]
    for off in ((1,), (0, 2), (1, 2, 3), (0, 1, 2, 3)):
        with torch.no_grad():
            logits = host.run_with_hooks(
                torch.tensor([tokens.ids]), fwd_hooks=hide_demos(tokens, off, range(tiny.info.n_layers))
            )[0, -1]
        expected = float(logits[right] - logits[wrong])
        assert view["without"][",".join(map(str, off))] == pytest.approx(expected, rel=1e-3, abs=2e-3)


def test_what_heads_write_without_some_demonstrations_is_a_masked_softmax(
    tiny: Any, result: Decomposition, tmp_path: Path
) -> None:
    """The closed form of the page's script, from the stored numbers, against the host's z with one layer masked.

    That z goes through W_O, the final norm's gain and the unembedding by hand. In the masked layer queries, keys and
    values are those of the in-context run, so that this is exact.
    """
    stored = _found(_markup(write_page(result, tmp_path / "page.html")))
    view, n_heads = stored["views"][stored["default"]], stored["n_heads"]
    tokens, host, said = result.tokenized, tiny.host, result.logits()
    right, (wrong,) = said.token_ids[0]
    w_u = host.unembed.W_U.detach()
    direction = (w_u[:, right] - w_u[:, wrong]) * host.ln_final.w.detach() / said.scale
    numbers = _numbers(view["tokens"], len(stored["heads"]))
    for off in ((2,), (0, 3), (0, 1, 2, 3)):
        for layer in range(tiny.info.n_layers):
            z = host_values(host, tokens.ids, "attn.hook_z", edits=hide_demos(tokens, off, [layer]))[layer][-1]
            w_o = host.blocks[layer].attn.W_O.detach()
            for head in range(n_heads):
                expected = float(z[head] @ w_o[head] @ direction)
                at = layer * n_heads + head
                masses, rest = view["masses"][at], view["rest"][at]
                seen = rest + sum(mass for demo, mass in enumerate(masses) if demo not in off)
                left = numbers[at].clone()
                for demo in off:
                    left[slice(*stored["demos"][demo])] = 0
                assert float(left.sum()) * (rest + sum(masses)) / seen == pytest.approx(expected, rel=2e-3, abs=2e-3)


def test_every_token_of_the_query_and_of_the_answer_has_its_view(tiny: Any, tmp_path: Path) -> None:
    """Logits at each of them are those of one plain run of the host over prompt and answer."""
    item = decompose(tiny, ICLPrompt(prompt().demos, "plum", label="dax"))
    right, wrong = (tiny.tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in ("dax", "wug"))
    ids = (right, wrong)  # an answer of two tokens
    markup = _markup(write_page(item, tmp_path / "page.html", answer=ids, versus=()))
    stored, n = _found(markup), item.tokenized.n_tokens
    with torch.no_grad():
        logits = tiny.host(torch.tensor([[*item.tokenized.ids, right]]))[0]
    query = range(item.tokenized.query.start, n)
    assert [view["at"] for view in stored["views"]] == [*query, n]
    assert stored["views"][stored["default"]]["at"] == n - 1
    assert len(re.findall(r'<option value="\d+"', markup)) == len(query) + 1
    for view in stored["views"]:
        token = right if view["at"] < n else wrong
        assert view["logit"] == pytest.approx(float(logits[view["at"], token]), rel=1e-3, abs=1e-3)
        assert view["run"] == pytest.approx(view["logit"], rel=1e-3, abs=1e-3)
        assert sum(view["sums"]) == pytest.approx(view["logit"], rel=2e-3, abs=2e-3)
        own = logits[view["at"]].softmax(-1)
        assert view["top"][1] == pytest.approx(float(own.max()), rel=1e-3)
        assert len(view["strong"]) == 12
    assert stored["views"][-1]["answer"] == "wug"


def test_with_many_demonstrations_each_and_all_are_switched_off_in_runs(tiny: Any, tmp_path: Path) -> None:
    demos = [pair for pair in prompt().demos for _ in range(2)]
    view = _default(_markup(write_page(decompose(tiny, ICLPrompt(demos, "plum", label="dax")), tmp_path / "page.html")))
    assert list(view["without"]) == [*map(str, range(8)), "0,1,2,3,4,5,6,7"]


def test_chunks_of_a_context_are_called_chunks(tiny: Any, tmp_path: Path) -> None:
    context = ContextPrompt(["apple dax hammer wug", "pear dax saw wug"], "plum :", label="dax")
    markup = _markup(write_page(decompose(tiny, context), tmp_path / "page.html"))
    assert re.findall(r'data-demo="\d" aria-pressed="true">([^<]*)<', markup) == ["chunk 1", "chunk 2"]
    assert "heads reading the chunks" in markup
    assert set(_default(markup)["without"]) == {"0", "1", "0,1"}


def test_many_rivals_are_counted(tiny: Any, tmp_path: Path) -> None:
    words = ["wug", "kiki", "bouba", "toma", "plonk", "gorp", "zorp", "vek", "trell", "nale"]
    markup = _markup(write_page(decompose(tiny, prompt()), tmp_path / "page.html", versus=words))
    assert (
        len(re.findall(r"minus the mean of (?:<code>\w+</code>, ){7}<code>\w+</code>,? and 2 more is <b>", markup)) == 1
    )


def test_a_model_that_has_changed_since_gets_no_knock_outs(tmp_path: Path) -> None:
    model = wrap(load_tiny())
    item = decompose(model, prompt())
    with torch.no_grad():
        model.host.blocks[0].attn.W_Q.mul_(1.5)
    markup = _markup(write_page(item, tmp_path / "page.html"))
    assert "No knock-outs: the model computes something else now" in markup
    assert "data-demo=" not in markup


def test_heads_are_in_the_order_of_what_was_measured(result: Decomposition, tmp_path: Path) -> None:
    markup = _markup(write_page(result, tmp_path / "page.html"))
    said, view = result.logits(), _default(markup)
    names = re.findall(r'<tr data-head="(L\dH\d)"', markup)
    sizes = [max(abs(float(said.head_total[int(name[1]), int(name[3])])), abs(view["exact"][name])) for name in names]
    assert len(names) == 12
    assert sizes == sorted(sizes, reverse=True)


def test_another_answer_and_rival_can_be_asked_for(result: Decomposition, tmp_path: Path) -> None:
    markup = _markup(write_page(result, tmp_path / "page.html", answer="kiki", versus=["wug", "dax"]))
    assert "The logit of <code>kiki</code> minus the mean of" in markup
    assert f"<b>{signed(float(result.logits('kiki', versus=['wug', 'dax']).logit))}</b>" in markup
    with pytest.raises(PromptError, match="begin with the same token"):
        write_page(result, tmp_path / "none.html", answer="wug", versus=["wug"])


def test_without_a_label_the_models_own_first_choice_is_taken_apart(tiny: Any, tmp_path: Path) -> None:
    item = decompose(tiny, ICLPrompt(prompt().demos, "plum"))
    own = item.predict().in_context_vocabulary.top[0].text
    markup = _markup(write_page(item, tmp_path / "page.html"))
    assert f"The logit of <code>{own}</code> is <b>" in markup


def test_a_result_without_its_model_has_maps_and_no_contributions(result: Decomposition, tmp_path: Path) -> None:
    result.save(tmp_path / "split")
    markup = _markup(write_page(Decomposition.load(tmp_path / "split"), tmp_path / "page.html"))
    assert "What was found" not in markup
    assert "All heads" in markup


def test_a_notebook_shows_what_was_found(result: Decomposition) -> None:
    """The compact view needs no knock-outs, loads nothing and brings its script; elsewhere the text stays."""
    markup = result._repr_html_()
    assert "What was found" in markup
    shown = re.sub(r"<(script|style)\b.*?</\1>", "", markup, flags=re.DOTALL)
    assert "Knock-out" not in shown
    assert "data-demo=" not in shown  # nothing to click that does nothing
    assert not re.search(r"""\b(src|href)\s*=""", shown)
    assert f"<b>{signed(float(result.logits().logit))}</b>" in shown
    assert repr(result).startswith("Decomposition of")
