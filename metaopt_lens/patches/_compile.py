"""Compile a context into weights: one in-context pass, and one patched pass that makes the changes as it goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens._errors import OptionError, UndefinedMetricError
from metaopt_lens._types import TokenSpan
from metaopt_lens.dual import at_least_float32, right_factor
from metaopt_lens.interventions import DemoTokens, pipeline
from metaopt_lens.models import (
    AttentionCall,
    Fingerprint,
    Hook,
    LensModel,
    Prefix,
    Readout,
    dtype_name,
    fingerprint_of,
    wrap,
)
from metaopt_lens.patches._block_changes import TokenChanges
from metaopt_lens.patches._changes import Rows, change_hooks, rows_of
from metaopt_lens.patches._placing import PatchedRows
from metaopt_lens.patches._site import PatchSite, patch_site
from metaopt_lens.patches._weight_patch import ExpertChanges, WeightPatch
from metaopt_lens.prompts import PromptLike, TokenizedPrompt, as_prompt
from metaopt_lens.runs import refuse_acting, run_shared_prefix, tokenize_for

PRECISIONS = ("model", "float32", "float64")


def compile_context(
    model: Any, prompt: PromptLike, *, prepend_bos: bool | None = None, precision: str | None = None
) -> WeightPatch:
    """Changes of the model's own weights that do at every token of the query what the demonstrations do.

    The in-context prompt is run; then the zero-shot prompt with its tokens at their in-context positions, each block
    patched as the pass reaches it (arXiv:2511.17864; docs/theory.md, section 9).

    Args:
        model: `HookedTransformer`, `TransformerBridge` or a wrapped model. It is not modified. Weight updates that are
            on stay, and the patch is then that of the updated model.
        prompt: in the forms `decompose` takes, with at least one demonstration.
        prepend_bos: put BOS first; None for the model's default.
        precision: of the factors and of their products: ``"float32"``, ``"float64"``, or ``"model"`` for the model's
            own dtype; None for the model's own, float32 at least.

    Returns:
        The patch, to be applied with `intervene` to the zero-shot prompt.

    Raises:
        OptionError: an unknown precision, or a meta-gradient or knock-out that is on.
        PromptError: no demonstrations, or text that the tokenizer does not know.
        ContextWindowError: the prompt is longer than the context window.
        UnsupportedModelError: a block that cannot be patched; names why.
        UndefinedMetricError: an input that vanishes, or a normalised output with a coordinate of 0, so that no change
            exists; names layer and position.
    """
    wrapped = wrap(model)
    compiler = Compiler.of(wrapped, prompt, prepend_bos=prepend_bos, precision=precision)
    return compiler.compile(compiler.tokens)


def generate_without_prompt(
    model: Any,
    prompt: PromptLike,
    n_tokens: int,
    *,
    prepend_bos: bool | None = None,
    precision: str | None = None,
) -> WeightPatch:
    """Greedy text from the zero-shot prompt plus patches: the patch extends itself token by token.

    Every generated token needs changes of its own, for which it is run behind the demonstrations too.

    Args:
        model: as for `compile_context`.
        prompt: as for `compile_context`.
        n_tokens: how many to generate; 1 or more.
        prepend_bos: put BOS first; None for the model's default.
        precision: see `compile_context`.

    Returns:
        The patch of the query and of all generated tokens but the last; the tokens are its `generated`.
    """
    if n_tokens < 1:
        raise OptionError(f"n_tokens must be 1 or more, got {n_tokens}.")
    wrapped = wrap(model)
    compiler = Compiler.of(wrapped, prompt, prepend_bos=prepend_bos, precision=precision)
    wrapped.check_window(compiler.tokens.n_tokens + n_tokens, "the prompt with its continuation")
    patch = compiler.compile(compiler.tokens)
    for _ in range(n_tokens - 1):
        patch = compiler.compile(compiler.tokens, patch.generated)
    return patch


@dataclass(frozen=True, eq=False)
class Compiler:
    """What all queries behind the same demonstrations share.

    Attributes:
        model: the wrapped model.
        tokens: the prompt it was made for.
        prefix: S and the demonstrations, run once.
        sites: where each block is patched.
        dtype: of the factors.
    """

    model: LensModel
    tokens: TokenizedPrompt
    prefix: Prefix
    sites: tuple[PatchSite, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, model: LensModel, prompt: PromptLike, *, prepend_bos: bool | None, precision: str | None) -> Compiler:
        """Check everything, then run S and the demonstrations."""
        if precision is not None and precision not in PRECISIONS:
            raise OptionError(
                f"precision must be one of {', '.join(map(repr, PRECISIONS))} or None, got {precision!r}."
            )
        tokens = tokenize_for(model, as_prompt(prompt), prepend_bos=prepend_bos, require_demos=True)
        return cls.behind(model, tokens, _dtype(model, precision))

    @classmethod
    def behind(cls, model: LensModel, tokens: TokenizedPrompt, dtype: torch.dtype) -> Compiler:
        """Run S and the demonstrations of a prompt."""
        refuse_acting(model, "compile_context")
        sites = tuple(patch_site(model, layer) for layer in range(model.info.n_layers))
        model.check_movable()
        prefix = run_shared_prefix(model, tokens.ids[: tokens.query.start])
        assert prefix is not None  # there is at least one demonstration
        return cls(model, tokens, prefix, sites, dtype)

    def compile(
        self, tokens: TokenizedPrompt, continuation: Sequence[int] = (), *, hidden: TokenSpan | None = None
    ) -> WeightPatch:
        """The patch of a query behind the shared demonstrations.

        Args:
            tokens: the prompt.
            continuation: ids of further tokens behind it.
            hidden: what no token of the query sees in context.
        """
        queries = (*tokens.ids[tokens.query.start :], *continuation)
        targets = self._in_context(queries, hidden)
        demos = DemoTokens.of(tokens)
        placing = PatchedRows(self.model, demos, queries)
        hooks: list[Hook] = []
        compiling = []
        for site, target in zip(self.sites, targets, strict=True):
            own = _Compiling(site, target, TokenChanges(placing, experts=site.experts), demos, self.dtype)
            compiling.append(own)
            hooks += [(site.before, own.keep_before), *change_hooks(site, own, self.dtype)]
        ids = torch.tensor([[*tokens.ids[: demos.start], *queries]])
        hooks = pipeline(self.model, [placing.change(hooks)])
        logits = self.model.run(ids, hooks=hooks, read=Readout(torch.tensor([[ids.shape[1] - 1]])))
        assert logits is not None
        return self._patch(tokens, tuple(continuation), int(logits.argmax()), compiling)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Of every weight of the model."""
        return fingerprint_of(self.model)

    @cached_property
    def weight_norms(self) -> dict[str, Float[Tensor, " layer"]]:
        """Frobenius norms of the matrices that are changed."""
        names, device = self.sites[0].weights, self.prefix.k[0].device
        return {
            name: torch.stack([site.weights[name].detach().float().norm().to(device) for site in self.sites])
            for name in names
        }

    def run_queries(self, queries: Sequence[int], hooks: Sequence[Hook]) -> None:
        """One in-context pass behind the demonstrations.

        Args:
            queries: ids of the tokens behind them.
            hooks: that read it.
        """
        read = Readout(torch.tensor([[len(queries) - 1]]), torch.tensor([0]))
        self.model.run(torch.tensor([[*queries]]), hooks=hooks, prefix=self.prefix, read=read)

    def _in_context(self, queries: Sequence[int], hidden: TokenSpan | None) -> list[dict[str, Tensor]]:
        """Per layer, at every query token behind the demonstrations, what the patched run is to reproduce."""
        seen: list[dict[str, Tensor]] = [{} for _ in self.sites]

        def keep(layer: int, key: str) -> Callable[[Tensor], None]:
            def store(tensor: Tensor) -> None:
                seen[layer][key] = rows_of(tensor)

            return store

        def hide(call: AttentionCall) -> Tensor | None:
            return None if hidden is None else call.attend(call.inside(hidden))[0]

        hooks: list[Hook] = []
        for site in self.sites:
            if hidden is not None:
                hooks += self.model.attention_hooks(site.layer, hide, prefix=self.prefix)
            hooks.append((site.before, keep(site.layer, "before")))
            hooks += [(name, keep(site.layer, matrix)) for matrix, name in site.products.items()]
            if site.experts is not None:
                hooks.append((site.experts.input_name, keep(site.layer, "z")))
        self.run_queries(queries, hooks)
        return seen

    def _patch(
        self, tokens: TokenizedPrompt, continuation: tuple[int, ...], next_token: int, found: Sequence[_Compiling]
    ) -> WeightPatch:
        device = found[0].u.device

        def stack(tensors: Sequence[Tensor]) -> Tensor:
            return torch.stack([t.to(device) for t in tensors])

        def stacked(factors: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
            return {name: stack([layer[name] for layer in factors]) for name in factors[0]}

        others = stacked([f.changes.other for f in found])
        experts = None
        if found[0].site.experts is not None:
            active, left_in = (stack([f.experts[name] for f in found]) for name in ("active", "left_in"))
            experts = ExpertChanges(active=active, left_in=left_in, chosen=others["chosen"], shift=others["shift"])
        return WeightPatch(
            model=self.model.info,
            tokens=tokens,
            continuation=continuation,
            next_token=next_token,
            precision=dtype_name(self.dtype),
            left=stacked([f.changes.left for f in found]),
            right=stacked([f.changes.right for f in found]),
            u=stack([f.u for f in found]),
            scale=others.get("scale"),
            smallest=stack([f.smallest for f in found]) if "scale" in others else None,
            experts=experts,
            weight_norms=self.weight_norms,
            fingerprint=self.fingerprint,
        )


class _Compiling:
    """One block's changes in the pass that makes them; see `Changes`. The query's rows follow those of S."""

    def __init__(
        self, site: PatchSite, target: dict[str, Tensor], changes: TokenChanges, demos: DemoTokens, dtype: torch.dtype
    ) -> None:
        self.site, self.changes = site, changes
        self.experts: dict[str, Tensor] = {}
        self._target, self._demos, self._dtype = target, demos, dtype

    def keep_before(self, tensor: Tensor) -> None:
        """u, from what the MLP's block adds to.

        Args:
            tensor: the same in the patched run as what was kept of the in-context run.
        """
        self.u = self._difference("before", rows_of(tensor))

    def product(self, matrix: str, x: Rows, product: Rows) -> Rows:
        if "in" not in self.changes.right:
            self._keep_right("in", self._own(x), "the MLP's input")
        self.changes.left[matrix] = self._difference(matrix, product)
        return self.changes.product(matrix, x, product)

    def output(self, hidden: Rows, out: Rows) -> Rows:
        self._keep_right("out", self._own(hidden), "what the output matrix is applied to")
        self.changes.left[self.site.out_matrix] = self.u
        return self.changes.output(hidden, out)

    def scaled(self, normalized: Rows, out: Rows) -> Rows:
        y = self._own(normalized)
        self.smallest = y.abs().amin(-1)
        if not bool((self.smallest > 0).all()):
            self._refuse(self.smallest > 0, "the MLP's normalised output has a coordinate that is 0")
        self.changes.other["scale"] = self.u / y
        return self.changes.scaled(normalized, out)

    def experts_input(self, x: Rows) -> Rows:
        self._keep_right("in", self._own(x), "the experts' input")
        self.changes.other["shift"] = self._difference("z", x)
        return self.changes.experts_input(x)

    def experts_output(self, x: Rows, out: Rows) -> Rows:
        experts, left, shift = self.site.experts, self.changes.left, self.changes.other["shift"]
        assert experts is not None
        own = x[self._demos.start :]
        weights, active = experts.route(own)
        best = weights.argmax(-1, keepdim=True)
        chosen = active.gather(1, best)[:, 0]
        hidden = experts.hidden(own, chosen).to(self._dtype)
        self._keep_right("out", hidden, "what an expert's output matrix is applied to")
        self.changes.other["chosen"] = chosen
        left["router"] = shift @ experts.w_router.detach().to(shift).mT
        left["expert_out"] = self.u / weights.gather(1, best).to(self._dtype)
        products = [
            torch.stack([experts.w_in(int(expert)).detach().to(shift) @ row for expert in used])
            for used, row in zip(active, shift, strict=True)
        ]
        self.experts |= {"active": active, "left_in": torch.stack(products)}
        return self.changes.experts_output(x, out)

    def _own(self, rows: Tensor) -> Tensor:
        return rows[self._demos.start :].to(self._dtype)

    def _difference(self, key: str, rows: Tensor) -> Tensor:
        return self._target[key].to(self._dtype) - self._own(rows)

    def _keep_right(self, side: str, x: Tensor, what: str) -> None:
        there = x.square().sum(-1) > 0
        if not bool(there.all()):
            self._refuse(there, f"{what} is 0 there, and no matrix maps 0 to anything else")
        self.changes.right[side] = right_factor(x)

    def _refuse(self, fine: Tensor, why: str) -> None:
        row = int((~fine).nonzero()[0])
        raise UndefinedMetricError(
            f"there is no weight change that does what the context does in layer {self.site.layer} at position "
            f"{self._demos.stop + row}: {why}."
        )


def _dtype(model: LensModel, precision: str | None) -> torch.dtype:
    own: torch.dtype = getattr(torch, model.info.dtype)
    if precision == "model":
        return own
    return at_least_float32(torch.empty(0, dtype=own)).dtype if precision is None else getattr(torch, precision)
