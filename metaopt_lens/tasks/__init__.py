"""Tasks: published, word pairs, the bundled model's, your own; their rows; the choice of demonstrations."""

from metaopt_lens.tasks._built_in import BUILT_IN as BUILT_IN
from metaopt_lens.tasks._registry import find_task as find_task
from metaopt_lens.tasks._registry import register_task as register_task
from metaopt_lens.tasks._registry import task_names as task_names
from metaopt_lens.tasks._rows import load_rows as load_rows
from metaopt_lens.tasks._select import SELECTIONS as SELECTIONS
from metaopt_lens.tasks._select import Selection as Selection
from metaopt_lens.tasks._select import select_demos as select_demos
from metaopt_lens.tasks._task import HubSource as HubSource
from metaopt_lens.tasks._task import Row as Row
from metaopt_lens.tasks._task import Task as Task
from metaopt_lens.tasks._task import TaskRows as TaskRows
from metaopt_lens.tasks._task import load_task as load_task

__all__ = [
    "BUILT_IN",
    "SELECTIONS",
    "HubSource",
    "Row",
    "Task",
    "TaskRows",
    "find_task",
    "load_rows",
    "load_task",
    "register_task",
    "select_demos",
    "task_names",
]
