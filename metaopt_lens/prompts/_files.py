"""Reading prompts from JSON, JSON Lines and plain text files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from metaopt_lens._errors import FileFormatError, OptionError, PromptError
from metaopt_lens.prompts._context import ContextPrompt
from metaopt_lens.prompts._prompt import Demo, ICLPrompt
from metaopt_lens.prompts._template import Template

_T = TypeVar("_T")
_KEYS = (
    "demos", "query", "queries", "label", "labels", "candidates", "instruction", "template", "text", "context", "chunks"
)  # fmt: skip
_TEMPLATE_KEYS = ("input", "label", "separator", "instruction_separator")
_BORDER = "---"


def load_prompts(path: str | os.PathLike[str]) -> list[ICLPrompt]:
    """Read the prompts in a file; raises `FileFormatError` naming file and line (or item).

    * ``.json``: an object or a list of objects ``{"demos": [{"input", "label"} or [input, label], ...],
      "query": str}``, and optionally "label", "candidates", "instruction" and "template" ({"input", "label",
      "separator", "instruction_separator"}). "queries" (and "labels") instead of "query" (and "label") are
      lists and make one prompt each, behind the same demonstrations. ``{"text": str}`` is a prompt as one
      string (`ICLPrompt.from_string`), optionally with "label" and "candidates". "context" instead of "demos" and
      "template" makes a `ContextPrompt`: a text, cut as "chunks" says, or a list of chunks.
    * ``.jsonl``: one such object a line; blank lines are skipped.
    * anything else: plain text, read by `ICLPrompt.from_string`; a line ``---`` separates prompts.

    Args:
        path: a .json, .jsonl or text file.
    """
    file = Path(path)
    if not file.is_file():
        raise FileFormatError(f"{file} is not a file: give the path of a .json, .jsonl or text file of prompts.")
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{file} is not UTF-8 text (byte {error.start}): save it as UTF-8.") from None
    read = {".json": _read_json, ".jsonl": _read_json_lines}.get(file.suffix.lower(), _read_text)
    prompts = [prompt for found in read(file, text) for prompt in found]
    if not prompts:
        raise FileFormatError(f"{file} holds no prompt: it is empty.")
    return prompts


def _read_text(file: Path, text: str) -> Iterator[list[ICLPrompt]]:
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    borders = [i for i, line in enumerate(lines) if line.strip() == _BORDER]
    for start, stop in zip([-1, *borders], [*borders, len(lines)], strict=True):
        block = lines[start + 1 : stop]
        filled = [i for i, line in enumerate(block) if line.strip()]
        if filled:
            where = f"{file}, line {start + 2 + filled[0]}"
            yield [_located(where, partial(ICLPrompt.from_string, "\n".join(block)))]


def _read_json(file: Path, text: str) -> Iterator[list[ICLPrompt]]:
    if not text.strip():
        return
    found = _parse(file, text, first_line=1)
    if not isinstance(found, list):
        yield prompts_of(str(file), found)
        return
    for number, item in enumerate(found, start=1):
        yield prompts_of(f"{file}, item {number}", item)


def _read_json_lines(file: Path, text: str) -> Iterator[list[ICLPrompt]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield prompts_of(f"{file}, line {number}", _parse(file, line, first_line=number))


def _parse(file: Path, text: str, *, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise FileFormatError(
            f"{file}, line {first_line + error.lineno - 1}: not valid JSON ({error.msg}, column {error.colno})."
        ) from None


def _located(where: str, make: Callable[[], _T]) -> _T:
    """What `make` returns; a `PromptError` becomes a `FileFormatError` that says where in the file."""
    try:
        return make()
    except (PromptError, OptionError) as error:
        raise FileFormatError(f"{where}: {error}") from error


def prompts_of(where: str, item: Any) -> list[ICLPrompt]:
    """The prompts of one JSON object; `FileFormatError` begins with `where`."""
    if not isinstance(item, dict):
        raise FileFormatError(f"{where}: a prompt is a JSON object, got {_kind(item)}.")
    _check_keys(where, item, _KEYS, "a prompt")
    if "text" in item:
        others = [key for key in item if key not in {"text", "label", "candidates"}]
        if others:
            raise FileFormatError(
                f'{where}: "text" is a whole prompt, so {", ".join(map(repr, others))} cannot be '
                "given with it: give one or the other."
            )
        text = _text(where, item, "text", required=True)
        label, words = _text(where, item, "label"), _words(where, item, "candidates")
        return [_located(where, lambda: ICLPrompt.from_string(text or "", label=label, candidates=words))]

    many = "queries" in item
    if many == ("query" in item):
        raise FileFormatError(f'{where}: a prompt needs either "query" or "queries" (or else "text").')
    if ("label" if many else "labels") in item:
        raise FileFormatError(f'{where}: "label" goes with "query" and "labels" with "queries".')
    if many:
        queries: list[str] = _words(where, item, "queries") or []
        given = _words(where, item, "labels")
        labels: list[str | None] = [None] * len(queries) if given is None else list(given)
    else:
        queries, labels = [_text(where, item, "query", required=True) or ""], [_text(where, item, "label")]
    if len(queries) != len(labels):
        raise FileFormatError(
            f'{where}: "labels" needs one label for each query, got {len(labels)} for {len(queries)}.'
        )
    if not queries:
        raise FileFormatError(f'{where}: "queries" is an empty list: give at least one query.')
    instruction, words = _text(where, item, "instruction"), _words(where, item, "candidates")
    behind = _context(where, item) if "context" in item else _demonstrations(where, item)
    return _located(
        where,
        lambda: [
            behind(query, instruction=instruction, label=label, candidates=words)
            for query, label in zip(queries, labels, strict=True)
        ],
    )


def _demonstrations(where: str, item: dict[str, Any]) -> Callable[..., ICLPrompt]:
    """What makes a prompt that asks a query behind the object's demonstrations."""
    if "chunks" in item:
        raise FileFormatError(f'{where}: "chunks" goes with "context".')
    demos, template = _demos(where, item), _template(where, item.get("template"))
    return lambda query, **options: ICLPrompt(demos, query, template, **options)


