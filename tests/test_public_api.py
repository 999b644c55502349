"""The public names, and what `import metaopt_lens` costs."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

import metaopt_lens

HEAVY = ("torch", "transformer_lens", "transformers", "plotly", "circuitsvis", "pandas", "numpy", "scipy")


def loaded_after(statement: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter has loaded after a statement."""
    code = f"import sys\n{statement}\nprint(*[n for n in {HEAVY!r} if n in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_every_public_name_can_be_had() -> None:
    for name in metaopt_lens.__all__:
        value = getattr(metaopt_lens, name)
        assert value is not None
        assert inspect.getdoc(value), f"{name} has no docstring"
    assert set(metaopt_lens.__all__) <= set(dir(metaopt_lens))
    assert len(set(metaopt_lens.__all__)) == len(metaopt_lens.__all__)


def test_there_are_few_of_them() -> None:
    assert len(metaopt_lens.__all__) <= 24
    for name in ("decompose", "wrap", "ICLPrompt", "Template", "load_model", "load_tiny", "MetaoptLensError"):
        assert name in metaopt_lens.__all__


def test_every_room_is_a_namespace_of_the_root() -> None:
    rooms = {name for name in dir(metaopt_lens) if inspect.ismodule(getattr(metaopt_lens, name))}
    assert metaopt_lens.tiny.__name__ == "metaopt_lens.models.tiny"
    packages = {m.name for m in pkgutil.iter_modules(metaopt_lens.__path__) if m.ispkg}
    assert rooms - {"tiny"} == packages - {"cli"}
    code = "import metaopt_lens as ml; print(ml.tasks.Task.__name__, ml.tiny.load_tiny is ml.load_tiny)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["Task", "True"]


def test_names_of_0_1_can_still_be_imported() -> None:
    from metaopt_lens.decomposition import DecompositionSet
    from metaopt_lens.prompts import Demo

    assert (metaopt_lens.Demo, metaopt_lens.DecompositionSet) == (Demo, DecompositionSet)
    assert metaopt_lens.HeadRef.parse("L3H7") == metaopt_lens.HeadRef(3, 7)


def test_star_import_gives_exactly_the_public_names() -> None:
    names: dict[str, object] = {}
    exec("from metaopt_lens import *", names)
    assert set(names) - {"__builtins__"} == set(metaopt_lens.__all__)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match=r"module 'metaopt_lens' has no attribute 'decomposse'"):
        _ = metaopt_lens.decomposse  # type: ignore[attr-defined]
    with pytest.raises(ImportError, match="decomposse"):
        exec("from metaopt_lens import decomposse")


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_after("import metaopt_lens") == set()
    assert loaded_after("import metaopt_lens; dir(metaopt_lens); metaopt_lens.__all__") == set()
    assert loaded_after("from metaopt_lens import HeadRef, MetaoptLensError") == set()


def test_the_check_above_can_fail() -> None:
    assert "numpy" in loaded_after("import metaopt_lens, numpy")
    assert "torch" in loaded_after("from metaopt_lens import decompose")


def test_plots_are_loaded_only_when_drawn() -> None:
    assert loaded_after("from metaopt_lens import decompose, ICLPrompt, wrap") & {"plotly", "circuitsvis"} == set()


def test_every_module_can_be_imported() -> None:
    for module in pkgutil.walk_packages(metaopt_lens.__path__, "metaopt_lens."):
        if not module.name.endswith(".__main__"):
            importlib.import_module(module.name)


def test_errors_share_one_base_and_a_builtin() -> None:
    from metaopt_lens import _errors

    builtins = (ValueError, TypeError, ArithmeticError, OSError, MemoryError, RuntimeError)
    for name, error in inspect.getmembers(_errors, inspect.isclass):
        assert issubclass(error, metaopt_lens.MetaoptLensError), name
        assert error is metaopt_lens.MetaoptLensError or issubclass(error, builtins), name


def documented_rooms() -> list[str]:
    """The package and its rooms that say in ``__all__`` what is meant for users; others are for this package alone."""
    rooms = (m.name for m in pkgutil.walk_packages(metaopt_lens.__path__, "metaopt_lens.") if m.ispkg)
    return ["metaopt_lens", *(name for name in rooms if "__all__" in vars(importlib.import_module(name)))]


def described(documentation: str | None) -> set[str]:
    """Names that have a line of their own, ``name: text``, in ``Args:``."""
    _, _, section = inspect.cleandoc(documentation or "").partition("\nArgs:\n")
    return set(re.findall(r"^ {4}(\w+): \S", re.split(r"\n(?=\S)", section)[0], re.MULTILINE))


def public_functions(owner: str) -> Iterator[tuple[str, Callable[..., object]]]:
    """Every function in ``__all__`` and every public method of its classes, inherited ones of this package too."""
    module = importlib.import_module(owner)
    for name in module.__all__:
        value = getattr(module, name)
        members = inspect.getmembers_static(value) if inspect.isclass(value) else [("", value)]
        fields = getattr(value, "__dataclass_fields__", {})  # a field's default may be a function
        for method, member in members:
            function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
            ours = inspect.isfunction(function) and function.__module__.startswith("metaopt_lens")
            if ours and not method.startswith("_") and method not in fields:
                yield f"{name}.{method}".rstrip("."), function


@pytest.mark.parametrize("owner", documented_rooms())
def test_every_parameter_has_a_line_in_args(owner: str) -> None:
    missing = {}
    for name, function in public_functions(owner):
        parameters = set(inspect.signature(function).parameters) - {"self", "cls"}
        if lacking := parameters - described(function.__doc__):
            missing[name] = sorted(lacking)
    assert not missing


def test_an_undescribed_parameter_would_be_found() -> None:
    text = """Split.

    Args:
        model: wrapped.
        q, k: as the scores see them.
            z: not an entry of its own.

    Returns:
        x: not a parameter.
    """
    assert described(text) == {"model"}
    assert described("Only a sentence.") == set()
    assert any(name == "View.save" for name, _ in public_functions("metaopt_lens.viz"))


@pytest.mark.parametrize("owner", documented_rooms())
def test_no_attribute_is_described_within_anothers_entry(owner: str) -> None:
    """``x: this; y: that`` on one line is the entry of x alone, on the documentation's pages too."""
    module = importlib.import_module(owner)
    classes = [value for name in module.__all__ if dataclasses.is_dataclass(value := getattr(module, name))]
    for kind in classes:
        names = "|".join(field.name for field in dataclasses.fields(kind))
        assert not re.findall(rf"[.;] ({names}): ", kind.__doc__ or ""), kind


@pytest.mark.parametrize("owner", documented_rooms())
def test_rooms_name_what_they_have(owner: str) -> None:
    module = importlib.import_module(owner)
    assert len(set(module.__all__)) == len(module.__all__) > 0
    for name in module.__all__:
        value = getattr(module, name)
        assert not callable(value) or inspect.getdoc(value), name
