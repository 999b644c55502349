"""The tasks that are known by name."""

from __future__ import annotations

from metaopt_lens._errors import OptionError
from metaopt_lens.prompts._published import INSTRUCTIONS, LABEL_WORDS, TEMPLATES
from metaopt_lens.prompts._template import Template
from metaopt_lens.prompts.tasks._task import HubSource, Task, load_task

_TASKS: dict[str, Task] = {}


def register_task(task: Task, *, replace: bool = False) -> Task:
    """Make a task known by its name; returns it.

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


_HUB = {
    "sst2": HubSource("stanfordnlp/sst2"),
    "sst5": HubSource("SetFit/sst5"),
    "mr": HubSource("cornell-movie-review-data/rotten_tomatoes"),
    "subj": HubSource("SetFit/subj", validation="test"),
    "agnews": HubSource("fancyzhx/ag_news", validation="test"),
    "cb": HubSource("aps/super_glue", "cb"),
}
_CLASS_NAMES = {
    "sst2": ("negative", "positive"),
    "sst5": ("very negative", "negative", "neutral", "positive", "very positive"),
    "mr": ("neg", "pos"),
    "subj": ("objective", "subjective"),
    "agnews": ("World", "Sports", "Business", "Sci/Tech"),
    "cb": ("entailment", "contradiction", "neutral"),
}
_INPUTS = {"cb": "{premise}\nQuestion: {hypothesis}"}
_ALIASES = {"sst2": {"text": "sentence"}}
_WORD_PAIRS = (
    "word-pairs",
    "antonym",
    "synonym",
    "country-capital",
    "country-currency",
    "english-french",
    "present-past",
    "singular-plural",
)

for _name, _template in TEMPLATES.items():
    register_task(
        Task(
            _name,
            _template,
            labels=LABEL_WORDS[_name],
            label_names=_CLASS_NAMES[_name],
            input=_INPUTS.get(_name, "{text}"),
            instruction=INSTRUCTIONS.get(_name),
            aliases=_ALIASES.get(_name, {}),
            hub=_HUB[_name],
        )
    )
for _name in _WORD_PAIRS:
    register_task(
        Task(
            _name,
            Template(input="Q: {input}\nA:", separator="\n\n"),
            input="{input}",
            label_column="output",
        )
    )
