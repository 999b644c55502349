"""What the report shows of results that a run has where they were asked for: head profile and patch for all queries."""

from __future__ import annotations

from typing import Any

from metaopt_lens.analysis import join_profiles
from metaopt_lens.experiments import ExperimentResult
from metaopt_lens.viz._interval_chart import Row, interval_chart
from metaopt_lens.viz._profile_figures import profile_figure

_ORDER = "meta_gradient_logit"  # of the heads in the table: what they add to the answer


def profile_context(run: ExperimentResult) -> dict[str, Any] | None:
    """Rank correlations of the theories' scores, and the scores of all heads; None where there are none.

    Args:
        run: a finished run.
    """
    if "profile" not in run.table_names:
        return None
    joined = join_profiles([found for seed in run.seeds if (found := run.profile(seed)) is not None])
    table = joined.to_frame().drop(columns=["layer", "head"])
    table = table.reindex(table[_ORDER].abs().sort_values(ascending=False, kind="stable").index)
    return {"plot": profile_figure(joined).update_layout(title=None, margin={"t": 20}), "table": table}


def patch_context(run: ExperimentResult) -> dict[str, Any] | None:
    """Accuracy with the demonstrations as one change of weights for all queries; None where there is none.

    Args:
        run: a finished run.
    """
    if "patch" not in run.table_names:
        return None
    table = run.table("patch")
    records = table.to_dict("records")
    rows = [
        Row(
            row["setting"],
            row["accuracy"],
            row["accuracy_low"],
            row["accuracy_high"],
            "value" if row["setting"].startswith("static") else "null",
        )
        for row in records
    ]
    zero_shot = next(row["accuracy"] for row in records if row["setting"] == "zero-shot")
    unit = "accuracy, with 95 % intervals; the line is zero-shot"
    chart = interval_chart("What is left without the prompt?", unit, rows, percent=True, reference=(zero_shot, "0"))
    return {"chart": chart, "table": table, "short": f"{100 * rows[-1].value:.0f} % with {rows[-1].name}"}
