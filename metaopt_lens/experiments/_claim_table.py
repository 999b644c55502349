"""CLAIMS, the table of published claims that a run can test. Adding a claim is adding a row.

A row says what is claimed, by whom, what it is read from, and which option of ``metaopt-lens run`` makes that. A claim
holds where the 95 % interval over demonstration sets lies above 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from metaopt_lens.analysis import NULLS

DAI, DEUTCH = "arXiv:2212.10559", "arXiv:2311.07772"
STANDARD, FURTHER = "--controls standard", "--further"


@dataclass(frozen=True)
class Of:
    """A quantity of the table ``set_means``.

    Attributes:
        quantity: name of a statistic, an accuracy, ...
        null: empty for the quantity itself, else the null that stands in its place.
        rule: of finetuning; None for the rule that is asked about.
    """

    quantity: str
    null: str = ""
    rule: str | None = None


@dataclass(frozen=True)
class Difference:
    """``value - share null``, paired by demonstration sets.

    Attributes:
        value: what is claimed to be high.
        null: what it is compared with; None for 0.
        share: of the null.
        positive: must be shown to be above 0 for the comparison to mean anything.
    """

    value: Of
    null: Of | None
    share: float = 1.0
    positive: Of | None = None


@dataclass(frozen=True)
class Answer:
    """A question of the table ``findings``.

    Attributes:
        key: of the question.
    """

    key: str


@dataclass(frozen=True)
class Cell:
    """The last row of a table that starts as given, in a column with its interval.

    Attributes:
        table: its name.
        where: columns and how their entries start.
        column: with ``_low`` and ``_high``, or ``low`` and ``high``, next to it.
    """

    table: str
    where: tuple[tuple[str, str], ...]
    column: str


@dataclass(frozen=True)
class Claim:
    """A published claim.

    Attributes:
        key: name of the row.
        text: the claim in one sentence.
        source: where it is made.
        reads: what decides it.
        what: the number whose interval must lie above 0.
        needs: options of ``metaopt-lens run`` that make it.
        similarity: whether it is read only where in-context learning and finetuning are shown to work.
        bounds: least and greatest value that the number can have; an interval ends there.
    """

    key: str
    text: str
    source: str
    reads: Difference | Answer | Cell
    what: str
    needs: str = "--controls quick"
    similarity: bool = False
    bounds: tuple[float, float] = (-math.inf, math.inf)


_LABELS = "a task with label words (--task)"


def _control(key: str, text: str, null: str, needs: str, what: str = "") -> Claim:
    """The head-by-head similarity above one of its nulls."""
    return Claim(key, text, NULLS[null].source or DAI, Answer(f"control:{null}"), what or NULLS[null].what, needs)


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "learns",
        "Demonstrations raise the accuracy above zero-shot.",
        f"{DAI}, accuracies",
        Answer("in_context_learning"),
        "accuracy in context less zero-shot",
        _LABELS,
    ),
    Claim(
        "finetunes",
        "Finetuning on the same demonstrations raises it too.",
        f"{DAI}, accuracies",
        Answer("finetuning"),
        "accuracy finetuned less zero-shot",
        _LABELS,
    ),
    Claim(
        "rec2ftp",
        "In-context learning corrects what finetuning corrects more often than zero-shot mistakes at large.",
        f"{DAI}, Rec2FTP",
        Difference(Of("Rec2FTP %"), Of("Rec2FTP %", "base rate")),
        "Rec2FTP less its base rate, in percent",
        _LABELS,
        bounds=(-100.0, 100.0),
    ),
    Claim(
        "sim_aou",
        "In-context and finetuning updates of attention outputs are more alike than random directions (SimAOU).",
        f"{DAI}, SimAOU",
        Difference(Of("SimAOU unnormalised"), Of("SimAOU unnormalised", "random")),
        "SimAOU without normalisation less that of random directions",
        similarity=True,
    ),
    Claim(
        "sim_aou_analytic",
        "SimAOU, as published, is above what its normalisation alone gives.",
        f"{DEUTCH}, SimAOU",
        Difference(Of("SimAOU"), Of("SimAOU", "analytic")),
        "SimAOU less its analytic null",
        similarity=True,
    ),
    Claim(
        "sim_am",
        "Finetuning brings the attention maps closer to those in context than zero-shot ones are (SimAM).",
        f"{DAI}, SimAM",
        Difference(Of("SimAM ICL-FT"), Of("SimAM ICL-ZS")),
        "SimAM with finetuning less SimAM with zero-shot",
        similarity=True,
    ),
    Claim(
        "kendall",
        "Attention to the demonstrations is ordered as in finetuning (Kendall's tau above a random order).",
        f"{DAI}, Kendall",
        Difference(Of("Kendall, token level"), Of("Kendall, token level", "chance")),
        "tau less 0",
        similarity=True,
    ),
    Claim(
        "direction",
        "Head by head, in-context and finetuning updates point the same way.",
        f"{DAI}, head by head",
        Answer("direction"),
        "mean cosine of the two updates of z",
    ),
    _control("query", "That likeness is specific to the query.", "other query", "--controls quick"),
    _control("unrelated", "It is more than finetuning on unrelated text shows.", "unrelated text", "--unrelated"),
    _control("uphill", "It is about descending: finetuning uphill shows less.", "uphill", STANDARD),
    _control(
        "contrast",
        "It depends on the labels shown, in the part of output space that tells labels apart.",
        "shuffled labels",
        "--n-label-draws 4",
        "its excess over shuffled labels, in the contrast part",
    ),
    _control("assignment", "It depends on which label word stands for what.", "flipped labels", STANDARD),
    _control(
        "trained",
        "It is more than a model with permuted weights shows.",
        "random weights",
        "--random-weights",
        "its excess over a model with permuted weights",
    ),
    Claim(
        "untrained",
        "A model with permuted weights reaches at least half of SimAOU.",
        f"{DEUTCH}, untrained models",
        Difference(Of("SimAOU", "random weights"), Of("SimAOU"), 0.5, positive=Of("SimAOU")),
        "SimAOU of permuted weights less half of the model's own",
        "--random-weights",
        similarity=True,
    ),
    Claim(
        "layer_causal",
        "Layer-causal finetuning is more like in-context learning than ordinary finetuning.",
        f"{DEUTCH}, layer-causal",
        Difference(Of("SimAOU", rule="lcgd"), Of("SimAOU", rule="gd")),
        "SimAOU layer-causal less ordinary",
        "--rules gd,lcgd",
        similarity=True,
    ),
    Claim(
        "normalisation",
        "Without normalising, SimAOU is lower.",
        f"{DEUTCH}, SimAOU",
        Difference(Of("SimAOU"), Of("SimAOU unnormalised")),
        "SimAOU less SimAOU unnormalised",
        similarity=True,
    ),
    Claim(
        "labels_matter",
        "Right labels in the demonstrations beat shuffled ones.",
        NULLS["shuffled labels"].source,
        Difference(Of("accuracy ICL"), Of("accuracy ICL, shuffled labels")),
        "accuracy in context less that behind shuffled labels",
        "--n-label-draws 4",
    ),
    Claim(
        "prior",
        "Behind flipped labels the model answers as the demonstrations show, against its prior.",
        NULLS["flipped labels"].source,
        Answer("prior"),
        "accuracy against the flipped less that against the natural labels",
        STANDARD,
    ),
    Claim(
        "prior_finetuned",
        "Finetuned on flipped labels it does so too.",
        NULLS["flipped labels"].source,
        Difference(
            Of("accuracy FT, flipped labels, against the flipped"),
            Of("accuracy FT, flipped labels, against the natural"),
        ),
        "the same, finetuned",
        STANDARD,
    ),
    Claim(
        "ceiling",
        "Finetuning explains the in-context updates better than one constant vector.",
        "arXiv:2509.22621",
        Answer("ceiling"),
        "held-out R^2 of finetuning's update, scaled, less that of a constant",
        FURTHER,
    ),
    Claim(
        "ladder",
        "So does one step of gradient descent on the demonstrations.",
        "arXiv:2306.00297",
        Answer("ladder"),
        "held-out R^2 of gamma dW_ICL q less that of a constant",
        FURTHER,
    ),
    Claim(
        "order",
        "The order of the demonstrations matters more in context than in one pass of SGD.",
        "arXiv:2310.08540",
        Answer("order"),
        "spread of in-context updates over orders less that of SGD's",
        FURTHER,
    ),
    Claim(
        "algebra",
        "The demonstrations' own updates add up to theirs together.",
        "arXiv:2605.16591",
        Answer("algebra"),
        "held-out R^2 of their scaled sum less that of another task's",
        FURTHER,
    ),
    Claim(
        "patch",
        "One change of the weights, the same for all queries, does better than zero-shot.",
        "arXiv:2511.17864",
        Cell("patch", (("setting", "static patch"),), "gain"),
        "accuracy with the patch less zero-shot",
        "--patch",
    ),
    Claim(
        "function_vector",
        "Heads that carry the function vector are those whose meta-gradient has an effect.",
        "arXiv:2310.15213",
        Cell("profile_correlations", (("first", "first_order"), ("second", "function_vector")), "rho"),
        "Spearman's rho of the two scores over heads",
        "--profile",
    ),
)


def quantities_read() -> frozenset[str]:
    """The quantities of the table ``set_means`` that a claim reads."""
    reads = [claim.reads for claim in CLAIMS if isinstance(claim.reads, Difference)]
    return frozenset(of.quantity for own in reads for of in (own.value, own.null, own.positive) if of is not None)
