"""The public names, and what `import metaopt_lens` costs."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys

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

    builtins = (ValueError, TypeError, ArithmeticError, OSError, MemoryError)
    for name, error in inspect.getmembers(_errors, inspect.isclass):
        assert issubclass(error, metaopt_lens.MetaoptLensError), name
        assert error is metaopt_lens.MetaoptLensError or issubclass(error, builtins), name
