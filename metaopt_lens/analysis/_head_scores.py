"""Head scores from other theories of in-context learning (docs/theory.md, section 11)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens._errors import PromptError
from metaopt_lens.analysis._controls import shuffle_labels
from metaopt_lens.decomposition import Decomposition, LogitContributions, written
from metaopt_lens.models import AttentionCall, LensModel, Prefix, Readout
from metaopt_lens.prompts import ICLPrompt, tokenize_label
from metaopt_lens.runs import candidate_labels, run_shared_prefix, tokenize_for


def induction_score(pattern: Float[Tensor, "*item dst src"], *, period: int, start: int = 0) -> Float[Tensor, "*item"]:
    """On tokens that repeat after `period`: mean attention to the token after the previous occurrence.

    Args:
        pattern: attention of a sequence of `start` tokens, then ``period`` tokens twice.
        period: how many tokens are repeated.
        start: how many stand before them (BOS).
    """
    dst = torch.arange(start + period, start + 2 * period)
    return pattern[..., dst, dst - period + 1].mean(-1)


def previous_token_score(pattern: Float[Tensor, "*item dst src"], *, start: int = 0) -> Float[Tensor, "*item"]:
    """Mean attention to the token before.

    Args:
        pattern: attention of a sequence.
        start: how many tokens stand first and are not asked (BOS).
    """
    dst = torch.arange(start + 1, pattern.shape[-2])
    return pattern[..., dst, dst - 1].mean(-1)


def attention_scores_of_heads(
    model: LensModel, *, period: int = 40, n_sequences: int = 4, seed: int = 0
) -> tuple[Float[Tensor, "layer head"], Float[Tensor, "layer head"]]:
    """Induction and previous-token score of every head, on repeated random tokens.

    Args:
        model: a wrapped model.
        period: how many tokens are repeated; fewer where the context window is shorter.
        n_sequences: how many sequences are averaged.
        seed: of the tokens.

    Returns:
        Induction score and previous-token score.
    """
    period = min(period, (model.info.n_ctx - 1) // 2)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.info.d_vocab, (n_sequences, period), generator=generator)
    bos = getattr(model.tokenizer, "bos_token_id", None)
    start = 0 if bos is None else 1
    first = torch.full((n_sequences, start), 0 if bos is None else int(bos))
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(call: AttentionCall) -> None:
        pattern = call.pattern.detach().float()
        scores = (
            induction_score(pattern, period=period, start=start).mean(0),
            previous_token_score(pattern, start=start).mean(0),
        )
        found[call.layer] = (scores[0].cpu(), scores[1].cpu())

    layers = range(model.info.n_layers)
    hooks = [hook for layer in layers for hook in model.attention_hooks(layer, keep)]
    model.run(torch.cat([first, tokens, tokens], dim=1), hooks=hooks, stop_after_attention=True)
    induction, previous = zip(*(found[layer] for layer in layers), strict=True)
    return torch.stack(induction), torch.stack(previous)


def function_vector_scores(
    model: LensModel,
    prompts: Sequence[ICLPrompt],
    mean_z: Float[Tensor, "layer head d_head"],
    *,
    prepend_bos: bool | None = None,
    seed: int = 0,
) -> Float[Tensor, "query layer head"]:
    """Function-vector score of every head (arXiv:2310.15213): what its mean output does where labels are shuffled.

    The gain in the probability of the right answer's first token when a head's output at the last token of the prompt
    with shuffled labels is replaced by its mean over in-context prompts.

    Args:
        model: a wrapped model.
        prompts: with their labels.
        mean_z: of every head at the last token, over in-context prompts of the task.
        prepend_bos: put BOS first; None for the model's default.
        seed: of the shuffles.

    Raises:
        PromptError: a prompt without a label, or whose demonstrations all have the same one.
    """
    rows = []
    for number, prompt in enumerate(prompts):
        if prompt.label is None:
            raise PromptError(
                f"query {prompt.query!r} has no label, and a function-vector score asks for the right answer: "
                "ICLPrompt(..., label=...)."
            )
        tokens = tokenize_for(model, shuffle_labels(prompt, seed=seed + number), prepend_bos=prepend_bos)
        prefix = run_shared_prefix(model, tokens.ids[: tokens.query.start])
        query = torch.tensor(tokens.ids[tokens.query.start :])
        answer = tokenize_label(prompt.label, prompt.template, model.tokenizer)[0]

        def probabilities(
            layer: int, heads: Sequence[int], query: Tensor = query, prefix: Prefix | None = prefix
        ) -> Tensor:
            """Of all tokens, with each of these heads replaced; one more row for none."""

            def replace(call: AttentionCall) -> Tensor:
                z = call.z.clone()
                for row, head in enumerate(heads):
                    z[row, -1, head] = mean_z[layer, head].to(z)
                return z

            n_rows = len(heads) + 1
            hooks = model.attention_hooks(layer, replace, prefix=prefix)
            last = torch.full((n_rows, 1), len(query) - 1)
            logits = model.run(query.expand(n_rows, -1), hooks=hooks, prefix=prefix, read=Readout(last))
            assert logits is not None
            return logits[:, 0].double().softmax(-1).cpu()

        gains = []
        for layer in range(model.info.n_layers):
            right = probabilities(layer, range(model.info.n_heads))[:, answer]
            gains.append(right[:-1] - right[-1])
        rows.append(torch.stack(gains))
    return torch.stack(rows)


def task_scores(
    item: Decomposition, said: LogitContributions
) -> tuple[Float[Tensor, "layer head"], Float[Tensor, "layer head"]]:
    """Task recognition and task learning (arXiv:2509.24164) of every head at the last token.

    Recognition: the norm of what the head writes in the label space, the span of the labels' effective directions.
    Learning: its component along the right label's direction minus the mean of the others'.

    Args:
        item: a prompt with a label.
        said: its contributions, for the right label against the others.
    """
    model, last = item.required_source("scores"), item.at_last_position()
    words = candidate_labels(item.prompt)
    ids = sorted({tokenize_label(word, item.prompt.template, model.tokenizer)[0] for word in words})
    norm, w_u = model.head.fixed_norm, model.head.w_u.detach()
    directions = w_u[:, ids].mT.float()
    directions = directions if norm is None else norm.pulled_back(directions, torch.ones_like(directions[:, 0]))
    basis = torch.linalg.qr(directions.detach().mT).Q  # d_model label
    token, rivals = said.token_ids[0]
    index = {number: place for place, number in enumerate(ids)}
    contrast = directions[index[token]] - directions[[index[rival] for rival in rivals]].mean(0)
    recognition, learning = [], []
    for layer in range(model.info.n_layers):
        z = last.z[layer].detach()
        outs = torch.stack(
            [written(model, last.runs.icl, layer, [head], z[head][None]) for head in range(model.info.n_heads)]
        ).to(basis)
        recognition.append((outs @ basis).norm(dim=-1))
        learning.append(outs @ contrast.detach() / contrast.detach().norm())
    return torch.stack(recognition), torch.stack(learning)
