"""Prompts as a model reads them: the one place that decides whether BOS stands first."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from metaopt_lens._errors import PromptError
from metaopt_lens.models import LensModel
from metaopt_lens.prompts._encoder import PieceEncoder
from metaopt_lens.prompts._prompt import ICLPrompt
from metaopt_lens.prompts._tokenize import tokenize_with
from metaopt_lens.prompts._tokenized import TokenizedPrompt


def tokenize_for(
    model: LensModel,
    prompt: ICLPrompt,
    *,
    prepend_bos: bool | None = None,
    require_demos: bool = False,
    check_window: bool = True,
) -> TokenizedPrompt:
    """Token ids of a prompt for this model; `bos_note` says whether BOS stands first and who decided it.

    Args:
        model: a wrapped model with a tokenizer.
        prompt: the prompt.
        prepend_bos: put BOS first; None for the host's default (``cfg.default_prepend_bos``, if the tokenizer has a
            BOS), or what its tokenizer does by itself where the host has no default.
        require_demos: refuse a prompt without demonstrations.
        check_window: refuse a prompt that is longer than the context window; False where its parts are run apart.

    Returns:
        A `TokenizedPrompt`, with a `warning` where the host's own call, ``model.to_tokens(text)``, gives other ids.

    Raises:
        PromptError: no tokenizer, text that it does not know, or token ids that the model does not have.
        ContextWindowError: the prompt is longer than the context window.
    """
    (found,) = tokenize_all(
        model, [prompt], prepend_bos=prepend_bos, require_demos=require_demos, check_window=check_window
    )
    return found


def tokenize_all(
    model: LensModel,
    prompts: Sequence[ICLPrompt],
    *,
    prepend_bos: bool | None = None,
    require_demos: bool = False,
    check_window: bool = True,
) -> list[TokenizedPrompt]:
    """`tokenize_for` of several prompts; what they share, such as their demonstrations, is encoded once.

    Args:
        model: a wrapped model with a tokenizer.
        prompts: the prompts.
        prepend_bos: see `tokenize_for`.
        require_demos: see `tokenize_for`.
        check_window: see `tokenize_for`.
    """
    tokenizer = model.tokenizer
    encoder = PieceEncoder(tokenizer, allow_unk=False)
    bos = getattr(tokenizer, "bos_token_id", None)
    default: bool | None = getattr(model.host.cfg, "default_prepend_bos", None)
    found = []
    for prompt in prompts:
        alone = [int(i) for i in encoder.tokenizer.encode(prompt.text)]
        by_itself = bos is not None and alone[:1] == [bos]
        usual = bos is not None and (by_itself if default is None else default)
        tokens = tokenize_with(
            encoder,
            prompt,
            prepend_bos=usual if prepend_bos is None else prepend_bos,
            max_tokens=model.info.n_ctx if check_window else None,
            require_demos=require_demos,
        )
        if max(tokens.ids) >= model.info.d_vocab:
            raise PromptError(
                f"the tokenizer gave token id {max(tokens.ids)}, but {model.info.name} knows only "
                f"{model.info.d_vocab} tokens: it is not this model's tokenizer."
            )
        expected = alone[1:] if by_itself else alone
        expected = [bos, *expected] if usual and bos is not None else expected
        note = _note(tokens, prepend_bos, default, has_bos=bos is not None)
        warning = None if list(tokens.ids) == expected else _warning(tokens, expected, usual=usual)
        found.append(dataclasses.replace(tokens, bos_note=note, warning=warning))
    return found


def _note(found: TokenizedPrompt, asked: bool | None, default: bool | None, *, has_bos: bool) -> str:
    if not has_bos:
        return "No BOS: the tokenizer has none."
    if asked is not None:
        reason = f"prepend_bos={asked}"
    elif default is not None:
        reason = "the model's default"
    else:
        reason = "as its tokenizer does by itself"
    start = f"BOS {found.tokens[0]!r} stands before the text" if found.bos is not None else "No BOS before the text"
    return f"{start} ({reason})."


def _warning(found: TokenizedPrompt, expected: list[int], *, usual: bool) -> str:
    if (found.bos is not None) != usual:
        return (
            f"The model's own call, model.to_tokens(text), {'puts BOS first' if usual else 'does not put BOS first'}."
        )
    if not found.matches_whole_string:
        return (
            "The model's own call, model.to_tokens(text), gives other ids: demonstrations and query are tokenised "
            "apart, so that no token crosses their borders."
        )
    return (
        f"The model's own call, model.to_tokens(text), gives {len(expected)} ids, with special tokens that the "
        f"prompt's {found.n_tokens} do not have."
    )
