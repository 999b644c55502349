"""Record files: the golden set written out and read back, damage of every kind, and the worker processes."""

import json
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from joblib.externals.loky import get_reusable_executor

from metaopt_lens._errors import FileFormatError, OptionError, UndefinedMetricError
from metaopt_lens._json_lines import parse_line
from metaopt_lens.analysis import Convention
from metaopt_lens.records import DemoRecord, QueryRecord, analyze_records, read_demos, read_queries, write_records
from metaopt_lens.records._record_files import LAYOUTS, open_recording

GOLDEN = Path(__file__).parents[1] / "golden" / "dai2022"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
SETTINGS = ("zs", "icl", "ftzs")


def golden_records():
    with np.load(GOLDEN / "inputs.npz") as archive:
        inputs = {name: torch.from_numpy(archive[name]) for name in archive}
    records = {
        kind: [
            QueryRecord(
                attn_out=inputs[f"{kind}_self_attn_out_hiddens"][i],
                attn_map=inputs[f"{kind}_attn_map"][i, :, :, : inputs["query_len"][i]],
                gold_label=int(inputs["gold_label"][i]),
                pred_label=int(inputs[f"{kind}_pred_label"][i]),
                attn_map_ctx=inputs["icl_attn_map_ctx"][i] if kind == "icl" else None,
                attn_q=inputs["ftzs_attn_q"][i] if kind == "ftzs" else None,
            )
            for i in range(len(inputs["gold_label"]))
        ]
        for kind in SETTINGS
    }
    ends = inputs["demo_offset"].tolist()
    ft = [DemoRecord(inputs["ft_attn_q"][a:b].transpose(0, 1)) for a, b in pairwise(ends)]
    return {**records, "ft": ft}


@pytest.fixture(scope="module")
def records():
    return golden_records()


@pytest.fixture(scope="module")
def recording(records, tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("golden"), **records)


@pytest.fixture
def copy(records, tmp_path):
    """A small recording to be damaged: 4 queries."""
    return write_records(tmp_path / "copy", **{k: v if k == "ft" else v[:4] for k, v in records.items()})


def edit(path, number, change):
    """Rewrite one line of a record file through `change`, a function of its text."""
    lines = path.read_text().splitlines(keepends=True)
    lines[number - 1] = change(lines[number - 1])
    path.write_text("".join(lines))


def edit_record(path, number, **fields):
    edit(path, number, lambda line: json.dumps({**json.loads(line), **fields}) + "\n")


def compare(got, expected, where=""):
    """Same keys, same nesting, numbers within the golden set's tolerances."""
    tolerance = 1e-6 if where.startswith(".deutch2024") else 1e-9
    if isinstance(expected, dict):
        assert list(got) == list(expected), where
        for key in expected:
            compare(got[key], expected[key], f"{where}.{key}")
    else:
        assert got == pytest.approx(expected, abs=tolerance, rel=0), where


def test_a_line_becomes_arrays(records, recording):
    """On real numbers, on whole numbers among them, and on numbers that only float64 holds."""
    line = (recording / "icl" / "record_info.jsonl").read_bytes().splitlines()[5]
    parsed = parse_line(line, LAYOUTS["icl"])
    wanted = records["icl"][5]
    assert np.array_equal(parsed["self_attn_out_hiddens"], wanted.attn_out)
    assert np.array_equal(parsed["attn_map"], wanted.attn_map)
    assert np.array_equal(parsed["attn_map_ctx"], wanted.attn_map_ctx)
    assert "attn_q" not in parsed
    small = parse_line(b'{"x": 1, "attn_q": [[[1, 2.5], [-3, 1e-3]]]}', LAYOUTS["ft"])["attn_q"]
    assert small.dtype == np.float64
    assert small.tolist() == [[[1.0, 2.5], [-3.0, 1e-3]]]
    assert parse_line(b'{"attn_q": [[[1, 2.5]]]}', LAYOUTS["ft"])["attn_q"].dtype == np.float32


@pytest.mark.parametrize("workers", [0, 2])
def test_the_published_convention_reproduces_the_golden_numbers(recording, workers):
    analysis = analyze_records(recording, convention=Convention.PUBLISHED, workers=workers)
    result = json.loads(json.dumps(analysis.to_dict(), allow_nan=False))
    for block in ("dai2022", "deutch2024"):
        compare(result[block], EXPECTED[block], f".{block}")
    shapes = {key: value for key, value in EXPECTED["shapes"].items() if key != "n_classes"}
    assert result["shapes"] == shapes
    assert result["undefined"] == {}
    assert result["convention"] == "published"
    assert analysis.rec2ftp.require() == 80


