"""The prompts of Dai et al., arXiv:2212.10559, table 8, with its line breaks.

CB's input is the premise, a line break, "Question: " and the hypothesis.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from metaopt_lens.prompts._template import Template

_SENTENCE = Template(input="Sentence: {input}\nLabel:", separator="\n")

TEMPLATES: Mapping[str, Template] = MappingProxyType(
    {
        "sst2": _SENTENCE,
        "sst5": _SENTENCE,
        "mr": Template(input="Review: {input}\nSentiment:"),
        "subj": Template(input="Input: {input}\nType:"),
        "agnews": Template(input="News: {input}\nType:"),
        "cb": Template(input="{input} True, False, or Neither?\nAnswer:"),
    }
)
"""Template of each data set."""

INSTRUCTIONS: Mapping[str, str] = MappingProxyType(
    {
        "agnews": "Classify the news articles into the categories of World, Sports, Business, and Technology.",
    }
)
"""Instruction of the data sets that have one."""

LABEL_WORDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "sst2": ("Negative", "Positive"),
        "sst5": ("terrible", "bad", "neutral", "good", "great"),
        "mr": ("Negative", "Positive"),
        "subj": ("objective", "subjective"),
        "agnews": ("World", "Sports", "Business", "Technology"),
        "cb": ("True", "False", "Neither"),
    }
)
"""Label words of each data set."""
