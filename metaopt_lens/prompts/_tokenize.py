"""Tokenising a prompt piece by piece, so that no merge crosses a border between S, D and Q."""

from __future__ import annotations

from dataclasses import replace

from metaopt_lens._errors import ContextWindowError, OptionError, PromptError
from metaopt_lens._types import TokenSpan
from metaopt_lens.prompts._encoder import HFTokenizer, PieceEncoder
from metaopt_lens.prompts._prompt import ICLPrompt, Piece
from metaopt_lens.prompts._template import Template
from metaopt_lens.prompts._tokenized import TokenizedPrompt


def tokenize_prompt(
    prompt: ICLPrompt,
    tokenizer: HFTokenizer | None,
    *,
    prepend_bos: bool | None = None,
    max_tokens: int | None = None,
    require_demos: bool = False,
    allow_unk: bool = False,
) -> TokenizedPrompt:
    """Token ids of a prompt and the spans of its parts.

    BOS, the instruction with its separator, every demonstration's input, label and separator, and the query
    are tokenised one by one without special tokens, and their ids joined. A tokenizer that puts a space
    before every text (SentencePiece's dummy prefix) does so for the first of these texts only.

    Args:
        prompt: the prompt.
        tokenizer: a Hugging Face tokenizer, such as `model.tokenizer`.
        prepend_bos: None prepends BOS if the tokenizer has one; a model's own default is known to `tokenize_for`.
        max_tokens: the model's context window; a longer prompt raises `ContextWindowError`.
        require_demos: refuse a prompt without demonstrations.
        allow_unk: accept text for which the tokenizer has only its unknown token.

    Raises:
        PromptError: no tokenizer, or text that it does not know.
        ContextWindowError: the prompt is longer than the context window.
    """
    encoder = PieceEncoder(tokenizer, allow_unk=allow_unk)
    return tokenize_with(encoder, prompt, prepend_bos=prepend_bos, max_tokens=max_tokens, require_demos=require_demos)


def tokenize_with(
    encoder: PieceEncoder, prompt: ICLPrompt, *, prepend_bos: bool | None, max_tokens: int | None, require_demos: bool
) -> TokenizedPrompt:
    """`tokenize_prompt` with an encoder that knows the pieces of other prompts already.

    Args:
        encoder: of the tokenizer.
        prompt: see `tokenize_prompt`.
        prepend_bos: see `tokenize_prompt`.
        max_tokens: see `tokenize_prompt`.
        require_demos: see `tokenize_prompt`.
    """
    if max_tokens is not None and max_tokens < 1:
        raise OptionError(f"max_tokens must be at least 1, got {max_tokens}.")
    if require_demos and not prompt.demos:
        raise PromptError(
            "the prompt has no demonstrations but at least one is needed: without them there is no "
            "in-context learning to decompose. Give demos=[(input, label), ...]."
        )
    bos_ids = encoder.bos(prepend_bos)
    first, *others = prompt.pieces()
    if bos_ids or first.kind != "instruction":
        first = replace(first, text=encoder.without_bos(first))
    pieces = [first, *others] if first.text else others

    ids = list(bos_ids)
    spans: dict[tuple[str, int | None], TokenSpan] = {}
    for number, piece in enumerate(pieces):
        piece_ids = encoder.encode(piece.text, first=number == 0)
        if not piece_ids and piece.kind != "separator":
            raise PromptError(f"the tokenizer gives no token for {_describe(piece)} {piece.text!r}: change it.")
        spans[piece.kind, piece.demo] = TokenSpan(len(ids), len(ids) + len(piece_ids))
        ids += piece_ids

    inputs, separators = (tuple(spans[kind, i] for i in range(len(prompt.demos))) for kind in ("input", "separator"))
    demos = tuple(TokenSpan(text.start, rest.stop) for text, rest in zip(inputs, separators, strict=True))
    # A chunk of a context has no label: an empty span.
    labels = tuple(spans.get(("label", i), TokenSpan(text.stop, text.stop)) for i, text in enumerate(inputs))
    query = spans["query", None]
    if max_tokens is not None and len(ids) > max_tokens:
        raise _too_long(len(ids), max_tokens, demos, query)
    prefix_stop = demos[0].start if demos else query.start
    zero_shot_ids = ids[:prefix_stop] + ids[query.start :]
    return TokenizedPrompt(
        ids=tuple(ids),
        tokens=tuple(encoder.readable(token) for token in ids),
        bos=TokenSpan(0, 1) if bos_ids else None,
        instruction=spans.get(("instruction", None)),
        demos=demos,
        demo_inputs=inputs,
        labels=labels,
        query=query,
        matches_whole_string=ids == bos_ids + encoder.whole("".join(p.text for p in pieces)),
        zero_shot_matches_whole_string=zero_shot_ids
        == bos_ids + encoder.whole("".join(p.text for p in pieces if p.demo is None)),
    )


def tokenize_label(
    label: str, template: Template, tokenizer: HFTokenizer | None, *, allow_unk: bool = False
) -> tuple[int, ...]:
    """Token ids of a label where it follows a query: what the model has to predict, with its space.

    Args:
        label: the label word.
        template: the text around it.
        tokenizer: a Hugging Face tokenizer.
        allow_unk: accept a word for which the tokenizer has only its unknown token.

    Raises:
        PromptError: the label is empty or unknown.
    """
    encoder = PieceEncoder(tokenizer, allow_unk=allow_unk)
    label = label.strip()
    if not label:
        raise PromptError("the label is empty: give a word.")
    text = template.fill_label(label)
    ids = encoder.encode(text, first=False)
    if not ids:
        raise PromptError(f"the tokenizer gives no token for the label {text!r}: choose another label word.")
    return tuple(ids)


def read_token(token: int, tokenizer: HFTokenizer | None) -> str:
    """A token id as text, its leading space included (as in `TokenizedPrompt.tokens`).

    Args:
        token: its id.
        tokenizer: a Hugging Face tokenizer.
    """
    return PieceEncoder(tokenizer, allow_unk=True).readable(token)


def _describe(piece: Piece) -> str:
    return f"the {piece.kind}" if piece.demo is None else f"the {piece.kind} of demonstration {piece.demo}"


def _too_long(n_tokens: int, max_tokens: int, demos: tuple[TokenSpan, ...], query: TokenSpan) -> ContextWindowError:
    message = f"the prompt has {n_tokens} tokens but the context window holds {max_tokens}"
    if not demos or n_tokens - (demos[-1].stop - demos[0].start) > max_tokens:
        rest = n_tokens - (demos[-1].stop - demos[0].start if demos else 0)
        return ContextWindowError(
            f"{message}: even without demonstrations (0 would fit) it has {rest}. Shorten the query or "
            f"instruction, or use a model with a longer context window."
        )
    fit = sum(demo.stop + len(query) <= max_tokens for demo in demos)
    return ContextWindowError(
        f"{message}: the first {fit} of its {len(demos)} demonstrations would fit. Give fewer or shorter "
        f"ones, or use a model with a longer context window."
    )
