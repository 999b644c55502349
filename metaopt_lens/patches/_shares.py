"""What a patch comes from: what heads, demonstrations and tokens have in the change of the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens._codec import Stored
from metaopt_lens._errors import UnsupportedModelError
from metaopt_lens._storage import provenance
from metaopt_lens._types import TokenSpan
from metaopt_lens.models import AttentionCall, FixedNorm, Hook, ModelInfo, wrap
from metaopt_lens.patches._compile import Compiler
from metaopt_lens.patches._weight_patch import WeightPatch
from metaopt_lens.prompts import PromptLike, TokenizedPrompt

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class ContextShares(Stored):
    """What heads, demonstrations and tokens have in ``u``, which the output matrix of a patch adds.

    ``u = sum_h sum_{i in D} a_hi (v_hi - z_without,h) W_O,h`` (docs/theory.md, section 9), and the change of the output
    matrix is linear in u, so that these are shares of it too.

    Attributes:
        model: sizes and parametrisation of the model.
        tokens: the in-context prompt.
        norm_scale_fixed: whether a norm follows attention. u is then a difference of two normalised vectors and no sum
            over heads; the shares are those with the norm's scale held at what it is in context.
        u: what the demonstrations add to the residual stream, through attention.
        by_head: each head's share.
        by_demo: each demonstration's.
        by_token: component along u, relative to u, of what each head reads from each token of the demonstrations; they
            sum to 1 where no norm's scale is fixed.
        provenance: versions and time.
    """

    kind: ClassVar[str] = "context shares"

    model: ModelInfo
    tokens: TokenizedPrompt
    norm_scale_fixed: bool
    u: Float[Tensor, "layer pos d_model"]
    by_head: Float[Tensor, "layer pos head d_model"]
    by_demo: Float[Tensor, "layer pos demo d_model"]
    by_token: Float[Tensor, "layer pos head demo_token"]
    provenance: dict[str, Any] = field(default_factory=provenance)

    @property
    def remainder(self) -> Float[Tensor, "layer pos d_model"]:
        """u less the sum of the shares: rounding, or what the change of a norm's scale makes."""
        return self.u - self.by_head.sum(2)

    @property
    def of_demos(self) -> Float[Tensor, "layer pos head demo"]:
        """`by_token`, summed over each demonstration's tokens."""
        return torch.stack([self.by_token[..., span].sum(-1) for span in _spans(self.tokens)], dim=-1)

    def to_frame(self) -> pd.DataFrame:
        """One row for every layer, position, head and demonstration: its ``share``, see `by_token`."""
        import pandas as pd

        n_layers, n_pos, n_heads, n_demos = self.of_demos.shape
        index = pd.MultiIndex.from_product(
            [range(n_layers), [self.tokens.query.start + i for i in range(n_pos)], range(n_heads), range(n_demos)],
            names=["layer", "position", "head", "demo"],
        )
        return pd.DataFrame({"share": self.of_demos.flatten().cpu().numpy()}, index=index).reset_index()

    def __repr__(self) -> str:
        kind = ", with the scale of the norm behind attention fixed" if self.norm_scale_fixed else ""
        return (
            f"ContextShares of {self.model.name}: {self.by_head.shape[2]} heads, {len(self.tokens.demos)} "
            f"demonstrations{kind}"
        )


@dataclass(frozen=True, eq=False)
class LeftOut:
    """A patch without one demonstration's share, against the patch of the run in which the query cannot see it.

    Attributes:
        without_share: u less each demonstration's share.
        masked: u of the run in which that demonstration is hidden from every token of the query.
    """

    without_share: Float[Tensor, "demo layer pos d_model"]
    masked: Float[Tensor, "demo layer pos d_model"]

    @property
    def difference(self) -> Float[Tensor, "demo layer pos"]:
        """Norm of the difference, relative to the norm of u in the masked run.

        Of first order in the attention on the demonstrations: leaving one out also gives the others more of it.
        """
        found: Tensor = (self.without_share - self.masked).norm(dim=-1) / self.masked.norm(dim=-1)
        return found


