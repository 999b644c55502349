"""The tasks that are known by name: a new one is one more row of `BUILT_IN`.

The first six are those of Dai et al., arXiv:2212.10559, with the prompts of its table 8 and its line breaks.
"""

from __future__ import annotations

from functools import partial

from metaopt_lens.prompts import Template
from metaopt_lens.tasks._synthetic import synthetic_rows
from metaopt_lens.tasks._task import HubSource, Task

_SENTENCE = Template(input="Sentence: {input}\nLabel:", label=" {label}", separator="\n")
_WORD_PAIR = Template(input="Q: {input}\nA:", label=" {label}", separator="\n\n")
_NOUN = Template(input="{input} :", label=" {label}", separator="\n")  # as the bundled model was trained

BUILT_IN = (
    Task(
        "sst2",
        _SENTENCE,
        labels=("Negative", "Positive"),
        label_names=("negative", "positive"),
        aliases={"text": "sentence"},
        hub=HubSource("stanfordnlp/sst2"),
    ),
    Task(
        "sst5",
        _SENTENCE,
        labels=("terrible", "bad", "neutral", "good", "great"),
        label_names=("very negative", "negative", "neutral", "positive", "very positive"),
        hub=HubSource("SetFit/sst5"),
    ),
    Task(
        "mr",
        Template(input="Review: {input}\nSentiment:", label=" {label}", separator="\n"),
        labels=("Negative", "Positive"),
        label_names=("neg", "pos"),
        hub=HubSource("cornell-movie-review-data/rotten_tomatoes"),
    ),
    Task(
        "subj",
        Template(input="Input: {input}\nType:", label=" {label}", separator="\n"),
        labels=("objective", "subjective"),
        label_names=("objective", "subjective"),
        hub=HubSource("SetFit/subj", validation="test"),
    ),
    Task(
        "agnews",
        Template(input="News: {input}\nType:", label=" {label}", separator="\n"),
        labels=("World", "Sports", "Business", "Technology"),
        label_names=("World", "Sports", "Business", "Sci/Tech"),
        instruction="Classify the news articles into the categories of World, Sports, Business, and Technology.",
        hub=HubSource("fancyzhx/ag_news", validation="test"),
    ),
    Task(
        "cb",
        Template(input="{input} True, False, or Neither?\nAnswer:", label=" {label}", separator="\n"),
        labels=("True", "False", "Neither"),
        label_names=("entailment", "contradiction", "neutral"),
        input="{premise}\nQuestion: {hypothesis}",
        hub=HubSource("aps/super_glue", "cb"),
    ),
    Task("word-pairs", _WORD_PAIR, input="{input}", label_column="output"),
    Task("antonym", _WORD_PAIR, input="{input}", label_column="output"),
    Task("synonym", _WORD_PAIR, input="{input}", label_column="output"),
    Task("country-capital", _WORD_PAIR, input="{input}", label_column="output"),
    Task("country-currency", _WORD_PAIR, input="{input}", label_column="output"),
    Task("english-french", _WORD_PAIR, input="{input}", label_column="output"),
    Task("present-past", _WORD_PAIR, input="{input}", label_column="output"),
    Task("singular-plural", _WORD_PAIR, input="{input}", label_column="output"),
    Task("synthetic", _NOUN, make_rows=synthetic_rows),
    Task("synthetic-2", _NOUN, make_rows=partial(synthetic_rows, n_categories=2)),
    Task("synthetic-3", _NOUN, make_rows=partial(synthetic_rows, n_categories=3)),
)
"""Every task that `find_task` knows from the start. A TOML file with the same fields is a task of your own."""
