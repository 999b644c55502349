"""Write a result as files: table, data and page."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from metaopt_lens._errors import OptionError
from metaopt_lens._storage import atomic_path, write_text
from metaopt_lens._types import HeadRef
from metaopt_lens.decomposition import Answer, Decomposition, DecompositionSet
from metaopt_lens.runs import LabelPrediction
from metaopt_lens.viz._page import write_page
from metaopt_lens.viz._table import head_table
from metaopt_lens.viz._terminal import as_data


def write_outputs(
    result: Decomposition | DecompositionSet,
    folder: str | os.PathLike[str],
    *,
    heads: Sequence[HeadRef] | None = None,
    answers: Sequence[LabelPrediction],
    answer: Answer | None = None,
    versus: Answer | Sequence[Answer] | None = None,
) -> list[Path]:
    """Write ``heads.csv`` and ``heads.json`` (all heads) and ``report.html`` into a folder; returns their paths.

    Args:
        result: what `decompose` returned.
        folder: where the files are written.
        heads: heads for the token views; None for the first four.
        answers: what the model answers to each prompt.
        answer: whose logit the page takes apart (see `write_page`).
        versus: whose mean logit is subtracted.

    Raises:
        OptionError: `folder` is a file, or cannot be written to.
    """
    base = Path(folder)
    try:
        with atomic_path(base / "heads.csv") as temporary:
            head_table(result).to_csv(temporary, index=False)
        data = json.dumps(as_data(result, answers), indent=1, ensure_ascii=False)
        written = write_text(base / "heads.json", data + "\n")
        report = write_page(result, base / "report.html", heads, predictions=answers, answer=answer, versus=versus)
    except OSError as error:
        raise OptionError(f"cannot write into {base}: {error.strerror or error}. Choose another folder.") from error
    return [base / "heads.csv", written, report]
