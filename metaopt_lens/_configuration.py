"""Settings: frozen dataclasses that check their values, and the one place that says what is wrong with them.

pydantic does the checking: the annotation of a field is both what is accepted and, through its JSON schema, the words
in which a message says so. A description in an annotation takes precedence over these words.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, dataclass_transform

import pydantic
from pydantic import AfterValidator, ConfigDict, Field, Strict, TypeAdapter, ValidationError

from metaopt_lens._errors import FileFormatError, MetaoptLensError, OptionError

T = TypeVar("T")

# Numbers and truth values are taken as they are: "3" is no number, and 1 is not true.
Flag = Annotated[bool, Strict()]
Whole = Annotated[int, Strict()]
Count = Annotated[int, Strict(), Field(ge=1)]
NonNegative = Annotated[int, Strict(), Field(ge=0)]
Number = Annotated[float, Strict()]
Positive = Annotated[float, Strict(), Field(gt=0)]

_CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False)
_WORDS = {"boolean": "true or false", "string": "a string", "integer": "a whole number", "number": "a finite number"}
_BOUNDS = {
    "minimum": "of at least {}",
    "exclusiveMinimum": "greater than {}",
    "maximum": "of at most {}",
    "exclusiveMaximum": "less than {}",
}


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def settings(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass whose values are checked when it is made; `OptionError` says what is wrong."""
    made: Any = pydantic.dataclasses.dataclass(frozen=True, config=_CONFIG)(cls)
    if not made.__pydantic_complete__:  # pydantic would complete it later, without the wrapper below
        raise TypeError(f"the annotations of {cls.__name__} must name what is defined above it.")
    checked = made.__init__

    @functools.wraps(checked)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            checked(self, *args, **kwargs)
        except ValidationError as error:
            names = [f.name for f in dataclasses.fields(made)]
            given = dict(zip(names, args, strict=False)) | kwargs
            raise OptionError(_sentence(error, made, given, "")) from None

    made.__init__ = __init__
    return made  # type: ignore[no-any-return]


def read(kind: type[T], body: Mapping[str, Any], *, where: str, error: type[MetaoptLensError] = OptionError) -> T:
    """Settings from a table, with tables within.

    Args:
        kind: a class made by `settings`.
        body: field names and values.
        where: the place that messages name.
        error: what is raised.

    Raises:
        error: an unknown field, a missing one, or a value that is not accepted.
    """
    try:
        return TypeAdapter(kind).validate_python(dict(body))
    except ValidationError as problem:
        raise error(_sentence(problem, kind, body, where)) from None


def read_file(path: str | os.PathLike[str], *, what: str = "file") -> dict[str, Any]:
    """The table in a TOML or JSON file.

    Args:
        path: of the file; ``.json`` is JSON, anything else TOML.
        what: kind of the file, for messages.

    Raises:
        FileFormatError: the file is missing or not valid.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FileFormatError(f"the {what} {file} cannot be read ({reason}).") from None
    form = "JSON" if file.suffix == ".json" else "TOML"
    try:
        body = json.loads(text) if form == "JSON" else tomllib.loads(text)
    except ValueError as error:
        raise FileFormatError(f"the {what} {file} is not valid {form} ({error}).") from None
    if not isinstance(body, dict):
        raise FileFormatError(f"the {what} {file} must hold a table of settings.")
    return body


def _different(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values or len(set(values)) < len(values):
        raise ValueError
    return values


Different = AfterValidator(_different)
"""One or several values, none twice; the annotation's description says so."""


# ---- messages -----------------------------------------------------------------------------------------------------


def _sentence(error: ValidationError, kind: type, body: Mapping[str, Any], where: str) -> str:
    """pydantic's errors in our words: unknown fields first, then missing ones, then all values."""
    schema = TypeAdapter(kind).json_schema()
    names = [f.name for f in dataclasses.fields(kind)]
    unknown, missing, wrong = dict[str, list[str]](), dict[str, list[str]](), list[str]()
    for found in error.errors(include_url=False):
        loc = found["loc"]
        if loc and isinstance(loc[0], int) and loc[0] < len(names):  # a positional argument
            loc = (names[loc[0]], *loc[1:])
        path, accepts = _walk(schema, loc)
        table, own = ".".join(path), (found.get("ctx") or {}).get("error")
        if found["type"] == "unexpected_keyword_argument":
            unknown.setdefault(table, []).append(str(loc[-1]))
        elif found["type"] == "missing" and len(path) == len(loc):
            missing.setdefault(".".join(path[:-1]), []).append(path[-1])
        elif isinstance(own, MetaoptLensError):
            wrong.append(f"[{table}]: {own}" if table else str(own))
        else:
            wrong.append(f"{table} must be {_accepted(accepts, schema)}, got {_shown(body, path)}.")
    here = where or kind.__name__
    for table, keys in unknown.items():
        fields = list(_walk(schema, tuple(table.split(".")) if table else ())[1]["properties"])
        close = [match for key in keys for match in difflib.get_close_matches(key, fields, n=1)]
        return (
            f"{here}{f', [{table}]' if table else ''} has no field {', '.join(map(repr, keys))}; its fields are "
            f"{', '.join(fields)}.{f' Did you mean {close[0]!r}?' if close else ''}"
        )
    for table, keys in missing.items():
        return f"{here}{f', [{table}]' if table else ''} does not say which {' and '.join(keys)}."
    return (f"{where}: " if where else "") + " ".join(dict.fromkeys(wrong))


def _walk(schema: Mapping[str, Any], loc: tuple[int | str, ...]) -> tuple[list[str], Mapping[str, Any]]:
    """How far `loc` leads through fields of tables (not into lists or alternatives), and the schema there."""
    path, here = list[str](), _resolved(schema, schema)
    for name in loc:
        if name not in here.get("properties", {}):
            break
        path.append(str(name))
        here = _resolved(here["properties"][name], schema)
    return path, here


def _resolved(schema: Mapping[str, Any], whole: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a reference, or an alternative to leaving a field out, stands for."""
    choices = [part for part in schema.get("anyOf", ()) if part.get("type") != "null"]
    if len(choices) == 1:
        return _resolved(choices[0], whole)
    return whole["$defs"][schema["$ref"].rsplit("/", 1)[1]] if "$ref" in schema else schema


def _accepted(schema: Mapping[str, Any], whole: Mapping[str, Any]) -> str:
    """What a JSON schema accepts, in words; that a field may be left out is not said."""
    schema = _resolved(schema, whole)
    kind = schema.get("type")
    if kind == "object":
        return "a table"
    if "description" in schema:
        return str(schema["description"])
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    if "const" in schema:
        return repr(schema["const"])
    if "anyOf" in schema:
        return " or ".join(_accepted(part, whole) for part in schema["anyOf"] if part.get("type") != "null")
    if kind == "array":
        items = schema.get("prefixItems", [schema.get("items", {})])
        size = f"{len(items)} values" if "prefixItems" in schema else "values"
        return f"a list of {size}, each {_accepted(items[0], whole)}"
    bounds = [text.format(schema[name]) for name, text in _BOUNDS.items() if name in schema]
    return " ".join([_WORDS.get(str(kind), "something else"), " and ".join(bounds)]).strip()


def _shown(body: Any, path: list[str]) -> str:
    for name in path:
        body = body[name]
    return repr(list(body) if isinstance(body, tuple) else body)
