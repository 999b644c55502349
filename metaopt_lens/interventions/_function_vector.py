"""Function vectors: what some heads say in context, added to the residual stream (arXiv:2310.15213)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metaopt_lens._codec import Stored
from metaopt_lens._errors import DataError, HeadError, OptionError, PromptError
from metaopt_lens._storage import provenance
from metaopt_lens._types import HeadRef
from metaopt_lens.interventions._change import Change
from metaopt_lens.interventions._heads import Heads, head_mask
from metaopt_lens.models import PASS, Hook, HostPass, LensModel, ModelInfo, Readout, wrap
from metaopt_lens.prompts import Demo, ICLPrompt, PromptLike, Template, as_prompts, tokenize_label
from metaopt_lens.runs import (
    Wanted,
    choose_batch_size,
    map_batches,
    record_batches,
    refuse_acting,
    through_w_o,
    tokenize_all,
    tokenize_for,
)

if TYPE_CHECKING:
    import pandas as pd


def word_pair_prompts(
    pairs: Sequence[Demo | tuple[str, str]],
    *,
    shots: int = 8,
    n: int | None = None,
    seed: int = 0,
    template: Template | None = None,
) -> list[ICLPrompt]:
    """Prompts that ask for one pair each, behind others drawn at random: what a function vector is made from.

    Args:
        pairs: (input, label), as in ``("France", "Paris")``.
        shots: demonstrations in each prompt.
        n: how many prompts, each with another query; None for one for every pair.
        seed: of the draw.
        template: the text around inputs and labels.

    Returns:
        The prompts, with their labels.

    Raises:
        DataError: too few pairs.
        OptionError: no shots, or no prompts.
    """
    rows = [pair if isinstance(pair, Demo) else Demo(*pair) for pair in pairs]
    if shots < 1 or (n is not None and n < 1):
        raise OptionError(f"at least one demonstration and one prompt are needed, got shots={shots} and n={n}.")
    if len(rows) < shots + 1 or (n is not None and len(rows) < n):
        needs = f"{shots} demonstrations and a query" if len(rows) < shots + 1 else f"{n} different queries"
        raise DataError(
            f"{len(rows)} word pairs are not enough rows for a function vector: its prompts need {needs}. Give more "
            "pairs, or lower shots or n."
        )
    draw = random.Random(seed)
    queries = draw.sample(range(len(rows)), len(rows) if n is None else n)
    form = Template() if template is None else template
    prompts = []
    for query in queries:
        others = draw.sample([row for index, row in enumerate(rows) if index != query], shots)
        prompts.append(ICLPrompt(others, rows[query].input, form, label=rows[query].label))
    return prompts


def function_vector(
    model: Any,
    prompts: PromptLike | Sequence[PromptLike],
    heads: Heads,
    *,
    prepend_bos: bool | None = None,
    batch_size: int | None = None,
) -> FunctionVector:
    """The mean output of some heads at the last token of in-context prompts, summed in the residual stream.

    ``sum over heads of W_O mean z`` (arXiv:2310.15213; docs/theory.md, section 10); b_O and a norm after attention are
    left out.

    Args:
        model: `HookedTransformer`, `TransformerBridge` or a wrapped model. It is not modified.
        prompts: in-context prompts of one task, in the forms `decompose` takes; their demonstrations may differ (see
            `word_pair_prompts`).
        heads: which heads, as in ``["L3H7"]``, such as ``head_effects(...).ranked(10)``; None for all.
        prepend_bos: put BOS first; None for the model's default.
        batch_size: prompts run together; by default as many as memory allows.

    Raises:
        PromptError: no prompts, or one without demonstrations.
        HeadError: an unknown head, or none.
        ContextWindowError: a prompt is longer than the context window.
    """
    wrapped = wrap(model)
    refuse_acting(wrapped, "function_vector")
    chosen = head_mask(wrapped.info, heads)
    tokens = tokenize_all(wrapped, as_prompts(prompts), prepend_bos=prepend_bos, require_demos=True)
    shape = (wrapped.info.n_layers, wrapped.info.n_heads, wrapped.info.d_head)
    total = torch.zeros(shape, dtype=torch.float64)
    for _, batch in record_batches(wrapped, tokens, Wanted(("icl",)), batch_size=batch_size):
        for runs in batch:
            total += runs.icl.z[-1].detach().double().cpu()
    written = through_w_o(wrapped, total / len(tokens))  # [layer, head, d_model]
    return FunctionVector(model=wrapped.info, vector=written[chosen].sum(0), heads=chosen, n_prompts=len(tokens))


@dataclass(frozen=True, eq=False, repr=False)
class FunctionVector(Stored):
    """A task as a direction in the residual stream. With ``intervene(model, fv.at(layer))`` zero-shot runs do the task.

    Attributes:
        model: sizes and parametrisation of the model it belongs to.
        vector: what is added.
        heads: whose outputs it is made of.
        n_prompts: over how many prompts they were averaged.
        provenance: versions and time.
    """

    kind: ClassVar[str] = "function vector"

    model: ModelInfo
    vector: Float[Tensor, " d_model"]
    heads: Bool[Tensor, "layer head"]
    n_prompts: int
    provenance: dict[str, Any] = field(default_factory=provenance)

    def at(self, layer: int, strength: float = 1.0) -> AppliedFunctionVector:
        """The intervention that adds it to the residual stream behind a block, at the last token of every pass.

        Args:
            layer: the block, counted from 0.
            strength: factor on the vector.

        Raises:
            HeadError: no such layer.
        """
        if not 0 <= layer < self.model.n_layers:
            raise HeadError(f"there is no layer {layer}: the model has layers 0 to {self.model.n_layers - 1}.")
        return AppliedFunctionVector(self, layer, float(strength))

    def accuracy(
        self,
        model: Any,
        prompts: PromptLike | Sequence[PromptLike],
        *,
        strength: float = 1.0,
        prepend_bos: bool | None = None,
        batch_size: int | None = None,
    ) -> pd.DataFrame:
        """How well zero-shot prompts are answered with the vector at each layer.

        Args:
            model: the model it was made with.
            prompts: with their labels, in the forms `decompose` takes; demonstrations are left out. Give queries that
                the vector was not made from.
            strength: factor on the vector.
            prepend_bos: put BOS first; None for the model's default.
            batch_size: prompts run together; by default as many as memory allows.

        Returns:
            One row per layer: `accuracy`, the share of prompts whose label's first token is the model's first choice of
            the whole vocabulary, and `label_log_prob`, the mean log-probability of that token; both also without the
            vector (`zero_shot_accuracy`, `zero_shot_label_log_prob`); `n`, the number of prompts.

        Raises:
            PromptError: no prompts, or one without a label.
            ModelMismatchError: it was made with another model.
        """
        import pandas as pd

        wrapped = wrap(model)
        refuse_acting(wrapped, "FunctionVector.accuracy")
        wrapped.check_same(self.model, "this function vector")
        questions = [_question(wrapped, prompt, prepend_bos) for prompt in as_prompts(prompts)]
        size = batch_size or choose_batch_size(wrapped, n_new=max(len(ids) for ids, _ in questions), n_prefix=0)

        def answered(layer: int | None) -> Float[Tensor, "prompt 2"]:
            def run(batch: list[tuple[tuple[int, ...], int]]) -> list[Tensor]:
                return _answers(wrapped, batch, None if layer is None else self.at(layer, strength))

            return torch.stack(map_batches(questions, lambda question: len(question[0]), run, batch_size=size))

        plain = answered(None).mean(0).tolist()
        rows = []
        for layer in range(self.model.n_layers):
            accuracy, log_prob = answered(layer).mean(0).tolist()
            rows.append(
                {
                    "layer": layer,
                    "accuracy": accuracy,
                    "zero_shot_accuracy": plain[0],
                    "label_log_prob": log_prob,
                    "zero_shot_label_log_prob": plain[1],
                    "n": len(questions),
                }
            )
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        names = [str(HeadRef(layer, head)) for layer, head in self.heads.nonzero().tolist()]
        heads = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        return (
            f"FunctionVector of {self.model.name}: {heads} over {self.n_prompts} prompts, norm "
            f"{float(self.vector.norm()):.4g}"
        )


@dataclass(frozen=True, eq=False)
class AppliedFunctionVector:
    """A function vector behind one block, at the last token of every pass: in generation, at every new token.

    Attributes:
        function_vector: what is added.
        layer: behind which block.
        strength: factor on the vector.
    """

    function_vector: FunctionVector
    layer: int
    strength: float = 1.0

    def change(self, model: LensModel) -> Change:
        """The vector, added to the residual stream.

        Args:
            model: a wrapped model.

        Raises:
            ModelMismatchError: it was made with another model.
        """
        model.check_same(self.function_vector.model, "this function vector")
        last: list[Int[Tensor, " batch"]] = []

        def begin(host_pass: HostPass) -> None:
            new = host_pass.valid[:, host_pass.n_past :]
            last[:] = [(new * torch.arange(1, new.shape[1] + 1, device=new.device)).argmax(1)]

        def add(stream: Tensor) -> Tensor:
            return self.added(stream, last[0])

        return Change(hooks=[(PASS, begin), (model.residual_hook("post", self.layer), add)])

    def added(
        self, stream: Float[Tensor, "batch pos d_model"], at: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream with the vector.

        Args:
            stream: behind the block.
            at: where to add it in every sequence.
        """
        moved = stream.clone()
        rows = torch.arange(len(stream), device=stream.device)
        moved[rows, at.to(stream.device)] += self.strength * self.function_vector.vector.to(stream)
        return moved


