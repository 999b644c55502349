"""Calls a newcomer is likely to make: accepted where the meaning is plain, otherwise refused by name."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hosts import prompt, shared

import metaopt_lens
from metaopt_lens import (
    HeadRef,
    ICLPrompt,
    KnockOut,
    MomentumAttention,
    compare,
    decompose,
    finetune,
    head_effects,
    intervene,
    meta_gradient,
)
from metaopt_lens._errors import HeadError, PromptError

TEXT = "w30 w31 : w32\nw34 : w36\nw16 w17 :"
SAME: dict[str, Any] = {"demos": [["w30 w31", "w32"], {"input": "w34", "label": "w36"}], "query": "w16 w17"}


def test_a_prompt_may_be_text_a_dict_or_an_object_everywhere() -> None:
    model = shared("bridge:gpt2")
    own = ICLPrompt([("w30 w31", "w32"), ("w34", "w36")], "w16 w17", label="w36")
    forms: list[Any] = [TEXT, SAME | {"label": "w36"}, own]
    for found in (decompose(model, forms), [decompose(model, form) for form in forms]):
        ids = {item.tokenized.ids for item in found}
        assert len(ids) == 1
    assert len(decompose(model, {"demos": SAME["demos"], "queries": ["w16", "w17"]})) == 2
    assert len({meta_gradient(model, form).tokens.ids for form in forms}) == 1
    assert len({finetune(model, form, lr=0.1, progress=False).trained_on for form in forms}) == 1
    one = head_effects(model, own, metric="loss")
    assert torch.equal(one.exact, head_effects(model, [SAME | {"label": "w36"}], metric="loss").exact)
    update = finetune(model, own, lr=0.1, progress=False)
    other = SAME | {"query": "w18"}
    found = compare(model, [SAME, other], update, controls="quick", progress=False)
    assert found.n_demos == (2,)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.tensor([[1, 16, 3]]), r"Tensor is no prompt: give an ICLPrompt, text .* a dict .*to_string\(tokens\)"),
        ([torch.tensor([1, 16])], r"prompt 0: Tensor is no prompt"),
        (7, "int is no prompt"),
        ({"demo": []}, r"the prompt: a prompt has no field 'demo': its fields are demos, query"),
        ([SAME, {"demos": 3, "query": "w16"}], r'prompt 1: "demos" must be a list'),
        ([], "no prompts: give at least one"),
    ],
)
def test_what_is_no_prompt_is_named(given: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        decompose(shared("bridge:gpt2"), given)


def test_a_cache_is_named() -> None:
    model = shared("bridge:gpt2")
    _, cache = model.run_with_cache(torch.tensor([[1, 16, 3]]))
    with pytest.raises(PromptError, match=r"ActivationCache is no prompt.* A cache is of one run"):
        decompose(model, cache)


def test_compare_of_one_prompt_says_what_is_missing() -> None:
    model = shared("bridge:gpt2")
    update = finetune(model, prompt(), lr=0.1, progress=False)
    with pytest.raises(PromptError, match=r"a single query.*at least two"):
        compare(model, prompt(), update, progress=False)


def test_heads_may_be_pairs() -> None:
    model = shared("bridge:gpt2")
    result = decompose(model, prompt())
    assert result.attention_view([(1, 2)]).html == result.attention_view(["L1H2"]).html
    mg = meta_gradient(model, prompt())
    assert torch.equal(mg.select([(1, 2)]).heads, mg.select([HeadRef(1, 2)]).heads)
    update = finetune(model, prompt(), lr=0.1, progress=False)
    assert update.select([(1, 2)]).norm() == update.select(["L1H2"]).norm()
    for wrong in ((1, 2, 3), (1,), 5):
        with pytest.raises(HeadError, match=r"cannot read .* as a head: write 'L3H7' or \(3, 7\)"):
            HeadRef.of(wrong)  # type: ignore[arg-type]
    with pytest.raises(HeadError, match="no head L9H0"):
        result.attention_view([(9, 0)])


def test_a_knock_out_without_its_prompt_says_so() -> None:
    """In an interpreter of its own: under the tests' type checker it does not get that far."""
    code = "from metaopt_lens import KnockOut; KnockOut(['L1H2'])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "OptionError: KnockOut needs what the run begins with before its heads" in run.stderr
    assert "KnockOut(prompt, ['L1H2'])" in run.stderr


def test_hooks_for_the_host_itself() -> None:
    model = shared("bridge:gpt2")
    mg = meta_gradient(model, prompt())
    with intervene(model, mg):
        pass
    update = finetune(model, prompt(), lr=0.1, progress=False)
    for given in (mg, mg.apply("linear"), KnockOut(mg), MomentumAttention(0.5), update):
        names = [name for name, _ in given.hooks(model)]
        assert names == [name for name, _ in given.hooks(metaopt_lens.wrap(model))]
        assert len(names) > 3


def test_results_compare_by_identity_and_can_be_hashed() -> None:
    """0.1 raised: the truth of a tensor is ambiguous."""
    model = shared("bridge:gpt2")
    makers: list[Any] = [
        lambda: decompose(model, prompt()),
        lambda: decompose(model, prompt()).softmax,
        lambda: decompose(model, [prompt()]),
        lambda: meta_gradient(model, prompt()),
        lambda: meta_gradient(model, prompt()).apply(),
        lambda: KnockOut(prompt(), ["L0H1"]),
        lambda: finetune(model, prompt(), lr=0.1, progress=False),
        lambda: head_effects(model, [prompt()], metric=lambda logits: logits[0]),
    ]
    for make in makers:
        one, two = make(), make()
        assert one == one
        assert one != two
        assert len({one, two}) == 2


def test_version_viz_and_dir() -> None:
    code = (
        "import metaopt_lens as ml; from importlib.metadata import version\n"
        "assert ml.__version__ == version('metaopt-lens')\n"
        "assert ml.viz.__name__ == 'metaopt_lens.viz'\n"
        "assert {*ml.__all__, '__version__', 'viz'} <= {*dir(ml)}\n"
        "rooms = {*dir(ml)} - {*ml.__all__, '__version__'}\n"
        "assert all(getattr(ml, room).__name__.endswith(f'.{room}') for room in rooms), dir(ml)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
