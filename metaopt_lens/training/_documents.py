"""Documents to learn from: text files, Python's own docstrings, data sets by name."""

from __future__ import annotations

import ast
import sysconfig
import warnings
from pathlib import Path
from typing import Any

from metaopt_lens._errors import FileFormatError, OptionError
from metaopt_lens.training._training_settings import DataSettings

_TEXT_FILES = {".txt", ".md", ".rst", ".py"}


def load_documents(data: DataSettings) -> list[tuple[str, str]]:
    """Name and text of every document of a source.

    Raises:
        FileFormatError: a text or data set that is missing or cannot be read.
        OptionError: the package `datasets` is needed and not there.
    """
    return {"python": _python_documents, "text": _text_documents, "datasets": _dataset_documents}[data.source](data)


def _text_documents(data: DataSettings) -> list[tuple[str, str]]:
    path = Path(str(data.path)).expanduser()
    files = sorted(f for f in path.rglob("*") if f.suffix in _TEXT_FILES) if path.is_dir() else [path]
    if not files:
        raise FileFormatError(f"the folder {path} holds no text file ({', '.join(sorted(_TEXT_FILES))}).")
    documents = []
    for file in files:
        try:
            documents += _paragraphs(file.read_text(encoding="utf-8"), file.name)
        except (OSError, UnicodeDecodeError) as error:
            raise FileFormatError(f"the text {file} cannot be read ({error}).") from None
    return documents


def _python_documents(data: DataSettings) -> list[tuple[str, str]]:  # noqa: ARG001
    """The standard library's docstrings: prose about code, found wherever Python is."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for file in sorted(root.rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(file.relative_to(root).parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # escapes in old sources
                tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [text for node in ast.walk(tree) if isinstance(node, kinds) and (text := ast.get_docstring(node))]
        if texts:
            documents.append((str(file.relative_to(root)), "\n\n".join(texts) + "\n"))
    return documents


def _dataset_documents(data: DataSettings) -> list[tuple[str, str]]:
    try:
        import datasets
    except ImportError:
        raise OptionError(
            "data.source 'datasets' needs the package datasets: pip install datasets, or give a text file."
        ) from None
    try:
        rows: Any = datasets.load_dataset(str(data.name), data.subset, split=data.split)
        return [(str(i), str(row[data.column])) for i, row in enumerate(rows)]
    except (OSError, ValueError, KeyError, ConnectionError) as error:
        raise FileFormatError(f"the dataset {data.name!r} cannot be read ({error}).") from None


def _paragraphs(text: str, name: str) -> list[tuple[str, str]]:
    """One long text as many documents, of some 2000 characters each, broken at empty lines."""
    parts, current, size = list[str](), list[str](), 0
    for paragraph in text.split("\n\n"):
        current.append(paragraph)
        size += len(paragraph)
        if size > 2000:
            parts.append("\n\n".join(current))
            current, size = [], 0
    if current:
        parts.append("\n\n".join(current))
    return [(f"{name}:{i}", part) for i, part in enumerate(parts)]