def test_default_says_what_differs_and_gives_its_nulls(recording):
    analysis = analyze_records(recording)
    default, published = analysis.to_dict(), EXPECTED
    compare(default["dai2022"]["training_attention"], published["dai2022"]["training_attention"])
    layers = default["dai2022"]["all"]["SimAOU"]
    assert layers[0] == pytest.approx(published["dai2022"]["all"]["SimAOU"][0])
    assert layers[1] == pytest.approx(published["dai2022"]["all"]["SimAOU"][1] * 32 / 31)  # a zero update left out
    assert default["dai2022"]["all"]["SimAM"][0] != pytest.approx(published["dai2022"]["all"]["SimAM"][0], abs=1e-3)
    supplementary = default["supplementary"]
    assert supplementary["base_rate"] == pytest.approx(100 * 13 / supplementary["zs_wrong"])
    assert supplementary["null"]["token-level recall_topk"] == [100 / 202] * 3
    assert len(supplementary["all"]["SimAOU null"]) == 3
    assert supplementary["interval"]["SimAOU"]["label"] == "conditional on these demonstrations"
    for name, metric in analysis.metrics.items():
        for low, value, high in zip(metric.interval.low, metric.require(), metric.interval.high, strict=True):
            assert low <= value <= high, name


def test_results_depend_on_nothing_but_the_seed(recording):
    first, again, other = (analyze_records(recording, seed=seed).to_dict() for seed in (1, 1, 2))
    assert first == again
    assert first["dai2022"] == other["dai2022"]
    assert first["supplementary"]["all"]["SimAOU random"] != other["supplementary"]["all"]["SimAOU random"]


def test_the_thread_count_is_restored(recording):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        analyze_records(recording)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_frame_is_tidy(recording):
    analysis = analyze_records(recording, convention=Convention.PUBLISHED)
    frame = analysis.to_frame()
    assert list(frame.columns) == ["metric", "subset", "layer", "value", "n_queries", "null", "low", "high"]
    rows = frame[(frame["metric"] == "SimAOU") & (frame["subset"] == "f2t")]
    assert rows["value"].tolist() == pytest.approx(EXPECTED["dai2022"]["f2t"]["SimAOU"], abs=1e-9)
    assert rows["n_queries"].tolist() == [12, 12, 12]
    recall = frame[frame["metric"] == "example-level recall_topk"]
    assert recall["null"].tolist() == [5 / 8] * 3


def test_written_records_read_back(records, recording):
    for kind in SETTINGS:
        for got, wanted in zip(read_queries(recording, kind), records[kind], strict=True):
            assert torch.equal(got.attn_out, wanted.attn_out)
            assert torch.equal(got.attn_map, wanted.attn_map)
            assert (got.gold_label, got.pred_label) == (wanted.gold_label, wanted.pred_label)
            assert (got.attn_map_ctx is None) == (wanted.attn_map_ctx is None)
            assert (got.attn_q is None) == (wanted.attn_q is None)
    for got, wanted in zip(read_demos(recording), records["ft"], strict=True):
        assert torch.equal(got.attn_q, wanted.attn_q)


def test_layout_is_the_published_one(recording):
    """Any JSON reader sees the published fields, and numbers as the float64 text of float32 values."""
    line = json.loads((recording / "icl" / "record_info.jsonl").read_text().splitlines()[0])
    assert list(line) == ["self_attn_out_hiddens", "attn_map", "attn_map_ctx", "gold_label", "pred_label"]
    zs = json.loads((recording / "zs" / "record_info.jsonl").read_text().splitlines()[0])
    assert np.shape(zs["attn_map_ctx"]) == (3, 1)
    number = line["self_attn_out_hiddens"][0][0]
    assert number == float(np.float32(number))


def test_numbers_beyond_float32_are_kept(records, tmp_path):
    """Other people's recordings may hold true float64."""
    attn_out = records["zs"][0].attn_out.double() + 1e-12
    changed = {**records, "zs": [replace(records["zs"][0], attn_out=attn_out), *records["zs"][1:]]}
    first = next(read_queries(write_records(tmp_path / "r", **changed), "zs"))
    assert torch.equal(first.attn_out, attn_out)


def test_demonstrations_beyond_the_context_are_left_out(records, recording, tmp_path):
    extra = {**records, "ft": [*records["ft"], DemoRecord(torch.ones(3, 5, 32))]}
    analysis = analyze_records(write_records(tmp_path / "r", **extra), convention=Convention.PUBLISHED)
    compare(analysis.to_dict()["dai2022"], EXPECTED["dai2022"])
    assert "the context holds the first 8 of 9 demonstrations: the rest is unused" in analysis.notes


