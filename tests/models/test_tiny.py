"""The bundled model does what its documentation says: figures measured again, loading, sampling, training."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from rounding import PASS, assert_agree

from metaopt_lens._errors import FileFormatError, OptionError, UnsupportedModelError
from metaopt_lens.models.tiny import (
    CATEGORIES,
    CATEGORY_OF,
    HELD_OUT_PAIRS,
    LABELS,
    accuracy,
    load_folder,
    load_tiny,
    sample_binding,
    sample_episode,
    sample_episodes,
)
from metaopt_lens.models.tiny._load import DATA
from metaopt_lens.models.tiny._sampling import sample_stream
from metaopt_lens.models.tiny._tiny_files import _FILES, METRICS_FILE, WEIGHTS_FILE
from metaopt_lens.models.tiny._vocabulary import BOS, ID_OF, WORDS, build_tokenizer
from metaopt_lens.models.tiny.train import TrainConfig, make_batch, n_nouns_at, save, train


def _has_hooked_transformer() -> bool:
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError:
        return False
    return True


needs_hooked = pytest.mark.skipif(not _has_hooked_transformer(), reason="TransformerLens 4.x has no HookedTransformer")


@pytest.fixture(scope="module")
def bridge():
    return load_tiny()


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA, tmp_path / "model"))


# --- accuracy: the seed differs from the one behind metrics.json


@pytest.mark.parametrize("n_categories", [2, 3, 4])
def test_learns_in_context_on_held_out_pairs(bridge, n_categories):
    episodes = sample_episodes(n=400, n_demos=16, n_categories=n_categories, seed=77)
    measured = accuracy(bridge, episodes)
    assert measured["candidates"] >= 0.90
    assert measured["labels"] >= 0.90
    assert measured["tokens"] >= 0.90


@pytest.mark.parametrize("n_categories", [2, 3, 4])
def test_knows_nothing_without_demonstrations(bridge, n_categories):
    episodes = sample_episodes(n=400, n_demos=0, n_categories=n_categories, seed=77)
    measured = accuracy(bridge, episodes)
    assert measured["candidates"] <= 1 / n_categories + 0.10
    assert measured["labels"] <= 1 / len(LABELS) + 0.10


def test_an_arrow_works_like_a_colon(bridge):
    episodes = sample_episodes(n=200, n_demos=16, n_categories=2, seed=78)
    assert accuracy(bridge, episodes, mark="->")["candidates"] >= 0.90


def test_answer_follows_the_binding_not_the_words(bridge):
    # The same prompt with its two labels exchanged must exchange the answer.
    episodes = sample_episodes(n=200, n_demos=16, n_categories=2, seed=79)
    swapped = []
    for episode in episodes:
        first, second = episode.candidates
        other = {first: second, second: first}
        swapped.append(
            dataclasses.replace(
                episode,
                demos=tuple((noun, other[label]) for noun, label in episode.demos),
                answer=other[episode.answer],
            )
        )
    assert accuracy(bridge, swapped)["candidates"] >= 0.90


def test_shuffled_labels_leave_chance(bridge):
    # A control of the measure itself: without the binding there is nothing to learn.
    rng, shuffled = random.Random(0), []
    for episode in sample_episodes(n=400, n_demos=16, n_categories=4, seed=80):
        labels = [label for _, label in episode.demos]
        rng.shuffle(labels)
        nouns = [noun for noun, _ in episode.demos]
        shuffled.append(dataclasses.replace(episode, demos=tuple(zip(nouns, labels, strict=True))))
    assert accuracy(bridge, shuffled)["candidates"] < 0.25 + 0.10


def test_zero_shot_labels_are_almost_equally_likely(bridge):
    with torch.inference_mode():
        p = bridge(bridge.to_tokens("pear :"))[0, -1].softmax(-1)[[ID_OF[label] for label in LABELS]]
    torch.testing.assert_close(p, torch.full_like(p, 1 / 32), atol=0.005, rtol=0)


def test_shipped_figures_are_those_of_the_shipped_weights():
    metrics = json.loads((DATA / METRICS_FILE).read_text(encoding="utf-8"))
    assert metrics["training_seconds"] <= 30 * 60
    for n_categories in (2, 3, 4):
        table = metrics["accuracy"]
        assert table[f"held-out, {n_categories} categories, 16 demos"]["candidates"] >= 0.90
        zero = table[f"held-out, {n_categories} categories, 0 demos"]["candidates"]
        assert zero <= 1 / n_categories + 0.10


# --- loading


@needs_hooked
def test_both_classes_give_equal_logits(bridge):
    hooked = load_tiny("hooked")
    tokenizer = build_tokenizer()
    episodes = sample_episodes(n=8, n_demos=16, n_categories=3, seed=5)
    ids = torch.tensor([[BOS, *tokenizer(e.text()).input_ids] for e in episodes])
    with torch.inference_mode():
        assert_agree(hooked(ids), bridge(ids), PASS)
    assert not hooked.training
    text = episodes[0].text()
    assert hooked.to_tokens(text).tolist() == bridge.to_tokens(text).tolist()


@needs_hooked
def test_hooked_weights_are_unprocessed(bridge):
    hooked = load_tiny("hooked")
    assert not torch.equal(hooked.blocks[0].ln1.w, torch.ones(64))  # folding would leave no norm weights
    torch.testing.assert_close(hooked.W_E, bridge.W_E, atol=0, rtol=0)


@pytest.mark.skipif(_has_hooked_transformer(), reason="this TransformerLens still has HookedTransformer")
def test_hooked_is_refused_where_it_does_not_exist():
    with pytest.raises(UnsupportedModelError, match=r"no HookedTransformer.*use load_tiny\('bridge'\)"):
        load_tiny("hooked")


def test_logits_equal_those_of_transformers(bridge):
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    plain = LlamaForCausalLM(LlamaConfig.from_json_file(DATA / "config.json")).eval()
    plain.load_state_dict(load_file(DATA / WEIGHTS_FILE))
    ids = bridge.to_tokens("apple : dax\nhammer : wug\npear :")
    with torch.inference_mode():
        assert_agree(bridge(ids), plain(input_ids=ids).logits, PASS)


def test_loading_keeps_the_global_random_state():
    before = torch.get_rng_state()
    load_tiny()
    assert torch.equal(before, torch.get_rng_state())


def test_dtype_and_mode(bridge):
    assert not bridge.training
    double = load_tiny(dtype=torch.float64)
    ids = bridge.to_tokens("apple : dax\npear :")
    with torch.inference_mode():
        assert double(ids).dtype == torch.float64
        assert_agree(double(ids).float(), bridge(ids), PASS)


def test_unknown_backend():
    with pytest.raises(OptionError, match="'bridge' or 'hooked', got 'jax'"):
        load_tiny("jax")


def test_the_files_are_small_and_name_no_machine():
    assert (DATA / WEIGHTS_FILE).stat().st_size <= 5_000_000
    assert sorted(file.name for file in DATA.iterdir()) == sorted(_FILES)
    for name in ("config.json", "tokenizer_config.json", METRICS_FILE):
        assert "/" not in (DATA / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", _FILES)
def test_a_missing_file(copied, name):
    (copied / name).unlink()
    with pytest.raises(FileFormatError, match=f"{name} does not exist.*Reinstall"):
        load_folder(copied)


def _cut(raw: bytes) -> bytes:
    return raw[: len(raw) // 2]


def _flip(raw: bytes) -> bytes:
    middle = len(raw) // 2
    return raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :]


@pytest.mark.parametrize("damage", [_cut, _flip, lambda _: b""])
def test_damaged_weights(copied, damage):
    file = copied / WEIGHTS_FILE
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(FileFormatError, match=f"{WEIGHTS_FILE} is damaged"):
        load_folder(copied)


@pytest.mark.parametrize("name", [METRICS_FILE, "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_damaged_text_files(copied, name):
    (copied / name).write_text("{", encoding="utf-8")
    with pytest.raises(FileFormatError, match="damaged"):
        load_folder(copied)


def test_a_configuration_of_another_shape(copied):
    config = json.loads((copied / "config.json").read_text(encoding="utf-8"))
    config["intermediate_size"] += 64
    (copied / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(FileFormatError, match=r"has shape .* the model needs"):
        load_folder(copied)
    config["num_hidden_layers"] = 2
    (copied / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(FileFormatError, match=r"unexpected \['model.layers.2"):
        load_folder(copied)


# --- words and tokens


def test_vocabulary():
    assert len(set(WORDS)) == len(WORDS)
    assert len(CATEGORIES) == 16
    assert all(len(nouns) == 12 for nouns in CATEGORIES.values())
    assert len(LABELS) == 32
    assert len(CATEGORY_OF) == 16 * 12


def test_shipped_tokenizer_is_the_built_one(bridge):
    text = sample_episode(random.Random(0)).text()
    built = build_tokenizer()(text).input_ids
    assert bridge.tokenizer(text, add_special_tokens=False).input_ids == built
    assert bridge.to_tokens(text).tolist() == [[BOS, *built]]


def test_pieces_tokenise_as_the_whole(bridge):
    episode = sample_episode(random.Random(3), n_demos=5, n_categories=3)
    pieces = []
    for noun, label in episode.demos:
        pieces += [f"{noun} :", f" {label}", "\n"]
    pieces.append(f"{episode.query} :")
    text = "".join(pieces)
    assert text == episode.text()
    whole = bridge.tokenizer(text, add_special_tokens=False).input_ids
    joined = [i for piece in pieces for i in bridge.tokenizer(piece, add_special_tokens=False).input_ids]
    assert joined == whole
    assert len(whole) == 4 * 5 + 2


def test_decoding_gives_the_text_back(bridge):
    text = sample_episode(random.Random(4), n_demos=3).text()
    assert bridge.tokenizer.decode(bridge.tokenizer(text, add_special_tokens=False).input_ids) == text
    assert bridge.to_string(bridge.to_tokens("\n\n", prepend_bos=False)[0]) == "\n\n"


def test_blanks_marks_and_unknown_words():
    tokenizer = build_tokenizer()
    words = tokenizer.convert_ids_to_tokens(tokenizer("  apple:\tdax\r\n\npear ->  Zebra ?").input_ids)
    assert words == ["apple", ":", "dax", "\n", "\n", "pear", "->", "<unk>", "?"]


# --- sampling


def test_episodes_depend_on_the_generator_alone():
    kwargs = {"n": 20, "n_demos": 16, "n_categories": 4}
    assert sample_episodes(**kwargs, seed=1) == sample_episodes(**kwargs, seed=1)
    assert sample_episodes(**kwargs, seed=1) != sample_episodes(**kwargs, seed=2)


@pytest.mark.parametrize("held_out", [True, False])
@pytest.mark.parametrize("n_categories", [2, 3, 4])
def test_episodes_are_well_formed(held_out, n_categories):
    for episode in sample_episodes(n=200, n_demos=16, n_categories=n_categories, held_out=held_out, seed=0):
        pairs = {(CATEGORY_OF[noun], label) for noun, label in episode.demos}
        assert len(episode.demos) == 16
        assert len(pairs) == len(set(episode.candidates)) == n_categories
        assert {label for _, label in pairs} == set(episode.candidates)
        assert episode.query not in {noun for noun, _ in episode.demos}
        assert (CATEGORY_OF[episode.query], episode.answer) in pairs
        assert all((pair in HELD_OUT_PAIRS) == held_out for pair in pairs)


def test_answers_and_their_places_are_balanced():
    episodes = sample_episodes(n=2000, n_demos=4, n_categories=4, seed=0)
    places = Counter(e.candidates.index(e.answer) for e in episodes)
    assert all(abs(places[i] / 2000 - 0.25) < 0.05 for i in range(4))


def test_a_fifth_of_the_pairs_is_held_out_of_every_category_and_label():
    assert 0.19 < len(HELD_OUT_PAIRS) / (16 * 32) < 0.21
    assert all(sum(c == name for c, _ in HELD_OUT_PAIRS) >= 6 for name in CATEGORIES)
    assert all(sum(w == label for _, w in HELD_OUT_PAIRS) >= 3 for label in LABELS)


def test_training_never_sees_a_held_out_pair():
    rng, config = random.Random(0), TrainConfig(batch=64)
    seen = set()
    for step in range(0, config.steps, 20):
        ids, _ = make_batch(rng, step, config)
        nouns, labels = ids[:, 1::4].flatten().tolist(), ids[:, 3::4].flatten().tolist()
        seen |= {(CATEGORY_OF[WORDS[noun]], WORDS[label]) for noun, label in zip(nouns, labels, strict=True)}
    assert not seen & HELD_OUT_PAIRS
    assert len(seen) == 16 * 32 - len(HELD_OUT_PAIRS)  # and does see all others


def test_options_that_make_no_sense():
    rng = random.Random(0)
    with pytest.raises(OptionError, match="n_demos must not be negative, got -1"):
        sample_episode(rng, n_demos=-1)
    with pytest.raises(OptionError, match="from 1 to 16, got 17"):
        sample_binding(rng, 17, held_out=True)


@pytest.mark.parametrize("n_categories", [1, 16])
def test_extreme_numbers_of_categories(n_categories):
    for held_out in (True, False):
        episode = sample_episode(random.Random(0), n_demos=40, n_categories=n_categories, held_out=held_out)
        assert len(set(episode.candidates)) == n_categories


# --- training


def test_batches_follow_the_layout_and_the_curriculum():
    config = TrainConfig(batch=8)
    ids, known = make_batch(random.Random(0), 0, config)
    assert n_nouns_at(0, config) == 1
    assert n_nouns_at(config.steps - 1, config) == 12
    n_items = known.shape[1]
    assert ids.shape == (8, 1 + 4 * n_items)
    assert (ids[:, 0] == BOS).all()
    assert (ids[:, 4::4] == ID_OF["\n"]).all()
    assert {WORDS[i] for i in ids[:, 3::4].unique().tolist()} <= set(LABELS)
    assert {WORDS[i] for i in ids[:, 1::4].unique().tolist()} <= {nouns[0] for nouns in CATEGORIES.values()}
    assert (known[:, 0] == 0).all()  # the first label of a sequence cannot be known
    assert ((known == 0).sum(1) <= 4).all()
    stream = sample_stream(random.Random(1), n_items=30, n_categories=2)
    assert len(stream) == 30


def test_a_short_training_run_learns_and_repeats_exactly(tmp_path):
    config = TrainConfig(seed=3, steps=25, batch=16, warmup=5, n_items=(6, 8))
    state = torch.get_rng_state()
    model, losses = train(config)
    again, losses_again = train(config)
    assert torch.equal(state, torch.get_rng_state())
    assert losses == losses_again
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert train(dataclasses.replace(config, seed=4, steps=2))[1] != losses[:2]
    save(model, tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted(set(_FILES) - {METRICS_FILE})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()
