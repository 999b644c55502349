"""The prompts of one seed: demonstrations, queries behind them, rows held out for the learning rate."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from metaopt_lens._errors import ContextWindowError, DataError, OptionError
from metaopt_lens.analysis import label_map, relabelled
from metaopt_lens.experiments._run_config import RunConfig
from metaopt_lens.models import LensModel
from metaopt_lens.prompts import Demo, ICLPrompt, Template, tokenize_label
from metaopt_lens.runs import check_candidates, tokenize_for
from metaopt_lens.tasks import Row, Task, TaskRows, select_demos


@dataclass(frozen=True)
class PromptSet:
    """What one seed asks.

    Attributes:
        prompts: the queries, all behind the same demonstrations.
        held_out: demonstrations to judge learning rates on; empty if the rate is given.
        unrelated: texts for the control run on unrelated data; empty for the usual ones.
        rows: by ``demos``, ``queries``, ``held_out``: the rows' numbers in their splits.
        notes: what differs from what was asked for.
        shown_as: which word stands for each label word; empty for the task's own.
    """

    prompts: tuple[ICLPrompt, ...]
    held_out: tuple[Demo, ...]
    unrelated: tuple[str, ...]
    rows: Mapping[str, tuple[int, ...]]
    notes: tuple[str, ...]
    shown_as: Mapping[str, str] = field(default_factory=dict)

    @property
    def natural_prompts(self) -> tuple[ICLPrompt, ...]:
        """The prompts with the task's own label words."""
        back = {shown: word for word, shown in self.shown_as.items()}
        return tuple(relabelled(prompt, back) for prompt in self.prompts)

    @property
    def demos(self) -> tuple[Demo, ...]:
        """The demonstrations."""
        return self.prompts[0].demos

    @property
    def words(self) -> tuple[str, ...]:
        """All label words that occur as candidates or labels."""
        found = [word for prompt in self.prompts for word in prompt.candidates or ()]
        return tuple(dict.fromkeys([*found, *(d.label for d in (*self.demos, *self.held_out))]))

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        first = self.prompts[0]
        same = all(p.candidates == first.candidates for p in self.prompts)
        return {
            "template": first.template.to_dict(),
            "instruction": first.instruction,
            "demos": [[d.input, d.label] for d in self.demos],
            "queries": [[p.query, p.label] for p in self.prompts],
            "candidates": list(first.candidates or ()) if same else [list(p.candidates or ()) for p in self.prompts],
            "held_out": [[d.input, d.label] for d in self.held_out],
            "unrelated": list(self.unrelated),
            "rows": {name: list(numbers) for name, numbers in self.rows.items()},
            "notes": list(self.notes),
            **({"shown_as": dict(self.shown_as)} if self.shown_as else {}),
        }

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> PromptSet:
        """The reverse of `to_dict`."""
        demos = [Demo(*pair) for pair in body["demos"]]
        template, words = Template(**body["template"]), body["candidates"]
        per_query = bool(words) and isinstance(words[0], list)
        return cls(
            prompts=tuple(
                ICLPrompt(
                    demos,
                    query,
                    template,
                    body["instruction"],
                    label=label,
                    candidates=words[i] if per_query else words,
                )
                for i, (query, label) in enumerate(body["queries"])
            ),
            held_out=tuple(Demo(*pair) for pair in body["held_out"]),
            unrelated=tuple(body["unrelated"]),
            rows={name: tuple(numbers) for name, numbers in body["rows"].items()},
            notes=tuple(body["notes"]),
            shown_as=body.get("shown_as", {}),
        )


def make_prompts(config: RunConfig, task: Task, rows: TaskRows, model: LensModel, seed: int) -> PromptSet:
    """Choose the rows of one seed and check that the model can read them.

    Raises:
        DataError: too few rows.
        PromptError: label words that the tokenizer cannot tell apart or does not know, or too few neutral ones.
        OptionError: other than natural labels in a task of open answers.
        ContextWindowError: not even one demonstration fits.
    """
    if task.is_open and config.labels != "natural":
        raise OptionError(
            f"task {task.name!r} has open answers, which cannot be {config.labels}: take a task with label words, or "
            "labels = 'natural'."
        )
    notes: list[str] = []
    queries = _queries(config, rows, notes)
    needed = config.shots + (1 if config.lr == "auto" else 0)
    if len(rows.train) < needed:
        held_out = (
            " and at least 1 row held out to choose the learning rate (or give lr)" if config.lr == "auto" else ""
        )
        raise DataError(
            f"{config.shots} demonstrations{held_out} are needed, but {rows.source} has only {len(rows.train)} rows to "
            f"learn task {task.name!r} from: lower the number of shots, or give more data."
        )
    selection = "random" if config.selection == "balanced" and task.is_open else config.selection
    demos = select_demos(
        rows.train,
        config.shots,
        seed=seed,
        selection=selection,
        permutation=config.permutation,
        queries=[row.input for row in queries],
    )
    words = task.labels or _words(demos, queries)
    _check_words(words, task, model, config)
    room = model.info.n_ctx - 1 - max(len(tokenize_label(w, task.template, model.tokenizer)) for w in words)
    demos = _fitting(demos, queries, task, model, config, room, notes)
    judges = _held_out(config, rows, demos, task, model, room, seed)
    candidates = [_candidates(row, words, config, task, seed) for row in queries]
    pairs = [Demo(row.input, row.label) for row in demos]
    natural = PromptSet(
        prompts=tuple(
            ICLPrompt(pairs, row.input, task.template, task.instruction, label=row.label, candidates=own)
            for row, own in zip(queries, candidates, strict=True)
        ),
        held_out=tuple(Demo(row.input, row.label) for row in judges),
        unrelated=rows.unrelated,
        rows={
            "demos": tuple(row.index for row in demos),
            "queries": tuple(row.index for row in queries),
            "held_out": tuple(row.index for row in judges),
        },
        notes=tuple(notes),
    )
    if config.labels == "natural":
        return natural
    shown_as = label_map(model, natural.prompts, config.labels, words=words, seed=seed)
    return dataclasses.replace(
        natural,
        prompts=tuple(relabelled(prompt, shown_as) for prompt in natural.prompts),
        held_out=tuple(Demo(demo.input, shown_as.get(demo.label, demo.label)) for demo in natural.held_out),
        shown_as=shown_as,
    )