def test_the_published_convention_reads_100_queries_for_training_attention(records, tmp_path):
    many = {k: v if k == "ft" else (v * 4)[:110] for k, v in records.items()}
    root = write_records(tmp_path / "many", **many)
    published, default = (analyze_records(root, convention=c) for c in (Convention.PUBLISHED, Convention.DEFAULT))
    assert len(published.metrics["token-level kendall"].per_query.values) == 100
    assert len(default.metrics["token-level kendall"].per_query.values) == 110
    assert len(published.metrics["SimAOU"].per_query.values) == 110
    assert "attention to training tokens uses the first 100 of 110 queries" in published.notes


def test_undefined_metrics_are_none_with_a_reason(copy):
    for i in range(1, 5):
        gold = json.loads((copy / "zs" / "record_info.jsonl").read_text().splitlines()[i - 1])["gold_label"]
        edit_record(copy / "zs" / "record_info.jsonl", i, pred_label=gold)
    analysis = analyze_records(copy, top_k={"token": 1000})
    result = json.loads(json.dumps(analysis.to_dict(), allow_nan=False))
    assert result["dai2022"]["Recall2FTP"] is None
    assert result["dai2022"]["f2t"]["SimAOU"] == [None, None, None]
    assert result["dai2022"]["f2t"]["overall"]["SimAOU"] is None
    assert result["dai2022"]["training_attention"]["token-level recall_topk"] is None
    reasons = result["undefined"]
    assert reasons["dai2022.Recall2FTP"].startswith("finetuning corrected none of the 0 queries")
    assert reasons["dai2022.f2t.SimAM"].startswith("no query is wrong zero-shot and right")
    assert reasons["dai2022.training_attention.token-level recall_topk"] == (
        "top-1000 needs 1000 entries, the recording has 202"
    )
    with pytest.raises(UndefinedMetricError, match=r"token-level recall_topk is undefined on this recording: top-1000"):
        analysis.metrics["token-level recall_topk"].require()


def test_single_query_has_no_other_query_null(records, tmp_path):
    root = write_records(tmp_path / "one", **{k: v if k == "ft" else v[:1] for k, v in records.items()})
    analysis = analyze_records(root)
    assert analysis.metrics["SimAOU other query"].per_query is None
    assert analysis.to_dict()["undefined"]["supplementary.all.SimAOU other query"] == "there is no other query"


def test_a_zero_hidden_state_is_undefined_not_an_error(records, tmp_path):
    zero = replace(records["zs"][0], attn_out=torch.zeros(3, 32))
    root = write_records(tmp_path / "zero", **{**records, "zs": [zero, *records["zs"][1:]]})
    default, published = (
        analyze_records(root, convention=c).metrics["SimAOU"].per_query
        for c in (Convention.DEFAULT, Convention.PUBLISHED)
    )
    assert default.n_defined.tolist() == [31, 30, 31]
    assert published.n_defined.tolist() == [32, 32, 32]


def test_missing_folder(copy):
    (copy / "icl" / "record_info.jsonl").unlink()
    with pytest.raises(FileFormatError, match=r"icl/record_info.jsonl does not exist: .* \(missing: icl\)"):
        analyze_records(copy)


def test_unequal_counts(copy):
    path = copy / "ftzs" / "record_info.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    with pytest.raises(FileFormatError, match=r"numbers of records differ \(zs 4, icl 4, ftzs 3\)"):
        analyze_records(copy)


def test_empty_file(copy):
    (copy / "ft" / "record_info.jsonl").write_text("\n\n")
    with pytest.raises(FileFormatError, match=r"ft/record_info.jsonl holds no record"):
        analyze_records(copy)


@pytest.mark.parametrize("workers", [0, 1])
def test_truncated_last_line(copy, workers):
    path = copy / "icl" / "record_info.jsonl"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(FileFormatError, match=r"icl/record_info.jsonl, line 4 is cut short: .* closing brace"):
        analyze_records(copy, workers=workers)


def test_blank_lines_and_a_missing_last_newline_are_fine(copy):
    wanted = analyze_records(copy).to_dict()
    path = copy / "icl" / "record_info.jsonl"
    path.write_text(path.read_text().replace("\n", "\n\n").rstrip("\n"))
    assert analyze_records(copy).to_dict() == wanted


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("zs", lambda line: line.replace(",", ";", 1), r"zs/record_info.jsonl, line 2 is not valid JSON \("),
        ("zs", lambda line: line.replace("[[", "[[NaN,", 1), r"line 2 is not valid JSON"),
        ("ft", lambda line: "[" + line.strip() + "] {}\n", r"ft/record_info.jsonl, line 2 is not valid JSON"),
        ("ftzs", lambda line: line.replace("attn_q", "attn_k"), r"line 2 has no field 'attn_q' \(fields: self_"),
        ("icl", lambda line: line.replace("gold_label", "gold"), r"icl/record_info.jsonl, line 2 has no gold label"),
        ("icl", lambda line: line.replace("[[[", '[[["x",', 1), r"line 2 has a ragged 'attn_map': lists of \d+ and"),
        ("zs", lambda line: line.replace("[[", "[[],[", 1), r"line 2 has a ragged 'self_attn_out_hiddens'"),
        ("ft", lambda _: '{"attn_q": [[["a", 1.0]]]}\n', r"line 2 needs numbers in 'attn_q', found something"),
        ("ft", lambda _: '{"attn_q": [[[]]]}\n', r"line 2 needs 3 levels of non-empty lists in 'attn_q', level 3"),
        ("ft", lambda _: '{"attn_q": [[1, [2]]]}\n', r"line 2 has a ragged 'attn_q': lists of no list and 1 entries"),
        ("ft", lambda _: '{"attn_q": [[1, 2]]}\n', r"line 2 needs 3 levels of non-empty lists in 'attn_q', level 3"),
    ],
)
def test_damaged_line_is_named(copy, kind, change, message, workers):
    edit(copy / kind / "record_info.jsonl", 2, change)
    with pytest.raises(FileFormatError, match=message):
        analyze_records(copy, workers=workers)


