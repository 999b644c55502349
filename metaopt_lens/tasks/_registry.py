"""Tasks by name: the built-in ones, your own, and TOML files."""

from __future__ import annotations

from metaopt_lens._errors import OptionError
from metaopt_lens.tasks._built_in import BUILT_IN
from metaopt_lens.tasks._task import Task, load_task

_TASKS: dict[str, Task] = {task.name: task for task in BUILT_IN}


def register_task(task: Task, *, replace: bool = False) -> Task:
    """Make a task known by its name.

    Args:
        task: your own.
        replace: take the place of another task of that name.

    Returns:
        The task.

    Raises:
        OptionError: there is another task of that name, and `replace` is not set.
    """
    if not replace and _TASKS.get(task.name, task) != task:
        raise OptionError(f"there is already a task {task.name!r}: choose another name, or pass replace=True.")
    _TASKS[task.name] = task
    return task


def task_names() -> tuple[str, ...]:
    """Names of all known tasks."""
    return tuple(sorted(_TASKS))


def find_task(name: str) -> Task:
    """The task of that name, or in that TOML file.

    Args:
        name: of a task, or the path of a TOML file.

    Raises:
        OptionError: there is no such task.
        FileFormatError: the TOML file cannot be used.
    """
    if name in _TASKS:
        return _TASKS[name]
    if name.endswith(".toml"):
        return load_task(name)
    raise OptionError(
        f"there is no task {name!r}: known are {', '.join(task_names())}. Your own is a TOML file (give its path), or "
        "register_task(Task(...)) in Python."
    )
