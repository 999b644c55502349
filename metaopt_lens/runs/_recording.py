"""record(): prompts in all their settings, the demonstrations run once (docs/theory.md, sections 2 and 5)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from metaopt_lens._errors import OptionError, PromptError
from metaopt_lens.models import Intervention, LensModel, Prefix
from metaopt_lens.prompts import TokenizedPrompt
from metaopt_lens.runs._batching import batches, choose_batch_size
from metaopt_lens.runs._destinations import Position, destinations_of, prompt_groups
from metaopt_lens.runs._forward import run_rows, run_shared_prefix
from metaopt_lens.runs._keep import ATTENTION, Keep, Row
from metaopt_lens.runs._prompt_run import CHANGED, SETTINGS, WITH_DEMOS, Run, Runs, Setting


class _Prefixes(NamedTuple):
    """What stands before a group's queries, on the base model and on the changed one."""

    base: Prefix | None
    changed: Prefix | None


def record(
    model: LensModel,
    prompts: Sequence[TokenizedPrompt],
    *,
    settings: Sequence[Setting] = ("icl", "zs", "zs_matched"),
    update: Intervention | None = None,
    position: Position = "last",
    keep: Keep = ATTENTION,
    batch_size: int | None = None,
    grad: bool = False,
) -> list[Runs]:
    """Run prompts in all settings asked for.

    Prompts with the same demonstrations share the pass over them; the position-matched run rides in the batch of the
    in-context run; passes stop after the last layer's attention unless more is kept; batches are sized by memory and
    halved when it runs out.

    Args:
        model: a wrapped model. It is not modified.
        prompts: tokens of the prompts (see `tokenize_for`).
        settings: runs to make: ``"icl"``, ``"zs"``, ``"zs_matched"``; with `update` also ``"ft"``, ``"ft_matched"``.
        update: the change of the model for ``"ft"`` and ``"ft_matched"``, such as a `WeightUpdate`.
        position: which token of the query to read: ``"last"``, ``"all"``, or an index into the whole prompt.
        keep: what to keep beyond the attention.
        batch_size: queries run together; by default as many as memory allows.
        grad: keep the graph.

    Returns:
        One `Runs` per prompt, in their order.

    Raises:
        PromptError: no demonstrations where a setting needs them.
        OptionError: no settings, an unknown one, or a finetuned one without `update`.
        SpanError: `position` is not in the query.
        NonFiniteError: NaN or infinity in the activations; names the first layer.
    """
    found: dict[int, Runs] = {}
    for indices, runs in record_batches(
        model, prompts, settings=settings, update=update, position=position, keep=keep, batch_size=batch_size, grad=grad
    ):
        found.update(zip(indices, runs, strict=True))
    return [found[index] for index in range(len(prompts))]


