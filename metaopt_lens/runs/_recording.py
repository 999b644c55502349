"""record(): prompts in all their settings, the demonstrations run once (docs/theory.md, sections 2 and 5)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

from metaopt_lens._errors import OptionError, PromptError
from metaopt_lens.models import Intervention, LensModel, Prefix
from metaopt_lens.prompts import TokenizedPrompt
from metaopt_lens.runs._batching import batches, choose_batch_size
from metaopt_lens.runs._destinations import Position, destinations_of, prompt_groups
from metaopt_lens.runs._forward import run_rows, run_shared_prefix
from metaopt_lens.runs._keep import ATTENTION, Keep, Row
from metaopt_lens.runs._prompt_run import CHANGED, SETTINGS, WITH_DEMOS, Run, Runs, Setting


class Prefixes(NamedTuple):
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

    Args:
        model: see `record`.
        prompts: see `record`.
        settings: see `record`.
        update: see `record`.
        position: see `record`.
        keep: see `record`.
        batch_size: see `record`.
        grad: see `record`.

    Yields:
        Which prompts were run, and their runs. A batch never spans two sets of demonstrations.
    """
    _check(settings, update, prompts)
    rows = [destinations_of(tokens, position) for tokens in prompts]
    for group in prompt_groups(prompts):
        members = [prompts[i] for i in group]
        recorder = prepare(model, members[0], settings=settings, update=update, keep=keep, grad=grad)

        def run(batch: list[int], recorder: Recorder = recorder) -> list[Runs]:
            return recorder.runs([prompts[i] for i in batch], [rows[i] for i in batch])

        n_read = max(len(rows[i]) for i in group) if keep.logits else 0
        size = batch_size
        if size is None:
            size = queries_together(model, members, settings, n_read=n_read)
        for chosen, runs in batches(group, lambda i: len(prompts[i].query), run, batch_size=size):
            yield [group[i] for i in chosen], runs


@dataclass(frozen=True, eq=False)
class Recorder:
    """Records queries behind one set of demonstrations, which were run when it was made; see `prepare`.

    Attributes:
        model: never modified.
        prefixes: what stands before the queries.
        settings: runs to make of every query.
        update: the change of the model in the finetuned settings.
        keep: what to keep beyond the attention.
        grad: keep the graph.
    """

    model: LensModel
    prefixes: Prefixes
    settings: tuple[Setting, ...]
    update: Intervention | None
    keep: Keep
    grad: bool

    def runs(
        self, prompts: Sequence[TokenizedPrompt], destinations: Sequence[tuple[int, ...]] | None = None
    ) -> list[Runs]:
        """Run some queries together.

        Args:
            prompts: with the recorder's demonstrations.
            destinations: positions to read of each (see `destinations_of`); the last if not given.
        """
        at = [destinations_of(p, "last") for p in prompts] if destinations is None else list(destinations)
        return _run_batch(
            self.model, self.prefixes, list(prompts), at, self.settings, self.update, self.keep, self.grad
        )


def prepare(
    model: LensModel,
    tokens: TokenizedPrompt,
    *,
    settings: Sequence[Setting],
    update: Intervention | None = None,
    keep: Keep = ATTENTION,
    grad: bool = False,
) -> Recorder:
    """Run the demonstrations of a prompt once, for all queries behind them.

    Args:
        model: a wrapped model. It is not modified.
        tokens: any of the prompts.
        settings: runs to make of every query.
        update: the change of the model for the finetuned settings.
        keep: what to keep beyond the attention.
        grad: keep the graph.

    Raises:
        PromptError: no demonstrations where a setting needs them.
        OptionError: no settings, an unknown one, or a finetuned one without `update`.
    """
    _check(settings, update, [tokens])
    prefixes = _run_prefixes(model, tokens, settings, update, grad)
    return Recorder(model, prefixes, tuple(settings), update, keep, grad)


def queries_together(
    model: LensModel, prompts: Sequence[TokenizedPrompt], settings: Sequence[Setting], *, n_read: int = 0
) -> int:
    """How many queries behind one set of demonstrations fit a batch.

    Args:
        model: a wrapped model.
        prompts: with the same demonstrations.
        settings: runs to make of every query.
        n_read: positions of a query whose logits are kept.
    """
    longest = max(len(tokens.query) for tokens in prompts)
    together = len({"icl", "zs_matched"} & set(settings)) or 1  # these two ride in one batch
    fits = choose_batch_size(model, n_new=longest, n_prefix=prompts[0].query.start, n_read=n_read)
    return max(1, fits // together)


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
) -> Prefixes:
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
    return Prefixes(base, changed)


def _run_batch(
    model: LensModel,
    prefixes: Prefixes,
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
