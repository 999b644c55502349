"""The commands that compare: ``compare`` and ``analyze``."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from metaopt_lens.cli import app
from metaopt_lens.models.tiny import sample_episodes
from metaopt_lens.records import DemoRecord, QueryRecord, write_records

GOLDEN = Path(__file__).parent / "golden" / "dai2022"


def prompts_file(folder: Path, n_queries: int = 3) -> Path:
    episode = sample_episodes(n=1, n_demos=8, n_categories=2)[0]
    body = {"demos": [list(d) for d in episode.demos], "queries": [], "candidates": list(episode.candidates)}
    from metaopt_lens.experiments import episode_prompts

    chosen = episode_prompts(episode)[:n_queries]
    body["queries"], body["labels"] = [p.query for p in chosen], [p.label for p in chosen]
    file = folder / "prompts.json"
    file.write_text(json.dumps(body), encoding="utf-8")
    return file


def test_compare_ends_in_table_json_and_page(tmp_path: Path) -> None:
    arguments = ["compare", "--model", "tiny", "--prompts", str(prompts_file(tmp_path)), "--lr", "0.02"]
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "z total" in done.output
    assert "accuracy ICL" in done.output
    for name in ("comparison.csv", "comparison.json", "comparison.html"):
        assert (tmp_path / "out" / name).stat().st_size > 500
    data = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))
    assert data["scope"] == "conditional on these demonstrations"


def test_compare_makes_the_controls_that_are_asked_for(tmp_path: Path) -> None:
    arguments = ["compare", "--model", "tiny", "--prompts", str(prompts_file(tmp_path)), "--lr", "0.02"]
    done = CliRunner().invoke(
        app, [*arguments, "--controls", "quick", "--format", "json", "--out", str(tmp_path / "out")]
    )
    assert done.exit_code == 0, done.output
    nulls = {name for row in json.loads(done.stdout)["summary"] for name in row if name.startswith("null: ")}
    assert "null: random" in nulls
    assert not nulls & {"null: shuffled labels", "null: uphill", "null: unrelated text", "null: random weights"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--lr", "fast"], "--lr must be a number or 'auto'"),
        (["--lr", "-1"], "lr must be a positive, finite number"),
        (["--unrelated", "no-such-file.txt"], "cannot be read as text"),
    ],
)
def test_compare_refuses_bad_options(tmp_path: Path, change: list[str], message: str) -> None:
    arguments = ["compare", "--model", "tiny", "--prompts", str(prompts_file(tmp_path)), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*arguments, *change])
    assert done.exit_code == 2
    assert message in done.output
    assert not (tmp_path / "out").exists()


def test_compare_needs_two_queries_behind_the_demonstrations(tmp_path: Path) -> None:
    arguments = ["compare", "--model", "tiny", "--prompts", str(prompts_file(tmp_path, 1)), "--lr", "0.02"]
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "single query" in done.output


def golden_records(folder: Path) -> Path:
    """The golden arrays written out as the published implementation's files."""
    data = {name: torch.from_numpy(array) for name, array in np.load(GOLDEN / "inputs.npz").items()}
    lengths = data["query_len"]

    def queries(setting: str) -> list[QueryRecord]:
        found = []
        for i, n in enumerate(lengths.tolist()):
            found.append(
                QueryRecord(
                    attn_out=data[f"{setting}_self_attn_out_hiddens"][i],
                    attn_map=data[f"{setting}_attn_map"][i, :, :, :n],
                    gold_label=int(data["gold_label"][i]),
                    pred_label=int(data[f"{setting}_pred_label"][i]),
                    attn_map_ctx=data["icl_attn_map_ctx"][i] if setting == "icl" else None,
                    attn_q=data["ftzs_attn_q"][i] if setting == "ftzs" else None,
                )
            )
        return found

    offsets = data["demo_offset"].tolist()
    demos = [DemoRecord(data["ft_attn_q"][a:b].transpose(0, 1)) for a, b in pairwise(offsets)]
    return write_records(folder, zs=queries("zs"), icl=queries("icl"), ftzs=queries("ftzs"), ft=demos)


def test_analyze_prints_the_golden_numbers(tmp_path: Path) -> None:
    records = golden_records(tmp_path / "records")
    done = CliRunner().invoke(app, ["analyze", str(records), "--reference", "--format", "json"])
    assert done.exit_code == 0, done.output
    found, expected = json.loads(done.stdout), json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))

    def check(ours: object, golden: object, where: str) -> None:
        if isinstance(golden, dict):
            assert isinstance(ours, dict)
            for key, value in golden.items():
                check(ours[key], value, f"{where}.{key}")
        else:
            np.testing.assert_allclose(
                np.array(ours, dtype=float), np.array(golden, dtype=float), atol=1e-6, err_msg=where
            )

    for block in ("dai2022", "deutch2024"):
        check(found[block], expected[block], block)
    table = CliRunner().invoke(app, ["analyze", str(records)])
    assert table.exit_code == 0, table.output
    assert "SimAOU" in table.output


def test_analyze_names_what_is_missing(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["analyze", str(tmp_path)])
    assert done.exit_code == 2
    assert "zs" in done.output