def _queries(config: RunConfig, rows: TaskRows, notes: list[str]) -> list[Row]:
    there = list(rows.validation)
    if len(there) < 2:
        raise DataError(f"at least 2 query rows are needed, but {rows.source} has {len(there)}.")
    wanted = len(there) if config.queries is None else config.queries
    if wanted > len(there):
        notes.append(f"{wanted} queries were asked for, {len(there)} are there")
    return sorted(random.Random(0).sample(there, min(wanted, len(there))), key=lambda row: row.index)


def _words(demos: Sequence[Row], queries: Sequence[Row]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(row.label for row in (*demos, *queries)))


def _check_words(words: Sequence[str], task: Task, model: LensModel, config: RunConfig) -> None:
    ids = [tokenize_label(word, task.template, model.tokenizer) for word in words]
    check_candidates(ids, words, scoring=config.scoring)


def _fitting(
    demos: Sequence[Row],
    queries: Sequence[Row],
    task: Task,
    model: LensModel,
    config: RunConfig,
    room: int,
    notes: list[str],
) -> tuple[Row, ...]:
    """As many of the demonstrations as leave room for the longest query and label."""
    lengths = [_length(row.input, task, model, config) for row in queries]
    longest = max(lengths)
    if longest > room:
        raise ContextWindowError(
            f"query {queries[lengths.index(longest)].index} of task {task.name!r} has {longest} tokens, but the "
            f"context window of {model.info.name} leaves room for {room}: shorten it or leave it out."
        )
    pairs = [Demo(row.input, row.label) for row in demos]
    prompt = ICLPrompt(pairs, queries[0].input, task.template, task.instruction)
    whole = tokenize_for(model, prompt, prepend_bos=config.prepend_bos, check_window=False)
    start = whole.demonstrations.start
    fit = sum(span.stop - start + longest <= room for span in whole.demos)
    if fit == 0:
        raise ContextWindowError(
            f"not even one demonstration of task {task.name!r} fits the context window of {model.info.name} "
            f"({model.info.n_ctx} tokens) together with the longest query ({longest} tokens)."
        )
    if fit < len(demos):
        notes.append(f"{fit} of {len(demos)} demonstrations fit the context window of {model.info.n_ctx} tokens")
    return tuple(demos[:fit])


def _length(text: str, task: Task, model: LensModel, config: RunConfig) -> int:
    """Tokens of the zero-shot prompt."""
    prompt = ICLPrompt((), text, task.template, task.instruction)
    return tokenize_for(model, prompt, prepend_bos=config.prepend_bos, check_window=False).n_tokens


def _held_out(
    config: RunConfig, rows: TaskRows, demos: Sequence[Row], task: Task, model: LensModel, room: int, seed: int
) -> list[Row]:
    if config.lr != "auto" and not config.patch:
        return []
    taken = {row.index for row in demos}
    rest = [row for row in rows.train if row.index not in taken and _length(row.input, task, model, config) <= room]
    if not rest:
        raise DataError(
            f"no row of {rows.source} is left to choose the learning rate on: lower the number of shots, or give lr."
        )
    return random.Random(seed).sample(rest, min(config.held_out, len(rest)))


def _candidates(row: Row, words: Sequence[str], config: RunConfig, task: Task, seed: int) -> tuple[str, ...]:
    if task.labels is not None or config.n_candidates is None or config.n_candidates >= len(words):
        return tuple(words)
    others = [word for word in words if word != row.label]
    rng = random.Random(f"{seed} {row.index}")
    chosen = {row.label, *rng.sample(others, config.n_candidates - 1)}
    return tuple(word for word in words if word in chosen)
