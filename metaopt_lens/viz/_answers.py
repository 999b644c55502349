"""What the model answers, as sentences, a terminal table, a part of a page, and plain data."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape as plain_markup
from rich.text import Text

from metaopt_lens.analysis import Comparison
from metaopt_lens.decomposition import Decomposition
from metaopt_lens.runs import LabelPrediction, VocabularyAnswer, small_mass_note
from metaopt_lens.viz._segments import visible_token
from metaopt_lens.viz._text import terminal_table, titled


def _settings(answer: LabelPrediction) -> tuple[tuple[str, str | None, list[float], VocabularyAnswer], ...]:
    """Name, best candidate, shares among the candidates and absolute numbers of both settings."""
    return (
        ("zero-shot", answer.zero_shot_answer, answer.zero_shot_shares.tolist(), answer.zero_shot_vocabulary),
        ("in context", answer.in_context_answer, answer.in_context_shares.tolist(), answer.in_context_vocabulary),
    )


def answer_sentences(answer: LabelPrediction) -> list[str]:
    """The right label's rank in the whole vocabulary, and the warning about the candidates' mass, where there are."""
    found = []
    if answer.correct is not None:
        ranks = " and ".join(f"{own.rank} {name}" for name, _, _, own in _settings(answer))
        found.append(
            f"Rank of the right label's first token ({answer.correct}) in the whole vocabulary: {ranks}; 1 is the "
            "model's first choice."
        )
    return found if answer.mass_note is None else [*found, answer.mass_note]


def _label(answer: LabelPrediction, label: str) -> str:
    return f"{label} ✓" if label == answer.correct else label


def _ticked(answer: LabelPrediction) -> str:
    """What the tick means, where there is one."""
    return " ✓ marks the right label." if answer.correct in answer.labels else ""


def _top(own: VocabularyAnswer) -> list[tuple[str, float]]:
    return [(visible_token(token.text), token.probability) for token in own.top]


def comparison_sentences(comparison: Comparison) -> list[str]:
    """The same about the predictions of a comparison: candidates' mean mass, right labels' ranks, and the warning.

    Args:
        comparison: what `compare` returned.
    """
    answers = comparison.answers
    if not answers:
        return []
    names = {"ZS": "zero-shot", "ICL": "in context", "FT": "finetuned"}
    masses = {names[key]: float(own.candidate_mass.mean()) for key, own in answers.items()}
    total = ", ".join(f"{mass:.1%} {name}" for name, mass in masses.items())
    found = [f"Total probability of the candidates, mean over queries: {total}."]
    ranks = {names[key]: [r for r in own.label_rank.tolist() if r > 0] for key, own in answers.items()}
    n = len(ranks["zero-shot"])
    if n:
        first = ", ".join(f"{sum(r == 1 for r in found)} of {n} {name}" for name, found in ranks.items())
        middle = ", ".join(f"{median(found):g} {name}" for name, found in ranks.items())
        found.append(
            f"The right label's first token is the model's first choice in the whole vocabulary for {first} (median "
            f"rank {middle})."
        )
    note = small_mass_note(masses)
    return found if note is None else [*found, note]


# ---- page -----------------------------------------------------------------------------------------------------------


def answer_context(answer: LabelPrediction) -> dict[str, Any]:
    """What ``answer.html.j2`` shows: candidates, first choices, rank and warning."""
    settings = _settings(answer)
    return {
        "ticked": _ticked(answer),
        "settings": [{"name": name, "mass": own.mass, "top": _top(own)} for name, _, _, own in settings],
        "candidates": [
            (
                _label(answer, label),
                [
                    {"best": label == best, "probability": float(own.probabilities[i]), "share": shares[i]}
                    for _, best, shares, own in settings
                ],
            )
            for i, label in enumerate(answer.labels)
        ],
        "rank": answer_sentences(answer)[0] if answer.correct is not None else None,
        "mass_note": answer.mass_note,
    }


# ---- terminal -------------------------------------------------------------------------------------------------------


def labels_text(answer: LabelPrediction) -> Group:
    """Every candidate's probability and share, the model's first choices, rank and warning; the best is bold.

    Args:
        answer: what the model answers to one prompt.
    """
    settings = _settings(answer)
    parts: list[RenderableType] = []
    if answer.labels:
        table = terminal_table()
        table.add_column("")
        for label in answer.labels:
            table.add_column(plain_markup(_label(answer, label)), justify="right")
        table.add_column("together", justify="right")
        for name, best, shares, own in settings:
            values = own.probabilities.tolist()
            cells = [
                f"[bold]{value:.1%}[/]" if label == best else f"{value:.1%}"
                for label, value in zip(answer.labels, values, strict=True)
            ]
            table.add_row(name, *cells, f"{own.mass:.1%}")
            if len(answer.labels) > 1:
                table.add_row("  among them", *(f"[dim]{share:.1%}[/]" for share in shares), "")
        parts.append(titled(f"Probability of the candidate labels{' (✓ is right)' if _ticked(answer) else ''}", table))
    table = terminal_table()
    for name, *_ in settings:
        table.add_column(name, overflow="fold")
        table.add_column("", justify="right", no_wrap=True)
    for line in zip(*(_top(own) for *_, own in settings), strict=True):
        table.add_row(*(cell for text, value in line for cell in (plain_markup(text), f"[dim]{value:.1%}[/]")))
    parts.append(titled("Most probable next tokens", table))
    return Group(*parts, *(Text(sentence) for sentence in answer_sentences(answer)))


def answers_text(items: Sequence[Decomposition], answers: Sequence[LabelPrediction]) -> Group:
    """A terminal table of what the model answers zero-shot and in context, one row per prompt.

    Args:
        items: the decompositions.
        answers: what the model answers to each prompt.
    """
    table = terminal_table()
    for name in ("query", "right label", "zero-shot", "in context", "says zero-shot", "says in context", "rank"):
        table.add_column(name)
    for item, answer in zip(items, answers, strict=True):
        zero_shot, in_context = _settings(answer)
        ranks = "" if answer.correct is None else f"{zero_shot[-1].rank} → {in_context[-1].rank}"
        table.add_row(
            plain_markup(" ".join(item.prompt.query.split())),
            plain_markup(answer.correct or "(not given)"),
            *(_best(answer, best, own) for _, best, _, own in (zero_shot, in_context)),
            *(f"{plain_markup(_top(own)[0][0])} {_top(own)[0][1]:.1%}" for *_, own in (zero_shot, in_context)),
            ranks,
        )
    small = [index for index, answer in enumerate(answers) if answer.mass_note is not None]
    note = (
        "Best candidate with its probability, then the model's first choice among all tokens; rank: of the right "
        "label's first token in the whole vocabulary, zero-shot → in context."
    )
    parts: list[RenderableType] = [titled("What the model answers", table), Text(note)]
    if small:
        parts.append(
            Text(
                f"In {len(small)} of {len(answers)} prompts the candidates together have less than half of the "
                "probability in one of the settings: the model mostly says something else there."
            )
        )
    return Group(*parts)


def _best(answer: LabelPrediction, best: str | None, own: VocabularyAnswer) -> str:
    if best is None:
        return "[dim]no candidate[/]"
    colour = "" if answer.correct is None else "green" if best == answer.correct else "red"
    text = f"{plain_markup(best)} {float(own.probabilities[answer.labels.index(best)]):.1%}"
    return f"[{colour}]{text}[/]" if colour else text


# ---- data -----------------------------------------------------------------------------------------------------------


def answer_data(answer: LabelPrediction) -> dict[str, Any]:
    """The same as plain data, ready for JSON."""

    def setting(scores: list[float], best: str | None, shares: list[float], own: VocabularyAnswer) -> dict[str, Any]:
        return {
            "answer": best,
            "labels": {
                label: {"log_prob": score, "probability": value, "probability_among_candidates": share}
                for label, score, value, share in zip(
                    answer.labels, scores, own.probabilities.tolist(), shares, strict=True
                )
            },
            "candidates_probability": own.mass,
            "right_label_rank": own.rank,
            "top_tokens": [{"token": token.text, "probability": token.probability} for token in own.top],
        }

    zero_shot, in_context = _settings(answer)
    return {
        "correct": answer.correct,
        "zero_shot": setting(answer.zero_shot.tolist(), *zero_shot[1:]),
        "in_context": setting(answer.in_context.tolist(), *in_context[1:]),
        "note": answer.mass_note,
    }
