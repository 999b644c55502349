"""One codec for all results: a frozen dataclass is stored by its fields and read back by their types.

Tensors go to the safetensors file, named by their path in the result (``statistics.0.values``); numbers, texts, paths,
tuples, lists, dicts and nested dataclasses go to the JSON file. A field that is a tensor is not in the JSON; inside
tuples and dicts the tensor's name stands in its place.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import (
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Protocol,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    runtime_checkable,
)

from jaxtyping import AbstractArray
from torch import Tensor

from metaopt_lens._errors import FileFormatError, MetaoptLensError
from metaopt_lens._storage import load_result, save_result

_Result = TypeVar("_Result", bound="Stored")

# Metadata of a field: it is left out of the files and takes its default.
NOT_STORED: Mapping[str, Any] = MappingProxyType({"stored": False})
# Metadata of a field that files of version 0.1 do not have: they are read with its default.
NOT_IN_0_1: Mapping[str, Any] = MappingProxyType({"in_0_1": False})


@runtime_checkable
class StoredForm(Protocol):
    """A dataclass that stands for a value in a file: what `of` makes of the value, and `restore` gives back."""

    @classmethod
    def of(cls, value: Any, /) -> StoredForm:
        """The stored form of a value."""
        ...

    def restore(self) -> Any:
        """The value."""
        ...


def stored_as(form: type[StoredForm]) -> Mapping[str, Any]:
    """Metadata of a field that is stored in another form.

    Args:
        form: the dataclass that is stored in its place.

    Returns:
        The `metadata` of ``dataclasses.field``.
    """
    return {"form": form}


class Stored:
    """A result that is saved and loaded by its fields: the base of a frozen dataclass that says its `kind`."""

    kind: ClassVar[str]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write ``path.safetensors`` and ``path.json``.

        Args:
            path: of either file, or without the ending.

        Returns:
            The path of the JSON file.
        """
        tensors: list[tuple[str, Tensor]] = []
        body = _encode(type(self), self, "", tensors)
        named = dict(tensors)
        if len(named) < len(tensors):
            raise TypeError(f"dots in names give two tensors of this {self.kind} the same name in its file")
        return save_result(path, kind=self.kind, tensors=named, meta=body)

    @classmethod
    def load(cls: type[_Result], path: str | os.PathLike[str]) -> _Result:
        """Read what `save` wrote.

        Args:
            path: of either file, or without the ending.

        Returns:
            The result, with its tensors on the CPU.

        Raises:
            FileFormatError: a file is missing, damaged, of an older version that cannot be read, or holds something
                else.
        """
        tensors, body = load_result(path, kind=cls.kind)
        try:
            too_old = cls._refusal(body)
            found = _decode(cls, body, "", tensors) if too_old is None else None
        except (KeyError, TypeError, ValueError, MetaoptLensError) as error:
            raise FileFormatError(f"{path} is not a complete {cls.kind}: {error!r}.") from None
        if found is None:
            raise FileFormatError(f"{path} {too_old}")
        return found  # type: ignore[no-any-return]

    @classmethod
    def _refusal(cls, body: Mapping[str, Any]) -> str | None:  # noqa: ARG003 (for subclasses)
        """Why a file of an older version cannot be read, to follow its path; None where it can.

        Args:
            body: the JSON file's contents.
        """
        return None


class _Field(NamedTuple):
    name: str
    hint: Any
    form: type[StoredForm] | None
    is_tensor: bool
    may_be_missing: bool


@cache
def _fields(cls: type[Any]) -> tuple[_Field, ...]:
    """The stored fields of a dataclass with their resolved types."""
    hints = get_type_hints(cls)
    found = []
    for f in dataclasses.fields(cls):
        if f.init and f.metadata.get("stored", True):
            form = f.metadata.get("form")
            hint = hints[f.name] if form is None else form
            found.append(_Field(f.name, hint, form, _is_tensor(hint), not f.metadata.get("in_0_1", True)))
    return tuple(found)


def _is_tensor(hint: Any) -> bool:
    """Whether a place of this type holds a tensor, or a tensor or None."""
    options = [option for option in _options(hint) or (hint,) if option is not NoneType]
    return bool(options) and all(_is_tensor_type(option) for option in options)


def _is_tensor_type(hint: Any) -> bool:
    if not isinstance(hint, type):
        return False
    return issubclass(hint.array_type if issubclass(hint, AbstractArray) else hint, Tensor)  # jaxtyping's, or bare


