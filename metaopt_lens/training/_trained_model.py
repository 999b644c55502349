"""A finished training run and the file that it is kept in."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from metaopt_lens._errors import FileFormatError, ModelMismatchError
from metaopt_lens._storage import provenance, write_text
from metaopt_lens.training._evaluation import Evaluation
from metaopt_lens.training._training_config import TrainingConfig, differing_fields

RESULT = "result.json"
KIND = "momentum training run"


@dataclass(frozen=True)
class TrainedModel:
    """A finished run.

    Attributes:
        losses: of every step.
        history: evaluations on the way, by step.
        evaluation: at the end.
        eta: of every layer and head at the end; 0 for plain attention.
        seconds: spent in training steps, summed over all pieces of an interrupted run.
    """

    config: TrainingConfig
    losses: tuple[float, ...]
    history: dict[int, Evaluation]
    evaluation: Evaluation
    eta: tuple[tuple[float, ...], ...]
    seconds: float
    corpus: str

    def save(self, folder: Path) -> Path:
        """Write ``result.json``.

        Args:
            folder: the run's folder.
        """
        fields = TypeAdapter(TrainedModel).dump_python(self, mode="json")
        body = {"kind": KIND, **fields, "provenance": provenance()}
        return write_text(folder / RESULT, json.dumps(body, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> TrainedModel:
        """Read what `save` wrote.

        Args:
            folder: the run's folder.

        Raises:
            FileFormatError: there is no finished run, or its file is damaged.
        """
        file = Path(folder) / RESULT
        try:
            body = json.loads(file.read_text(encoding="utf-8"))
            if body["kind"] != KIND:
                raise KeyError("kind")
            return TypeAdapter(cls).validate_python(body)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileFormatError(f"{file} is not the result of a finished training run ({error!r}).") from None


def finished_run(config: TrainingConfig, folder: Path) -> TrainedModel | None:
    """The result in a folder; None if there is none yet.

    Args:
        config: what the run should have been made with.
        folder: the run's folder.

    Raises:
        ModelMismatchError: another configuration made it.
    """
    if not (folder / RESULT).is_file():
        return None
    done = TrainedModel.load(folder)
    differing = differing_fields(done.config.to_dict(), config.to_dict())
    if differing:
        raise ModelMismatchError(
            f"{folder} holds a run with another configuration; {'; '.join(differing)}. Choose another folder."
        )
    return done
