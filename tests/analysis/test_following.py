"""Flipped and neutral label words, and who follows them."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from hosts import shared

from metaopt_lens import Demo, ICLPrompt, load_tiny
from metaopt_lens._errors import OptionError, PromptError
from metaopt_lens.analysis import LabelFollowing, compare, findings, follow_labels
from metaopt_lens.analysis._relabel import flip_map, label_map, neutral_map, relabelled
from metaopt_lens.finetuning import finetune
from metaopt_lens.models import wrap
from metaopt_lens.prompts import tokenize_label

DEMOS = [("apple", "dax"), ("hammer", "wug"), ("plum", "dax"), ("saw", "wug"), ("pear", "dax"), ("drill", "wug")]
QUERIES = [("cherry", "dax"), ("wrench", "wug"), ("grape", "dax"), ("pliers", "wug")]


def prompts() -> list[ICLPrompt]:
    return [ICLPrompt(DEMOS, query, label=label) for query, label in QUERIES]


@cache
def found() -> LabelFollowing:
    return follow_labels(load_tiny(), prompts(), rates=(0.005, 0.05))


@pytest.mark.parametrize("n", [2, 3, 7])
def test_a_flip_leaves_no_word_in_its_place(n: int) -> None:
    words = [f"w{i}" for i in range(n)]
    for seed in range(20):
        flipped = flip_map(words, seed=seed)
        assert sorted(flipped.values()) == sorted(words)
        assert all(word != other for word, other in flipped.items())


def test_relabelling_changes_every_place_of_a_word() -> None:
    prompt = dataclasses.replace(prompts()[0], candidates=("dax", "wug"))
    other = relabelled(prompt, {"dax": "wug", "wug": "dax"})
    assert [d.label for d in other.demos] == ["wug", "dax"] * 3
    assert [d.input for d in other.demos] == [d.input for d in prompt.demos]
    assert (other.label, other.candidates, other.query) == ("wug", ("wug", "dax"), "cherry")
    assert relabelled(other, {"dax": "wug", "wug": "dax"}) == prompt


def test_neutral_words_are_single_tokens_that_stand_in_no_prompt() -> None:
    model = wrap(load_tiny())
    words = neutral_map(model, prompts(), ("dax", "wug"), seed=0)
    assert list(words) == ["dax", "wug"]
    ids = [tokenize_label(word, prompts()[0].template, model.tokenizer) for word in words.values()]
    assert all(len(i) == 1 for i in ids)
    assert len(set(ids)) == 2
    text = " ".join(f"{d.input} {d.label}" for d in prompts()[0].demos) + " ".join(q for q, _ in QUERIES)
    assert not set(words.values()) & set(text.split())
    assert neutral_map(model, prompts(), ("dax", "wug"), seed=0) == words


def test_the_bundled_model_follows_flipped_labels_in_context() -> None:
    """It has no prior on these words, and is always right: shown 100 %, natural 0 %."""
    table = found().to_frame().set_index(["labels", "learner", "lr", "against"])["accuracy"]
    assert table["flipped", "in context", 0.0, "shown"] == 1
    assert table["flipped", "in context", 0.0, "natural"] == 0
    assert table["natural", "in context", 0.0, "shown"] == table["natural", "in context", 0.0, "natural"] == 1
    assert set(table.index.get_level_values("learner")) == {"in context", "SGD", "full-batch", "layer-causal"}
    assert set(table.index.get_level_values("labels")) == {"natural", "flipped", "neutral"}


def test_finetuned_answers_are_those_of_an_update_made_by_hand() -> None:
    model = wrap(load_tiny())
    flipped = [relabelled(p, {"dax": "wug", "wug": "dax"}) for p in prompts()]
    update = finetune(model, flipped[0], lr=0.05, batch_size=None, progress=False)
    ids = [tokenize_label(word, flipped[0].template, model.tokenizer)[0] for word in ("dax", "wug")]
    hits = []
    for prompt in flipped:
        bare = dataclasses.replace(prompt, demos=())
        with update.applied(model):
            logits = model.host(model.host.to_tokens(bare.template.fill_query(prompt.query), prepend_bos=True))
        hits.append(("dax", "wug")[int(logits[0, -1, ids].argmax())] == prompt.label)
    (row,) = (r for r in found().rows if (r.labels, r.learner, r.lr) == ("flipped", "full-batch", 0.05))
    assert row.shown.tolist() == hits
    assert row.natural.tolist() == [not hit for hit in hits]


def test_the_figure_has_a_panel_for_each_kind_of_words() -> None:
    figure = found().plot()
    assert [a.text for a in figure.layout.annotations] == ["natural labels", "flipped labels", "neutral labels"]
    assert len(figure.data) == 3 * 4 * 2
    assert figure.data[2].x == (0.005, 0.05)


def test_a_rate_that_diverges_is_left_out_by_name() -> None:
    steep = follow_labels(load_tiny(), prompts(), labels=("flipped",), rates=(0.01, 3e38))
    assert "SGD finetuning on flipped labels diverges at learning rate 3e+38: left out" in steep.notes
    assert {row.lr for row in steep.rows if row.learner == "SGD"} == {0.01}


def test_what_cannot_be_relabelled_is_refused() -> None:
    model = wrap(load_tiny())
    opened = [ICLPrompt([("apple", "dax"), ("saw", "wug")], q, label="dax") for q in ("cherry", "pear")]
    with pytest.raises(PromptError, match=r"cannot be flipped in a task of open answers, .* or natural labels"):
        label_map(model, opened, "flipped", seed=0)
    same = [ICLPrompt([("apple", "dax"), ("plum", "dax")], q, label="dax") for q in ("cherry", "pear")]
    with pytest.raises(PromptError, match="labels cannot be flipped: all demonstrations have the same one"):
        label_map(model, same, "flipped", seed=0)
    with pytest.raises(PromptError, match=r"has no label to compare with: ICLPrompt\(\.\.\., label=\.\.\.\)"):
        follow_labels(model, [ICLPrompt(DEMOS, q) for q, _ in QUERIES])
    with pytest.raises(OptionError, match="rates must be positive numbers, at least one"):
        follow_labels(model, prompts(), rates=())


def test_the_verdict_asks_whether_it_follows_against_its_prior() -> None:
    """The bundled model does."""
    other = [("peach", "wug"), ("rake", "dax"), ("lemon", "wug"), ("axe", "dax"), ("fig", "wug"), ("file", "dax")]
    swapped = {"dax": "wug", "wug": "dax"}
    demos = [Demo(*pair) for pair in other]
    known = [*prompts(), *(ICLPrompt(demos, q, label=swapped[label]) for q, label in QUERIES)]
    found = compare(load_tiny(), known, progress=False)
    (finding,) = (f for f in findings(found) if f.key == "prior")
    assert finding.question == "Does it follow the demonstrations against its prior?"
    assert finding.estimate > 0.5
    (labels,) = (f for f in findings(found) if f.control == "shuffled labels")
    assert "its excess over randomly shuffled labels in the contrast part" in labels.sentence


def test_random_weights_do_not_follow() -> None:
    demos = [(f"w{i}", ("w32", "w36")[i % 2]) for i in range(40, 48)]
    asked = [ICLPrompt(demos, f"w{i}", label=("w32", "w36")[i % 2]) for i in range(50, 58)]
    row = follow_labels(shared("bridge:llama"), asked, labels=("flipped",), rates=(0.01,)).rows[0]
    assert torch.equal(row.shown, ~row.natural)
    assert 0 <= float(row.shown.double().mean()) < 1