def _context(where: str, item: dict[str, Any]) -> Callable[..., ICLPrompt]:
    """What makes a prompt that asks a query behind the object's context."""
    for key in ("demos", "template"):
        if key in item:
            raise FileFormatError(f'{where}: "context" stands in place of "demos" and "template", so give no {key!r}.')
    found, chunks = item["context"], _text(where, item, "chunks")
    context = found if isinstance(found, str) else _words(where, item, "context") or []
    cut = {} if chunks is None else {"chunks": chunks}
    return lambda query, **options: ContextPrompt(context, query, **cut, **options)


def _demos(where: str, item: dict[str, Any]) -> list[Demo]:
    found = item.get("demos", [])
    if not isinstance(found, list | tuple):
        raise FileFormatError(f'{where}: "demos" must be a list, got {_kind(found)}.')
    demos = []
    for number, demo in enumerate(found):
        match demo:
            case {"input": str(text), "label": str(word), **rest} if not rest:
                demos.append(Demo(text, word))
            case Demo(text, word):
                demos.append(Demo(text, word))
            case [str(text), str(word)]:
                demos.append(Demo(text, word))
            case _:
                raise FileFormatError(
                    f'{where}: demonstration {number} must be {{"input": ..., "label": ...}} or [input, '
                    f"label] with strings, got {json.dumps(demo, ensure_ascii=False, default=repr)}."
                )
    return demos


def _template(where: str, found: Any) -> Template:
    if found is None:
        return Template()
    if isinstance(found, Template):
        return found
    if not isinstance(found, dict):
        raise FileFormatError(f'{where}: "template" must be an object, got {_kind(found)}.')
    _check_keys(where, found, _TEMPLATE_KEYS, "a template")
    texts = {key: _text(where, found, key, required=key != "instruction_separator") for key in found}
    return _located(where, lambda: Template(**texts))  # type: ignore[arg-type]


def _check_keys(where: str, item: dict[str, Any], known: tuple[str, ...], what: str) -> None:
    unknown = [key for key in item if key not in known]
    if unknown:
        raise FileFormatError(
            f"{where}: {what} has no field {', '.join(map(repr, unknown))}: its fields are {', '.join(known)}."
        )


def _text(where: str, item: dict[str, Any], key: str, *, required: bool = False) -> str | None:
    found = item.get(key)
    if isinstance(found, str) or (found is None and not required):
        return found
    raise FileFormatError(f'{where}: "{key}" must be a string, got {_kind(found)}.')


def _words(where: str, item: dict[str, Any], key: str) -> list[str] | None:
    found = item.get(key)
    if found is None and key not in item:
        return None
    if isinstance(found, list | tuple) and all(isinstance(word, str) for word in found):
        return list(found)
    raise FileFormatError(f'{where}: "{key}" must be a list of strings, got {_kind(found)}.')


def _kind(found: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(found), "a number") if not isinstance(found, list) else "a list that is not of that form"