def context_shares(model: Any, patch: WeightPatch) -> ContextShares:
    """The shares of heads, demonstrations and tokens in a patch, from one more in-context pass.

    Args:
        model: the model it was compiled for, or that model wrapped.
        patch: made by `compile_context`.

    Returns:
        Shares for every layer and token of the patch.

    Raises:
        ModelMismatchError: the patch is another model's.
        UnsupportedModelError: the attention's output cannot be read where a norm follows it.
    """
    wrapped = wrap(model)
    patch.check_model(wrapped)
    compiler = Compiler.behind(wrapped, patch.tokens, getattr(torch, patch.precision))
    demos = patch.tokens.demonstrations
    reads: list[Tensor] = [patch.u] * wrapped.info.n_layers
    factors: dict[int, Tensor] = {}

    def read(call: AttentionCall) -> None:
        reads[call.layer] = _read(call, demos, patch.u)

    def keep(layer: int, norm: FixedNorm) -> Callable[[Tensor], None]:
        def store(tensor: Tensor) -> None:
            attention = tensor[0].to(patch.u)
            gain = torch.ones_like(attention) if norm.gain is None else norm.gain.detach().to(attention)
            factors[layer] = gain / norm.scale(attention)[:, None]

        return store

    hooks: list[Hook] = []
    for layer in range(wrapped.info.n_layers):
        hooks += wrapped.attention_hooks(layer, read, prefix=compiler.prefix)
        norm = wrapped.norm_after_attention(layer)
        if norm is not None:
            if norm.kind == "LN":
                raise UnsupportedModelError(
                    f"shares of heads are not defined for {wrapped.info.name}: its attention output goes through a "
                    "LayerNorm, and only norms without mean are handled."
                )
            hooks.append((wrapped.hook_name("attn_out", layer), keep(layer, norm)))
    compiler.run_queries(patch.query_ids, hooks)
    by_head, by_demo, by_token = [], [], []
    for layer, (u, read_there) in enumerate(zip(patch.u, reads, strict=True)):
        w_o = wrapped.w_o(layer).detach().to(u)
        factor = factors.get(layer, torch.ones_like(u))
        of_demos = torch.stack([read_there[:, :, span].sum(2) for span in _spans(patch.tokens)], dim=2)
        by_head.append(torch.einsum("thd,hdm->thm", read_there.sum(2), w_o) * factor[:, None])
        by_demo.append(torch.einsum("thjd,hdm->tjm", of_demos, w_o) * factor[:, None])
        along = torch.einsum("thid,thd->thi", read_there, torch.einsum("hdm,tm->thd", w_o, u * factor))
        by_token.append(along / u.square().sum(-1)[:, None, None])
    return ContextShares(
        model=wrapped.info,
        tokens=patch.tokens,
        norm_scale_fixed=bool(factors),
        u=patch.u,
        by_head=torch.stack(by_head),
        by_demo=torch.stack(by_demo),
        by_token=torch.stack(by_token),
    )


def leave_one_out(model: Any, prompt: PromptLike, shares: ContextShares) -> LeftOut:
    """Compile the context again with each demonstration hidden from the query, next to the shares.

    Args:
        model: the model of the shares, or that model wrapped.
        prompt: the prompt they were made for.
        shares: made by `context_shares`.

    Returns:
        Both, and how far they are apart.
    """
    wrapped = wrap(model)
    compiler = Compiler.of(wrapped, prompt, prepend_bos=shares.tokens.bos is not None, precision=None)
    masked = [compiler.compile(shares.tokens, hidden=demo).u for demo in shares.tokens.demos]
    return LeftOut(without_share=shares.u - shares.by_demo.permute(2, 0, 1, 3), masked=torch.stack(masked))


def _spans(tokens: TokenizedPrompt) -> list[slice]:
    """Each demonstration's tokens, counted from the first demonstration's first."""
    start = tokens.demonstrations.start
    return [slice(demo.start - start, demo.stop - start) for demo in tokens.demos]


def _read(call: AttentionCall, demos: TokenSpan, like: Tensor) -> Float[Tensor, "pos head demo_token d_head"]:
    """``a_hi (v_hi - z_without,h)``: what each head reads from each token of the demonstrations."""
    without = call.attend(call.inside(demos))[0][0].to(like)  # pos head d_head
    pattern = call.pattern[0][..., demos.slice].to(like)  # head pos demo_token
    group = call.q.shape[2] // call.v.shape[2]
    v = call.v[0, demos.slice].to(like).repeat_interleave(group, dim=1)  # demo_token head d_head
    return torch.einsum("hti,thid->thid", pattern, v.transpose(0, 1)[None] - without[:, :, None])