def test_labels_must_be_whole_numbers_and_agree(copy):
    path = copy / "icl" / "record_info.jsonl"
    edit_record(path, 3, gold_label=7)
    with pytest.raises(FileFormatError, match=r"icl/record_info.jsonl, line 3 has gold label 7, but zs has \d there"):
        analyze_records(copy)
    edit_record(path, 3, gold_label="positive")
    with pytest.raises(FileFormatError, match=r"line 3 needs a whole number in 'gold_label', got positive"):
        analyze_records(copy)


def test_sizes_must_agree(copy):
    line = json.loads((copy / "zs" / "record_info.jsonl").read_text().splitlines()[1])
    edit_record(copy / "zs" / "record_info.jsonl", 2, self_attn_out_hiddens=line["self_attn_out_hiddens"][:2])
    with pytest.raises(
        FileFormatError, match=r"zs/.*, line 2 has 'self_attn_out_hiddens' of sizes \(2, 32\), but .*\(3"
    ):
        analyze_records(copy)
    edit_record(copy / "zs" / "record_info.jsonl", 2, self_attn_out_hiddens=line["self_attn_out_hiddens"])
    edit_record(copy / "ftzs" / "record_info.jsonl", 4, attn_map=line["attn_map"][:1] * 3 + line["attn_map"][:1])
    with pytest.raises(FileFormatError, match=r"ftzs/.*, line 4 has 'attn_map' of sizes \(4, 4, \d+\), but the other"):
        analyze_records(copy)


def test_context_must_fit_the_demonstrations(copy):
    path = copy / "ft" / "record_info.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:7]))
    with pytest.raises(
        FileFormatError, match=r"context of 211 tokens, .* 7 demonstrations in ft fills: 7 of them make 183"
    ):
        analyze_records(copy)
    edit_record(path, 1, attn_q=[[[0.0] * 32]] * 3)
    with pytest.raises(FileFormatError, match=r"ft/record_info.jsonl, line 1 holds a single token"):
        analyze_records(copy)


def test_a_dead_worker_is_replaced_by_this_process(copy, monkeypatch):
    wanted = analyze_records(copy).to_dict()
    get_reusable_executor(max_workers=2).shutdown(wait=True)  # so that new workers are started
    monkeypatch.setattr("sys.executable", "/bin/false")
    lines = open_recording(copy).lines["ft"]
    with pytest.raises(BrokenProcessPool):
        joblib.Parallel(n_jobs=2)(joblib.delayed(len)(line.path) for line in lines)
    assert analyze_records(copy, workers=2).to_dict() == wanted


def test_wrong_options(records, tmp_path, recording):
    with pytest.raises(OptionError, match=r"workers must be 0 \(this process\) or more, got -1"):
        analyze_records(recording, workers=-1)
    for options, message in (
        ({"top_k": {"tokens": 5}}, r"top_k has the keys 'example' and 'token', got \['tokens'\]"),
        ({"top_k": {"token": 0}}, r"top_k\['token'\] must be at least 1, got 0"),
        ({"null_draws": 0}, r"null_draws must be at least 1, got 0"),
        ({"level": 95.0}, r"level must lie between 0 and 1, got 95"),
    ):
        with pytest.raises(OptionError, match=message):
            analyze_records("nowhere", **options)
    with pytest.raises(OptionError, match=r"setting ftzs need attn_q, the attention query vectors; got None"):
        write_records(tmp_path / "a", **{**records, "ftzs": records["zs"]})
    with pytest.raises(OptionError, match=r"setting icl need attn_map_ctx, the scores to the context; got None"):
        write_records(tmp_path / "b", **{**records, "icl": records["zs"]})
    assert not (tmp_path / "b" / "icl" / "record_info.jsonl").exists()
