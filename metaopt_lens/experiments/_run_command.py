"""The command that repeats a run."""

from __future__ import annotations

import dataclasses
import json
import shlex

from metaopt_lens.experiments._run_config import RunConfig

# Fields that `metaopt-lens run` has an option for; the others go into a file for --config.
WITH_OPTION = frozenset(
    {
        "model",
        "task",
        "shots",
        "seeds",
        "queries",
        "lr",
        "variant",
        "selection",
        "labels",
        "rules",
        "controls",
        "n_label_draws",
        "random_weights",
        "unrelated",
        "attribution",
        "further",
        "profile",
        "patch",
        "reference",
        "dtype",
        "batch_size",
        "save_updates",
    }
)
_SETTINGS = "settings.toml"


def run_command(config: RunConfig) -> str:
    """One line for the shell: every setting that is not the default. What has no option is said in a comment.

    Args:
        config: of the run.
    """
    options, rest = [], []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.metadata.get("place") or (value == field.default and field.name not in ("model", "task")):
            continue
        text = _text(field.name, value) if field.name in WITH_OPTION else None
        if text is None:
            rest.append(f"{field.name} = {json.dumps(value)}")
        elif isinstance(value, bool):
            options.append(_flag(field.name, on=value))
        else:
            options += [_flag(field.name), text]
    if config.data is not None:
        options += ["--data", "PATH"]
    line = shlex.join(["metaopt-lens", "run", *options, *(["--config", _SETTINGS] if rest else []), "--out", "DIR"])
    return f"{line}  # {_SETTINGS}: {'; '.join(rest)}" if rest else line


def _flag(name: str, *, on: bool = True) -> str:
    dashed = name.replace("_", "-")
    return f"--{dashed}" if on else f"--no-{dashed}"


def _text(name: str, value: object) -> str | None:
    """As the option takes it; None where it cannot say so."""
    if name == "seeds" and isinstance(value, tuple):
        if value == tuple(range(len(value))):
            return str(len(value))
        return ",".join(map(str, value)) if len(value) > 1 else None
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
