"""record(): prompts in all their settings, the demonstrations run once (docs/theory.md, sections 2 and 5)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

from metaopt_lens.models import Intervention, LensModel, Prefix
from metaopt_lens.prompts import TokenizedPrompt
from metaopt_lens.runs._batching import batches, choose_batch_size
from metaopt_lens.runs._destinations import Position, prompt_groups
from metaopt_lens.runs._forward import run_rows, run_shared_prefix
from metaopt_lens.runs._keep import ATTENTION, Keep, Row
from metaopt_lens.runs._prompt_run import CHANGED, SETTINGS, WITH_DEMOS, Run, Runs, Setting
from metaopt_lens.runs._wanted import Wanted


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
    wanted = Wanted(tuple(settings), update, position, keep, grad)
    found: dict[int, Runs] = {}
    for indices, runs in record_batches(model, prompts, wanted, batch_size=batch_size):
        found.update(zip(indices, runs, strict=True))
    return [found[index] for index in range(len(prompts))]


def record_batches(
    model: LensModel, prompts: Sequence[TokenizedPrompt], wanted: Wanted, *, batch_size: int | None = None
) -> Iterator[tuple[list[int], list[Runs]]]:
    """`record` batch by batch, so that not all runs need to be held.

    Args:
        model: see `record`.
        prompts: see `record`.
        wanted: which runs, and what of them.
        batch_size: see `record`.

    Yields:
        Which prompts were run, and their runs. A batch never spans two sets of demonstrations.
    """
    wanted.check(prompts)
    for group in prompt_groups(prompts):
        members = [prompts[i] for i in group]
        for chosen, runs in prepare(model, members[0], wanted).batches(members, batch_size=batch_size):
            yield [group[i] for i in chosen], runs


def prepare(model: LensModel, tokens: TokenizedPrompt, wanted: Wanted) -> Recorder:
    """Run the demonstrations of a prompt once, for all queries behind them.

    Args:
        model: a wrapped model. It is not modified.
        tokens: any of the prompts.
        wanted: which runs to make of every query, and what to keep of them.

    Raises:
        PromptError: no demonstrations where a setting needs them.
    """
    wanted.check([tokens])
    return Recorder(model, _run_prefixes(model, tokens, wanted), wanted)


@dataclass(frozen=True, eq=False)
class Recorder:
    """Records queries behind one set of demonstrations, which were run when it was made; see `prepare`.

    Attributes:
        model: never modified.
        prefixes: what stands before the queries.
        wanted: which runs, and what of them.
    """

    model: LensModel
    prefixes: Prefixes
    wanted: Wanted

    def batches(
        self, prompts: Sequence[TokenizedPrompt], *, batch_size: int | None = None
    ) -> Iterator[tuple[list[int], list[Runs]]]:
        """Run all queries, some at a time.

        Args:
            prompts: with the recorder's demonstrations.
            batch_size: queries run together; by default as many as memory allows.

        Yields:
            Which prompts were run, and their runs.
        """
        wanted, size = self.wanted, batch_size
        if size is None:
            n_read = max(len(wanted.destinations(p)) for p in prompts) if wanted.keep.logits else 0
            size = queries_together(self.model, prompts, wanted.settings, n_read=n_read)
        yield from batches(prompts, lambda tokens: len(tokens.query), self.runs, batch_size=size)

    def runs(self, prompts: Sequence[TokenizedPrompt]) -> list[Runs]:
        """Run some queries together.

        Args:
            prompts: with the recorder's demonstrations.
        """
        wanted, prefixes = self.wanted, self.prefixes
        found: list[dict[Setting, Run]] = [{} for _ in prompts]
        n_before = prompts[0].demonstrations.start

        def make(some: tuple[Setting, ...], prefix: Prefix | None) -> None:
            asked = [setting for setting in some if setting in wanted.settings]
            if not asked:
                return
            rows = [_row(setting, tokens, wanted.destinations(tokens)) for setting in asked for tokens in prompts]
            before = prefix if asked[0] in WITH_DEMOS or prefix is None else prefix.truncate(n_before)
            for number, run in enumerate(run_rows(self.model, before, rows, keep=wanted.keep, grad=wanted.grad)):
                found[number % len(prompts)][run.setting] = run

        make(("icl", "zs_matched"), prefixes.base)
        make(("zs",), prefixes.base)
        if CHANGED & set(wanted.settings):
            with wanted.changed(self.model):
                make(("ft",), prefixes.changed)
                make(("ft_matched",), prefixes.changed)
        return [Runs({setting: runs[setting] for setting in wanted.settings}) for runs in found]


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


def _run_prefixes(model: LensModel, tokens: TokenizedPrompt, wanted: Wanted) -> Prefixes:
    """S and D (only S where no setting needs D), once for all queries."""
    settings, grad = set(wanted.settings), wanted.grad

    def ids(kind: Set[str]) -> tuple[int, ...]:
        asked = kind & settings
        stop = tokens.query.start if asked & WITH_DEMOS else tokens.demonstrations.start
        return tokens.ids[:stop] if asked else ()

    base = run_shared_prefix(model, ids(set(SETTINGS) - CHANGED), grad=grad)
    changed = None
    if CHANGED & settings:
        with wanted.changed(model):
            changed = run_shared_prefix(model, ids(CHANGED), grad=grad)
    return Prefixes(base, changed)


def _row(setting: Setting, tokens: TokenizedPrompt, destinations: tuple[int, ...]) -> Row:
    """The prompt of a setting: without D in the zero-shot settings, with its positions moved forward."""
    if setting in WITH_DEMOS:
        return Row(setting, tokens, destinations)
    removed = len(tokens.demonstrations)
    return Row(setting, tokens.zero_shot(), tuple(d - removed for d in destinations))