def record_batches(
    model: LensModel,
    prompts: Sequence[TokenizedPrompt],
    *,
    settings: Sequence[Setting] = ("icl", "zs", "zs_matched"),
    update: Intervention | None = None,
    position: Position = "last",
    keep: Keep = ATTENTION,
    batch_size: int | None = None,
    grad: bool = False,
) -> Iterator[tuple[list[int], list[Runs]]]:
    """`record` batch by batch, so that not all runs need to be held; takes the same arguments.

    Yields:
        Which prompts were run, and their runs. A batch never spans two sets of demonstrations.
    """
    _check(settings, update, prompts)
    rows = [destinations_of(tokens, position) for tokens in prompts]
    for group in prompt_groups(prompts):
        members = [prompts[i] for i in group]
        prefixes = _run_prefixes(model, members[0], settings, update, grad)

        def run(batch: list[int], prefixes: _Prefixes = prefixes) -> list[Runs]:
            tokens, at = [prompts[i] for i in batch], [rows[i] for i in batch]
            return _run_batch(model, prefixes, tokens, at, settings, update, keep, grad)

        size = batch_size
        if size is None:
            longest = max(len(tokens.query) for tokens in members)
            together = len({"icl", "zs_matched"} & set(settings)) or 1  # these two ride in one batch
            n_read = max(len(rows[i]) for i in group) if keep.logits else 0
            fits = choose_batch_size(model, n_new=longest, n_prefix=members[0].query.start, n_read=n_read)
            size = max(1, fits // together)
        for chosen, runs in batches(group, lambda i: len(prompts[i].query), run, batch_size=size):
            yield [group[i] for i in chosen], runs


def _check(settings: Sequence[Setting], update: Intervention | None, prompts: Sequence[TokenizedPrompt]) -> None:
    if not settings:
        raise OptionError("no settings: name at least one of " + ", ".join(map(repr, SETTINGS)) + ".")
    for setting in settings:
        if setting not in SETTINGS:
            raise OptionError(f"settings must be among {', '.join(map(repr, SETTINGS))}, got {setting!r}.")
        if setting in CHANGED and update is None:
            raise OptionError(f"setting {setting!r} runs the changed model: give it the update.")
    if WITH_DEMOS & set(settings) and not all(tokens.demos for tokens in prompts):
        raise PromptError("a prompt has no demonstrations: without them it can only be run with settings=('zs',).")


def _changed(model: LensModel, update: Intervention | None) -> AbstractContextManager[None]:
    return nullcontext() if update is None else model.hooked(update.hooks(model))


def _run_prefixes(
    model: LensModel,
    tokens: TokenizedPrompt,
    settings: Sequence[Setting],
    update: Intervention | None,
    grad: bool,
) -> _Prefixes:
    """S and D (only S where no setting needs D), once for all queries."""

    def ids(kind: Set[str]) -> tuple[int, ...]:
        asked = kind & set(settings)
        stop = tokens.query.start if asked & WITH_DEMOS else tokens.demonstrations.start
        return tokens.ids[:stop] if asked else ()

    base = run_shared_prefix(model, ids(set(SETTINGS) - CHANGED), grad=grad)
    changed = None
    if CHANGED & set(settings):
        with _changed(model, update):
            changed = run_shared_prefix(model, ids(CHANGED), grad=grad)
    return _Prefixes(base, changed)


def _run_batch(
    model: LensModel,
    prefixes: _Prefixes,
    prompts: list[TokenizedPrompt],
    destinations: list[tuple[int, ...]],
    settings: Sequence[Setting],
    update: Intervention | None,
    keep: Keep,
    grad: bool,
) -> list[Runs]:
    found: list[dict[Setting, Run]] = [{} for _ in prompts]
    n_before = prompts[0].demonstrations.start

    def make(wanted: tuple[Setting, ...], prefix: Prefix | None) -> None:
        asked = [setting for setting in wanted if setting in settings]
        if not asked:
            return
        rows = [_row(s, tokens, at) for s in asked for tokens, at in zip(prompts, destinations, strict=True)]
        before = prefix if asked[0] in WITH_DEMOS or prefix is None else prefix.truncate(n_before)
        for number, run in enumerate(run_rows(model, before, rows, keep=keep, grad=grad)):
            found[number % len(prompts)][run.setting] = run

    make(("icl", "zs_matched"), prefixes.base)
    make(("zs",), prefixes.base)
    if CHANGED & set(settings):
        with _changed(model, update):
            make(("ft",), prefixes.changed)
            make(("ft_matched",), prefixes.changed)
    return [Runs({setting: runs[setting] for setting in settings}) for runs in found]


def _row(setting: Setting, tokens: TokenizedPrompt, destinations: tuple[int, ...]) -> Row:
    """The prompt of a setting: without D in the zero-shot settings, with its positions moved forward."""
    if setting in WITH_DEMOS:
        return Row(setting, tokens, destinations)
    removed = len(tokens.demonstrations)
    return Row(setting, tokens.zero_shot(), tuple(d - removed for d in destinations))