def _question(model: LensModel, prompt: ICLPrompt, prepend_bos: bool | None) -> tuple[tuple[int, ...], int]:
    """Ids of the zero-shot prompt, and the first token of its label."""
    if prompt.label is None:
        raise PromptError(f"the accuracy needs the label of query {prompt.query!r}: ICLPrompt(..., label=...).")
    ids = tokenize_for(model, prompt, prepend_bos=prepend_bos).zero_shot().ids
    return ids, tokenize_label(prompt.label, prompt.template, model.tokenizer)[0]


def _answers(
    model: LensModel, questions: Sequence[tuple[tuple[int, ...], int]], vector: AppliedFunctionVector | None
) -> list[Float[Tensor, " 2"]]:
    """Of every question, whether the label's token is the first choice, and its log-probability."""
    tokens = torch.zeros(len(questions), max(len(ids) for ids, _ in questions), dtype=torch.long)
    for row, (ids, _) in enumerate(questions):
        tokens[row, : len(ids)] = torch.tensor(ids)
    last = torch.tensor([len(ids) - 1 for ids, _ in questions])
    hooks: list[Hook] = []
    if vector is not None:
        hooks = [(model.residual_hook("post", vector.layer), lambda stream: vector.added(stream, last))]
    logits = model.run(tokens, hooks=hooks, read=Readout(last[:, None]))
    assert logits is not None
    log_probs = logits[:, 0].detach().float().log_softmax(-1).cpu()
    label = torch.tensor([token for _, token in questions])
    own = log_probs[torch.arange(len(label)), label]
    return list(torch.stack([(log_probs.argmax(-1) == label).double(), own.double()], dim=-1))