def _options(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union; empty for any other type."""
    return get_args(hint) if get_origin(hint) in {Union, UnionType} else ()


def _first_that_fits(options: tuple[Any, ...], value: Any, convert: Callable[[Any], Any]) -> Any:
    """Convert a value by the first alternative of a union that it belongs to."""
    if value is None and NoneType in options:
        return None
    *others, last = (option for option in options if option is not NoneType)
    for option in others:
        try:
            return convert(option)
        except TypeError:
            continue
    return convert(last)  # its error names the place


def _items(hint: Any, n: int, path: str) -> Iterator[tuple[Any, str]]:
    """Type and path of each of the n items of a tuple or list of this type."""
    args = get_args(hint)
    is_uniform = get_origin(hint) is not tuple or args[1:] == (...,)
    if not is_uniform and len(args) != n:
        raise TypeError(f"{path} needs {len(args)} items, got {n}")
    return ((args[0] if is_uniform else args[i], f"{path}.{i}") for i in range(n))


def _encode(hint: Any, value: Any, path: str, tensors: list[tuple[str, Tensor]]) -> Any:
    """The JSON of a value at a place of this type; its tensors with their names are added to `tensors`."""
    if options := _options(hint):

        def convert(option: Any) -> Any:
            own: list[tuple[str, Tensor]] = []
            found = _encode(option, value, path, own)
            tensors.extend(own)  # only of the alternative that fits
            return found

        return _first_that_fits(options, value, convert)
    origin = get_origin(hint)
    if _is_tensor(hint):
        _check(value, Tensor, path)
        tensors.append((path, value))
        return path
    if dataclasses.is_dataclass(hint):
        _check(value, hint, path)
        encoded = {}
        for field in _fields(hint):  # type: ignore[arg-type]
            item = getattr(value, field.name)
            item = item if field.form is None else field.form.of(item)
            written = _encode(field.hint, item, _join(path, field.name), tensors)
            if not field.is_tensor:
                encoded[field.name] = written
        return encoded
    if origin in {tuple, list, Sequence}:
        _check(value, (tuple, list), path)
        places = _items(hint, len(value), path)
        return [_encode(of, item, at, tensors) for item, (of, at) in zip(value, places, strict=True)]
    if origin in {dict, Mapping}:
        _check(value, Mapping, path)
        for key in value:
            _check(key, str, f"a key of {path}")
        return {key: _encode(get_args(hint)[1], item, _join(path, key), tensors) for key, item in value.items()}
    if hint is Path:
        _check(value, Path, path)
        return str(value)
    return _plain(hint, value, path)


def _decode(hint: Any, value: Any, path: str, tensors: Mapping[str, Tensor]) -> Any:
    """Inverse of `_encode`; KeyError, TypeError or ValueError where the JSON or the tensors are something else."""
    if options := _options(hint):
        return _first_that_fits(options, value, lambda option: _decode(option, value, path, tensors))
    origin = get_origin(hint)
    if _is_tensor(hint):
        _check(value, str, path)
        return tensors[path]
    if dataclasses.is_dataclass(hint):
        _check(value, dict, path)
        found = {}
        for field in _fields(hint):  # type: ignore[arg-type]
            at = _join(path, field.name)
            if field.is_tensor:
                found[field.name] = tensors.get(at) if _options(field.hint) else tensors[at]
            elif field.name in value:
                item = _decode(field.hint, value[field.name], at, tensors)
                found[field.name] = item if field.form is None else item.restore()
            elif not field.may_be_missing:
                raise KeyError(at)
        return hint(**found)  # type: ignore[operator]
    if origin in {tuple, list, Sequence}:
        _check(value, list, path)
        places = _items(hint, len(value), path)
        items = [_decode(of, item, at, tensors) for item, (of, at) in zip(value, places, strict=True)]
        return items if origin is list else tuple(items)
    if origin in {dict, Mapping}:
        _check(value, dict, path)
        return {key: _decode(get_args(hint)[1], item, _join(path, key), tensors) for key, item in value.items()}
    if hint is Path:
        _check(value, str, path)
        return Path(value)
    return _plain(hint, value, path)


def _plain(hint: Any, value: Any, path: str) -> Any:
    """A value that is the same in JSON: a number, text or None, a literal, or (typed Any) whatever JSON can say."""
    if hint is Any:
        return value
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise TypeError(f"{path} must be one of {get_args(hint)}, got {value!r}")
        return value
    if hint not in {bool, int, float, str, NoneType}:
        raise TypeError(f"{path} has the type {hint}, which cannot be stored")
    _check(value, (int, float) if hint is float else hint, path)
    return value


def _check(value: Any, kind: Any, path: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{path} must be of type {kind}, got {type(value).__name__}")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
