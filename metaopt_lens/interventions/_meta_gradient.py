"""A meta-gradient as a value: what the demonstrations leave in every head, to be applied to the zero-shot model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from metaopt_lens._codec import Stored
from metaopt_lens._errors import OptionError, PromptError
from metaopt_lens._storage import provenance
from metaopt_lens._types import HeadRef
from metaopt_lens.interventions._apply import AppliedMetaGradient
from metaopt_lens.interventions._change import Change
from metaopt_lens.interventions._demo_tokens import DemoTokens
from metaopt_lens.interventions._heads import Heads, head_mask
from metaopt_lens.interventions._pipeline import Staged
from metaopt_lens.models import Fingerprint, LensModel, ModelInfo, Prefix, check_made_for, fingerprint_of, wrap
from metaopt_lens.prompts import Demo, ICLPrompt, PromptLike, Template, as_prompt
from metaopt_lens.runs import memory_of, refuse_acting, run_shared_prefix

if TYPE_CHECKING:
    from transformer_lens import FactoredMatrix


def meta_gradient(
    model: Any,
    demos: Sequence[Demo | tuple[str, str]] | PromptLike,
    *,
    template: Template | None = None,
    instruction: str | None = None,
    prepend_bos: bool | None = None,
) -> MetaGradient:
    """The demonstrations' keys and values in every head, from one forward pass over S and D.

    They do not depend on the query: in a causal model D is the same whatever comes after
    (arXiv:2212.10559, and docs/theory.md, sections 2 and 5).

    Args:
        model: `HookedTransformer`, `TransformerBridge` or a wrapped model. It is not modified.
        demos: demonstrations, or a prompt (in the forms `decompose` takes) whose demonstrations, template and
            instruction are taken (its query is not).
        template: the text around inputs and labels.
        instruction: text before the demonstrations.
        prepend_bos: put BOS first; None for the model's default.

    Raises:
        PromptError: no demonstrations, or text that the tokenizer does not know.
        ContextWindowError: the demonstrations do not fit the context window.
    """
    wrapped = wrap(model)
    refuse_acting(wrapped, "meta_gradient")
    if isinstance(demos, str | ICLPrompt | Mapping):
        if template is not None or instruction is not None:
            raise OptionError("the prompt brings its own template and instruction: do not give them again.")
        prompt = as_prompt(demos)
    else:
        if not demos:
            raise PromptError("no demonstrations: a meta-gradient needs at least one.")
        # Any query will do: nothing after D is run.
        query = demos[0].input if isinstance(demos[0], Demo) else demos[0][0]
        prompt = ICLPrompt(demos, query, Template() if template is None else template, instruction)
    tokens = DemoTokens.tokenize(prompt, wrapped, prepend_bos=prepend_bos)
    prefix = run_shared_prefix(wrapped, tokens.ids)
    assert prefix is not None  # there is at least one demonstration
    k, v, host_k = (_stack(layers) for layers in (prefix.k, prefix.v, prefix.host_k))
    return MetaGradient(
        model=wrapped.info,
        template=prompt.template,
        instruction=prompt.instruction,
        demos=prompt.demos,
        tokens=tokens,
        k=k,
        v=v,
        host_k=None if prefix.host_k is prefix.k else host_k,
        heads=head_mask(wrapped.info),
        chosen=tuple(range(len(prompt.demos))),
        fingerprint=fingerprint_of(wrapped),
    )


@dataclass(frozen=True, eq=False, repr=False)
class MetaGradient(Stored, Staged):
    """What the demonstrations put into the heads: their keys and values, factored, to be merged with a zero-shot run.

    A value: `select`, `without_demo` and ``0.5 * mg`` give new ones, and ``with intervene(model, mg):`` applies it.

    Attributes:
        model: sizes and parametrisation of the model it belongs to.
        template, instruction, demos: the text it was made from.
        tokens: ids of S and D and the demonstrations' spans.
        k, v: keys (as the scores see them) and values of S and D.
        host_k: keys as the host's cache holds them, where that is something else.
        heads: which heads it acts on.
        chosen: which demonstrations are in it.
        strength: factor on the change of z it makes.
        fingerprint: of every weight of the model, so that it is not applied to one with other weights.
        provenance: versions and time.
    """

    kind: ClassVar[str] = "meta-gradient"

    model: ModelInfo
    template: Template
    instruction: str | None
    demos: tuple[Demo, ...]
    tokens: DemoTokens
    k: Float[Tensor, "layer src kv_head d_head"]
    v: Float[Tensor, "layer src kv_head d_head"]
    host_k: Float[Tensor, "layer src kv_head d_head"] | None
    heads: Bool[Tensor, "layer head"]
    chosen: tuple[int, ...]
    fingerprint: Fingerprint
    strength: float = 1.0
    provenance: dict[str, Any] = field(default_factory=provenance)

    # ---- algebra ------------------------------------------------------------------------------------------------

    def select(
        self, heads: Heads = None, *, layers: Sequence[int] | None = None, demos: Sequence[int] | None = None
    ) -> MetaGradient:
        """Only these heads, layers and demonstrations, out of those that are in it.

        Demonstrations are counted as in the prompt. What is left out is masked: later ones keep what they read from it.

        Args:
            heads: heads such as ``"L3H7"`` or ``(3, 7)``; None for all.
            layers: layers, counted from 0; None for all.
            demos: demonstrations, counted from 0; None for all.

        Raises:
            HeadError, OptionError: unknown heads, layers or demonstrations, or an empty selection.
        """
        mask = head_mask(self.model, heads, layers) & self.heads
        if not bool(mask.any()):
            mask = head_mask(self.model, ())
        chosen = self.chosen
        if demos is not None:
            wanted = self.tokens.check_demos(demos)
            chosen = tuple(demo for demo in wanted if demo in self.chosen)
            self.tokens.check_demos(chosen)
        return dataclasses.replace(self, heads=mask, chosen=chosen)

    def without_demo(self, index: int) -> MetaGradient:
        """Leave one demonstration out by masking its tokens; make a new meta-gradient to re-run without it.

        Args:
            index: the demonstration, counted from 0.
        """
        self.tokens.check_demos([index])
        return self.select(demos=[demo for demo in self.chosen if demo != index])

    def scaled(self, strength: float) -> MetaGradient:
        """The same direction, `strength` times as far: ``z + strength (z_applied - z)``.

        Args:
            strength: factor on the change of z.
        """
        return dataclasses.replace(self, strength=self.strength * float(strength))

    def __mul__(self, factor: float) -> MetaGradient:
        return self.scaled(factor)

    __rmul__ = __mul__

    def delta_w(self, layer: int, head: int) -> FactoredMatrix:
        """``dW_ICL = sum_{i in D} v_i (x) k_i`` of one head, factored; ``.AB @ q``.

        Args:
            layer: counted from 0.
            head: counted from 0.
        """
        HeadRef(layer, head).check(self.model.n_layers, self.model.n_heads)
        inside = self.tokens.mask(self.chosen, self.tokens.stop).to(self.k.device)
        of_layer = memory_of(self.k[layer], self.v[layer], inside)
        return of_layer[head // (self.model.n_heads // self.model.n_kv_heads)]

    # ---- application --------------------------------------------------------------------------------------------

    def apply(
        self,
        form: str = "softmax",
        *,
        heads: Heads = None,
        strength: float = 1.0,
        scale: float | None = None,
    ) -> AppliedMetaGradient:
        """The intervention that gives a zero-shot run this meta-gradient.

        Args:
            form: ``"softmax"``, the exact merge: with all heads at strength 1 the zero-shot run computes what the
                in-context run computes; ``"linear"`` adds ``scale dW_ICL q`` (arXiv:2212.10559, eq. 10).
            heads: only these heads.
            strength: factor on the change of z.
            scale: of the linear form; by default the layer's score scale over the number of demonstration tokens.
        """
        selected = self.select(heads).scaled(strength)
        return AppliedMetaGradient(meta_gradient=selected, form=form, scale=scale)

    def change(self, model: LensModel) -> Change:
        """The exact merge; see `apply`.

        Args:
            model: a wrapped model.
        """
        return self.apply().change(model)

    @property
    def prefix(self) -> Prefix:
        """S and D as a shared prefix: run queries behind it for the whole in-context run (all heads, strength 1)."""
        k, v = tuple(self.k), tuple(self.v)
        return Prefix(k=k, v=v, host_k=k if self.host_k is None else tuple(self.host_k))

    def run(self, model: Any, queries: Any, **options: Any) -> Tensor | None:
        """Logits of queries (ids without S and D, ``[batch, pos]``) behind the host's own cache, on any model.

        The whole in-context run, whatever is selected; takes the options of `LensModel.run`.

        Args:
            model: `HookedTransformer`, `TransformerBridge` or a wrapped model.
            queries: token ids of the queries.
            options: those of `LensModel.run`.
        """
        wrapped = wrap(model)
        self.check_model(wrapped)
        wrapped.check_window(self.tokens.stop + queries.shape[1], "the queries with the demonstrations")
        return wrapped.run(queries, prefix=self.prefix, **options)

    def prompt(self, query: str, **options: Any) -> ICLPrompt:
        """The in-context prompt that asks `query` behind these demonstrations.

        Args:
            query: the query's text.
            options: further arguments of `ICLPrompt`: label, candidates.
        """
        return ICLPrompt(self.demos, query, self.template, self.instruction, **options)

    def check_prompt(self, prompt: ICLPrompt) -> None:
        """Raise `PromptError` unless the prompt has this template, instruction and demonstrations.

        Args:
            prompt: an in-context prompt.
        """
        for what in ("template", "instruction", "demos"):
            mine, theirs = getattr(self, what), getattr(prompt, what)
            if mine != theirs:
                raise PromptError(
                    f"the meta-gradient was made with {what} {mine!r}, the prompt has {theirs!r}: make prompts with "
                    "MetaGradient.prompt(query), or a new meta-gradient."
                )

    def check_model(self, model: LensModel) -> None:
        """Raise `ModelMismatchError` unless it was made with this model, in this dtype.

        Args:
            model: a wrapped model.
        """
        what, again = "this meta-gradient was made with", "meta_gradient(model, ...)"
        check_made_for(model, self.model, self.fingerprint, what=what, again=again)

    # ---- storing and showing ------------------------------------------------------------------------------------

    @classmethod
    def _refusal(cls, body: Mapping[str, Any]) -> str | None:
        """Files of 0.1 hold a fingerprint of two numbers a layer."""
        if not any(isinstance(entry, float) for entry in body.get("fingerprint", [])):
            return None
        return (
            "was saved by metaopt-lens 0.1, whose fingerprint covers the output projections only: whether keys and "
            "values are this model's cannot be told. Make a new one with meta_gradient(model, ...)."
        )

    def __repr__(self) -> str:
        n_heads, n_all = int(self.heads.sum()), self.heads.numel()
        heads = "all heads" if n_heads == n_all else f"{n_heads} of {n_all} heads"
        strength = "" if self.strength == 1 else f", strength {self.strength:g}"
        return (
            f"MetaGradient of {self.model.name}: {len(self.chosen)} of {len(self.demos)} demonstrations in "
            f"{self.tokens.n_demo_tokens} tokens, {heads}{strength}"
        )


def _stack(layers: Sequence[Tensor]) -> Tensor:
    return torch.stack([layer.detach().to(layers[0].device) for layer in layers])
