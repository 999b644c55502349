"""Records of our own runs: what is read back from them is what compare() says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import build, host_values, shared

from metaopt_lens import Demo, ICLPrompt, MetaoptLensError
from metaopt_lens.analysis import Comparison, Convention, Measures, compare
from metaopt_lens.finetuning import WeightUpdate, finetune
from metaopt_lens.records import analyze_records, read_demos, read_queries, write_run_records

F64 = torch.float64
DEMOS = [("w30 w31", "w32"), ("w34", "w36 w37"), ("w38 w39 w40", "w32"), ("w42", "w36 w37"), ("w46", "w32")]
WORDS = ("w32", "w36 w37")
QUERIES = ("w16 w17", "w18", "w19 w20", "w23 w24 w25")


def prompts(instruction: str | None = "w21 w22") -> list[ICLPrompt]:
    demos = [Demo(*pair) for pair in DEMOS]
    return [
        ICLPrompt(demos, query, instruction=instruction, label=WORDS[i % 2], candidates=WORDS)
        for i, query in enumerate(QUERIES)
    ]


def run(name: str, texts: list[ICLPrompt], **options: Any) -> tuple[WeightUpdate, Comparison]:
    model = shared(name, F64)
    bos = options.get("prepend_bos")
    update = finetune(model, texts[0], lr=1.0, keep_factors=True, prepend_bos=bos, progress=False)
    options = {
        "controls": "quick",
        "measures": Measures(convention=Convention.PUBLISHED, top_k=8),
        "progress": False,
    } | options
    return update, compare(model, texts, update, **options)


@pytest.mark.parametrize(
    ("name", "instruction", "bos"),
    [("bridge:gpt2", "w21 w22", None), ("bridge:llama", None, None), ("bridge:gpt2", "w21", False)],
)
def test_analyzing_our_records_gives_compares_numbers(
    name: str, instruction: str | None, bos: bool | None, tmp_path: Path
) -> None:
    texts = prompts(instruction)
    update, found = run(name, texts, prepend_bos=bos)
    write_run_records(tmp_path, shared(name, F64), texts, update, found, prepend_bos=bos)
    analysis = analyze_records(tmp_path, convention=Convention.PUBLISHED, top_k={"token": 8, "example": 2})
    names = {
        "SimAOU": "SimAOU",
        "SimAOU unnormalised": "SimAOU unnormalised",
        "SimAM": "SimAM ICL-FT",
        "ZSL SimAM": "SimAM ICL-ZS",
        "ICL-FTZS SimAM": "SimAM difference",
        "token-level kendall": "Kendall, token level",
        "example-level kendall": "Kendall, example level",
        "token-level recall_topk": "top-8 recall, token level",
        "example-level recall_topk": "top-2 recall, example level",
    }
    for theirs, ours in names.items():
        metric = analysis.metrics[theirs].per_query
        assert metric is not None
        values = found[ours].values[..., 0]
        # Words that stand in one place in several demonstrations are tied in layer 0, but for rounding.
        layers = slice(1, None) if theirs == "token-level kendall" else slice(None)
        torch.testing.assert_close(metric.values[:, layers].float(), values[:, layers], rtol=0, atol=2e-6)
    null = analysis.metrics["SimAOU null"].per_query
    assert null is not None
    torch.testing.assert_close(null.values.float(), found["SimAOU"].nulls["analytic"][..., 0], rtol=0, atol=2e-6)
    assert analysis.rec2ftp == found.rec2ftp()
    assert analysis.shapes.n_demonstrations == len(DEMOS)
    assert analysis.shapes.n_queries == len(QUERIES)


def test_records_hold_what_the_host_shows(tmp_path: Path) -> None:
    model, texts = shared("bridge:gpt2", F64), prompts()
    update, found = run("bridge:gpt2", texts)
    write_run_records(tmp_path, model, texts, update, found)
    scale = 8**-0.5 / torch.arange(1, 4)  # this gpt2 scales by the layer's number too
    ids = [1, 21, 22, 4, 18, 3]  # BOS, instruction, separator, the second query
    zs, icl, ft = (list(read_queries(tmp_path, setting))[1] for setting in ("zs", "icl", "ftzs"))
    hidden = torch.stack([h[-1] for h in host_values(model, ids, "attn.hook_out")])
    torch.testing.assert_close(zs.attn_out, hidden.to(zs.attn_out), rtol=0, atol=1e-6)
    scores = torch.stack([s[:, -1, 4:] for s in host_values(model, ids, "attn.hook_attn_scores")])
    torch.testing.assert_close(zs.attn_map, scores.to(zs.attn_map), rtol=0, atol=1e-6)
    with update.applied(model):
        q = torch.stack([t[-1].flatten() for t in host_values(model, ids, "attn.hook_q")]) * scale[:, None]
    assert ft.attn_q is not None
    torch.testing.assert_close(ft.attn_q, q.to(ft.attn_q), rtol=0, atol=1e-6)
    first = next(iter(read_demos(tmp_path))).attn_q
    q = torch.stack([t.flatten(1) for t in host_values(model, [1, 30, 31, 3, 32], "attn.hook_q")])
    torch.testing.assert_close(first, (q * scale[:, None, None]).to(first), rtol=0, atol=1e-6)
    assert icl.attn_map_ctx is not None
    assert icl.attn_map_ctx.shape == (3, 1 + sum(1 + len(f"{a} {b}".split()) + 1 for a, b in DEMOS))
    assert not icl.attn_map_ctx[:, [0, 5]].any()  # start token, first separator
    assert (icl.gold_label, icl.pred_label) == (1, int(found.icl[1]))  # type: ignore[index]
    assert icl.attn_q is None


def test_what_cannot_be_recorded(tmp_path: Path) -> None:
    model, texts = shared("bridge:gpt2", F64), prompts()
    update, found = run("bridge:gpt2", texts)

    def refused(
        message: str, texts: list[ICLPrompt], update: WeightUpdate, found: Comparison, host: Any = model
    ) -> None:
        with pytest.raises(MetaoptLensError, match=message):
            write_run_records(tmp_path, host, texts, update, found)

    refused("finetune with keep_factors=True", texts, 1.0 * update, found)
    refused(
        "the comparison is of 4 queries behind 1 demonstration sets, not of these 3 prompts", texts[1:], update, found
    )
    bare = [ICLPrompt(p.demos, p.query, candidates=WORDS) for p in texts]
    unlabelled = compare(model, bare, update, controls="quick", progress=False)
    refused("records need gold labels and predictions", bare, update, unlabelled)
    other = [texts[0].with_demos(DEMOS[:3]), *texts[1:]]
    refused("a recording holds one demonstration set", other, update, found)
    refused("4 heads of 16 are 64 wide", texts, update, found, host=build("bridge:qwen3", head_dim=16))
    assert not any(tmp_path.iterdir())
