"""Write docs/results.md, docs/claims.md, their pictures and README's headline: ``python docs/_results.py``.

No number is typed by hand: tables and sentences are made from ``docs/data/*.csv``, ``provenance.json`` and, for what
was expected before the runs, ``expected.toml``. Folders in ``docs/data`` with a ``provenance.json`` are read too.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

sys.path.insert(0, str(Path(__file__).parent))

from _dot_plot import Dot, dot_plot

from metaopt_lens.analysis import span_text
from metaopt_lens.experiments import CLAIMS, claims_markdown, claims_of, markdown_table, published_numbers
from metaopt_lens.experiments._sweep_export import PROVENANCE_FILE
from metaopt_lens.experiments._sweep_result import AXES

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
_AXES = [*AXES, "directory"]  # what tells runs apart: two folders may hold runs of the same settings
_NAMES = {claim.key: claim for claim in CLAIMS}
PRETRAINED = {"smollm2": "SmolLM2-135M", "gemma3-270m": "Gemma-3-270M"}
_SETTINGS = ("accuracy ZS", "accuracy ICL", "accuracy FT")


class Section(NamedTuple):
    """A heading, what it is about, and the claims below it, each with a figure."""

    title: str
    about: str
    claims: tuple[str, ...]


SECTIONS = (
    Section(
        "What Dai et al. reported",
        "In-context learning corrects what finetuning corrects, moves attention outputs and attention maps as "
        "finetuning does, and attends to the demonstrations in the same order (arXiv:2212.10559). Each similarity "
        "stands next to what chance gives.",
        ("rec2ftp", "sim_aou", "sim_am", "kendall"),
    ),
    Section(
        "What the critique says",
        "Normalising before subtracting makes noise look similar, models with permuted weights do as well, and a "
        "layer-causal finetuning is more like in-context learning (arXiv:2311.07772).",
        ("sim_aou_analytic", "normalisation", "untrained", "layer_causal"),
    ),
    Section(
        "Uphill",
        "If the likeness is about descending, finetuning with the opposite sign must be less like it "
        "(arXiv:2602.21204).",
        ("uphill", "unrelated"),
    ),
    Section(
        "Flipped labels",
        "Whoever learns from the demonstrations follows flipped labels; whoever only recognises the task keeps to its "
        "prior (arXiv:2303.03846).",
        ("prior", "prior_finetuned", "labels_matter"),
    ),
    Section(
        "Format against contrast",
        "Answering with a label at all is the format; which label is the contrast. A hidden gradient descent on the "
        "labels would have to show in the contrast, above demonstrations with shuffled labels.",
        ("contrast", "assignment"),
    ),
    Section(
        "The ceiling",
        "How much of the in-context updates finetuning explains on queries left out, next to one constant vector and "
        "to simple optimisers (arXiv:2509.22621).",
        ("ceiling", "ladder", "order", "algebra"),
    ),
    Section(
        "Context compiled into weights",
        "One change of the weights for all queries, fitted on other queries behind the same demonstrations "
        "(arXiv:2511.17864).",
        ("patch",),
    ),
)
# What else is said of what came: a table, the column that tells its rows apart, and the column of numbers.
_MEASURED = {
    "ceiling": ("ceiling", "update", "r_squared"),
    "ladder": ("ladder", "rung", "r_squared"),
    "order": ("order", "learner", "spread"),
    "algebra": ("algebra", "quantity", "estimate"),
    "item_1": ("summary", "statistic", "value"),
    "uphill": ("summary", "statistic", "value"),
    "layer_causal": ("summary", "statistic", "value"),
    "untrained": ("summary", "statistic", "value"),
}
_SUMMARY_ROWS = {
    "item_1": ("z total: contrast", "z total: format", "z total: rest"),
    "uphill": ("z total",),
    "layer_causal": ("SimAOU",),
    "untrained": ("SimAOU",),
}
# What an entry of expected.toml is about, by the end of its name.
_ABOUT = {"accuracy": ("learns", "finetunes"), "item_1": ("contrast",), "item_3": ("prior", "prior_finetuned")}
_DIFFERS = (
    "What differs: smaller models; the mean over {sets} demonstration sets instead of the best of seven; {shots} "
    "demonstrations instead of up to 32; {queries} queries a set instead of all validation rows; outputs are read "
    "where the label is predicted, not at the label token; the learning rate is chosen on held-out rows instead of the "
    "validation rows."
)
_QUANTITIES = {"Rec2FTP": "Rec2FTP %", "Kendall": "Kendall, token level"}


class Data:
    """Everything in the folders of exported tables."""

    def __init__(self, folder: Path) -> None:
        found = sorted(folder.rglob(PROVENANCE_FILE), key=lambda file: (len(file.parts), file.as_posix()))
        self.folders = [file.parent for file in found]
        self.expected = tomllib.loads(text) if (text := _read(folder / "expected.toml")) else {}
        self.provenance = [json.loads(_read(file)) for file in found]
        # The first folder has no name; another is called by its number of queries, in which its runs differ.
        queries = [
            _range(sorted({run["config"]["queries"] for run in body["runs"].values()})) for body in self.provenance
        ]
        self.names = [f"{n} queries" if number else "" for number, n in enumerate(queries)]

    def table(self, name: str) -> pd.DataFrame:
        """A table of all folders; empty where there is none."""
        kinds = {axis: str for axis in AXES if axis != "shots"}
        frames = [
            pd.read_csv(file, dtype=kinds, keep_default_na=False, na_values=["", "nan"]).assign(directory=own)
            for folder, own in zip(self.folders, self.names, strict=True)
            if (file := folder / f"{name}.csv").is_file()
        ]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    @cached_property
    def claims(self) -> pd.DataFrame:
        """`claims_of` all folders."""
        found = claims_of(self.folders)
        return found.replace({"directory": dict(zip(map(str, self.folders), self.names, strict=True))})

    @cached_property
    def works(self) -> set[tuple[Any, ...]]:
        """The runs (with their rule) in which in-context learning and finetuning are shown to work."""
        shown = self.claims[self.claims["claim"].isin(["learns", "finetunes"]) & (self.claims["verdict"] == "holds")]
        counts = shown.groupby([*_AXES, "rule"])["claim"].nunique()
        return set(counts.index[counts == 2])

    @cached_property
    def runs(self) -> list[dict[str, Any]]:
        """The entries of ``provenance.json``."""
        return [run for body in self.provenance for run in body["runs"].values()]


def write_pages(data: Path, out: Path) -> list[Path]:
    """Write both pages and the pictures.

    Args:
        data: the folder of exported tables.
        out: where the pages go, and ``images`` for the pictures.
    """
    found = Data(data)
    pictures = {name: text for section in SECTIONS for name, text in _pictures(found, section)}
    pages = {"results.md": _results(found), "claims.md": _claims(found)}
    pages |= {f"images/{name}": text for name, text in pictures.items()}
    for name, text in pages.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in pages]


def with_headline(readme: str, data: Path) -> str:
    """README with the lines between its two marks made from the tables.

    Args:
        readme: its text.
        data: the folder of exported tables.
    """
    lines = "\n".join(f"- {line}" for line in _headline(Data(data)))
    lines = lines.removesuffix(".") + " ([results](docs/results.md))."
    return re.sub(
        r"(<!-- headline -->\n).*?(\n<!-- /headline -->)", lambda m: f"{m[1]}{lines}{m[2]}", readme, flags=re.DOTALL
    )


# ---- the pages ------------------------------------------------------------------------------------------------------


def _results(data: Data) -> str:
    parts = [
        "# Results on real models",
        _introduction(data),
        "## In short",
        "\n".join(f"- {line}" for line in _headline(data)),
        "## Do the models learn in context, and does finetuning help?",
        _accuracies(data),
        _interpreted(data),
        *_controls(data),
    ]
    for section in SECTIONS:
        parts += [f"## {section.title}", section.about, *(_claim(data, key) for key in section.claims)]
    parts += _published(data) + _expected(data) + _provenance(data)
    parts.append("The bundled model's own page, with 25 demonstration sets: [appendix](results-bundled.md).")
    return "\n\n".join(part for part in parts if part) + "\n"


def _claims(data: Data) -> str:
    head = (
        "# Claims\n\nWhich published claims hold, for each model and task. A claim holds where the 95 % interval over "
        "demonstration sets lies above 0, does not hold where it lies below, and is undecided otherwise; a similarity "
        "is interpreted only where in-context learning and finetuning are both shown to work. Intervals are not "
        "corrected for the number of cells: of forty claims that are at 0, one is said to hold by chance.\n\n"
        "Your own run as further columns:\n\n"
        "```bash\nmetaopt-lens claims docs/data DIR --out claims.md\n```\n\n"
        "Adding a claim is adding a row to `metaopt_lens/experiments/_claim_table.py`."
    )
    return f"{head}\n\n{claims_markdown(data.claims)}"


def _introduction(data: Data) -> str:
    models = ", ".join(dict.fromkeys(f"{run['model']['name']}" for run in data.runs))
    tasks = len({run["config"]["task"] for run in data.runs})
    dates = sorted({run["ended"][:10] for run in data.runs})
    left = [name for body in data.provenance for name in body["unfinished"]]
    text = (
        f"{len(data.runs)} runs of {models} on {tasks} tasks, finished {_range(dates)}. Every number on this page is "
        "made from the tables in `docs/data` by `python docs/_results.py`. Intervals are 95 % t intervals over "
        "demonstration sets, in brackets; where the sets agree exactly there is none. [How to repeat a row](atlas.md); "
        "[all claims as a table](claims.md)."
    )
    return f"{text}\n\nNot finished when the tables were exported: {', '.join(left)}." if left else text


def _accuracies(data: Data) -> str:
    table, rows = data.table("accuracies"), []
    for key, own in table.groupby([*_AXES, "rule"], sort=False):
        cells = own.set_index("quantity")
        found = [_number(cells.loc[name], "value", "low", "high", "{:.2f}") for name in _SETTINGS]
        rows.append([*_place(key), *found, int(cells.loc["accuracy ZS", "n"]), _shown(data, key)])
    header = ["model", "task", "zero-shot", "in context", "finetuned", "queries", "shown to work"]
    return markdown_table(header, rows)


def _shown(data: Data, key: Sequence[Any]) -> str:
    own = _of(data.claims, key)
    words = {"learns": "in-context learning", "finetunes": "finetuning"}
    found = [word for claim, word in words.items() if (own[own["claim"] == claim]["verdict"] == "holds").any()]
    return "both" if len(found) == 2 else " and ".join(found) or "neither"


def _interpreted(data: Data) -> str:
    runs = list(data.claims.groupby([*_AXES, "rule"], sort=False).groups)
    both = [key for key in runs if key in data.works]
    rest = [key for key in runs if key not in data.works]
    text = (
        f"In {len(both)} of {len(runs)} runs both are shown to work; only there is a similarity of the two "
        "interpreted. In the figures filled circles are decided, empty ones are not."
    )
    return text + (f"\n\nNot interpreted: {_list(rest)}." if both and rest else "")


def _headline(data: Data) -> list[str]:
    """Three lines: where both work, how alike the updates are there, and what of it depends on the labels."""
    own = data.claims[data.claims["model"].isin(PRETRAINED) & (data.claims["labels"] == "natural")]
    runs = list(own.groupby([*_AXES, "rule"], sort=False).groups)
    both = [key for key in runs if key in data.works]
    models = " and ".join(dict.fromkeys(PRETRAINED[key[0]] for key in runs))
    tasks = len({key[1] for key in runs})
    if not both:
        return [
            f"In none of {len(runs)} runs of {models} on {tasks} tasks are both in-context learning and finetuning "
            "shown to work."
        ]
    where = {model: [key for key in both if key[0] == model] for model in PRETRAINED}
    named = "; ".join(
        f"{PRETRAINED[model]} on {', '.join(dict.fromkeys(key[1] for key in keys))}"
        for model, keys in where.items()
        if keys
    )
    first = f"{models} on {tasks} tasks: in {len(both)} of {len(runs)} runs, in-context learning and finetuning both raise the accuracy ({named})."  # noqa: E501
    shown = own[[key in both for key in _keys(own)]]

    def numbers(claim: str) -> tuple[str, str]:
        rows = shown[(shown["claim"] == claim) & shown["estimate"].notna()]
        low, high = rows["estimate"].min(), rows["estimate"].max()
        span = f"{low:+.2f}" if f"{low:+.2f}" == f"{high:+.2f}" else f"{low:+.2f} to {high:+.2f}"
        return span, f"{(rows['verdict'] == 'holds').sum()} of {len(rows)}"

    alike, labels = numbers("direction"), numbers("contrast")
    second = f"There both move the heads alike: mean cosine {alike[0]}; more than finetuning uphill in {numbers('uphill')[1]} of these runs, more than finetuning on unrelated text in {numbers('unrelated')[1]}."  # noqa: E501
    third = f"What depends on the labels shown is small: {labels[0]} in the direction that tells labels apart (shown in {labels[1]}). Likeness alone proves no hidden gradient descent."  # noqa: E501
    return [first, second.replace(" of these runs", ""), third]


def _controls(data: Data) -> list[str]:
    """Where both work: the cosine of the updates, and its excess over each control."""
    columns = ("direction", "query", "unrelated", "uphill", "contrast", "assignment")
    if not data.works:
        return []
    rows = []
    for key in data.claims.groupby([*_AXES, "rule"], sort=False).groups:
        if key in data.works:
            own = _of(data.claims, key).set_index("claim")
            rows.append([*_place(key), *(_cell(own.loc[name]) for name in columns)])
    header = ["model", "task", "cosine", "over another query", "over unrelated text", "over uphill"]
    header += ["over shuffled labels (contrast part)", "over flipped labels"]
    about = (
        "Where both work: the mean cosine of the in-context and the finetuning updates over all heads, and its excess "
        "over each control. Bold: the interval lies above 0."
    )
    return [about, markdown_table(header, rows)]


def _cell(row: Any) -> str:
    if row["estimate"] != row["estimate"]:
        return "not measured" if row["verdict"] == "lacking" else "undefined"
    text = _number(row, "estimate", "low", "high")
    return f"**{text}**" if row["verdict"] == "holds" else text


def _claim(data: Data, key: str) -> str:
    claim = _NAMES[key]
    own = data.claims[(data.claims["claim"] == key) & (data.claims["verdict"] != "lacking")]
    head = f"### {claim.text}\n\n{claim.source}."
    if own["estimate"].notna().sum() == 0:
        return f"{head} No run here can say: it takes `{claim.needs}`."
    picture = f"![{claim.text.rstrip('.')}: {claim.what}](images/{_file(key)})"
    return f"{head}\n\n{picture}\n\n{_sentence(own)}"


def _sentence(own: pd.DataFrame) -> str:
    """How often it holds, how large it is where it is decided, and why the rest is undecided."""
    not_asked = own["because"].str.startswith("it is not shown that")
    asked = own[~not_asked & own["estimate"].notna()]
    parts = []
    for name in ("holds", "does not hold"):
        rows = asked[asked["verdict"] == name]
        cells = [
            f"{' on '.join(_place(key))} {_number(row, 'estimate', 'low', 'high')}"
            for key, row in zip(_keys(rows), rows.to_dict("records"), strict=True)
        ]
        if cells:
            parts.append(f"It {name} in {len(cells)} of {len(asked)}: {'; '.join(cells)}.")
    open_ = asked[asked["verdict"] == "undecided"]["because"].value_counts(sort=False)
    if len(open_):
        why = "; ".join(f"{why} ({n})" for why, n in open_.items())
        parts.append(f"It is undecided in {open_.sum()} of {len(asked)}, as {why}.")
    rest = []
    if not_asked.any():
        rest.append(f"not interpreted in {not_asked.sum()}, where it is not shown that both work")
    if undefined := int((own["estimate"].isna() & ~not_asked).sum()):
        rest.append(f"undefined in {undefined}")
    return " ".join([*parts, *([f"It is {' and '.join(rest)}."] if rest else [])])


def _pictures(data: Data, section: Section) -> list[tuple[str, str]]:
    found = []
    for key in section.claims:
        own = data.claims[(data.claims["claim"] == key) & (data.claims["verdict"] != "lacking")]
        dots = [
            Dot(", ".join(_place(place)), row["estimate"], row["low"], row["high"], row["verdict"] != "undecided")
            for place, row in zip(_keys(own), own.to_dict("records"), strict=True)
        ]
        if any(dot.estimate == dot.estimate for dot in dots):
            found.append((_file(key), dot_plot(dots, _NAMES[key].what)))
    return found


# ---- next to what was published -------------------------------------------------------------------------------------


def _published(data: Data) -> list[str]:
    accuracies, summary, tables = data.table("accuracies"), data.table("summary"), []
    natural = [key for key in accuracies.groupby([*_AXES, "rule"], sort=False).groups if key[4] == "natural"]
    for task in dict.fromkeys(key[1] for key in natural):
        sizes = {size: published_numbers(f"fairseq-dense-{size}", task, "gd") for size in ("1.3b", "2.7b")}
        known = {(n.quantity, n.source): n for numbers in sizes.values() for n in numbers if "Dai" in n.source}
        keys = [key for key in natural if key[1] == task and key[-1] == "gd"]
        rows = [
            [
                quantity,
                *(_ours(_of(accuracies, key), _of(summary, key), quantity) for key in keys),
                *(
                    next((f"{n.value:g}" for n in numbers if (n.quantity, n.source) == (quantity, source)), "")
                    for numbers in sizes.values()
                ),
            ]
            for quantity, source in known
        ]
        if rows:
            header = [
                task,
                *(", ".join([key[0], f"{key[2]} shots", *filter(None, [key[5]])]) for key in keys),
                "1.3B, published",
                "2.7B, published",
            ]
            tables.append(markdown_table(header, rows))
    if not tables:
        return []
    shots, queries = (
        sorted({run["config"][name] for run in data.runs if run["config"][name] is not None})
        for name in ("shots", "queries")
    )
    sets = sorted({len(run["config"]["seeds"]) for run in data.runs})
    text = _DIFFERS.format(sets=_range(sets), shots=_range(shots), queries=_range(queries))
    return [
        "## Next to the published tables",
        f"Numbers of arXiv:2212.10559 for Fairseq dense 1.3B and 2.7B where the task is the same; accuracies in percent. {text}",  # noqa: E501
        *tables,
    ]


def _ours(accuracies: pd.DataFrame, summary: pd.DataFrame, quantity: str) -> str:
    name = _QUANTITIES.get(quantity, quantity)
    own = accuracies[accuracies["quantity"] == name]
    if len(own):
        factor = 100 if name.startswith("accuracy") else 1
        row = own.iloc[0][["value", "low", "high"]].astype(float) * factor
        return _number(row, "value", "low", "high", "{:.1f}") if row["value"] == row["value"] else "undefined"
    own = summary[summary["statistic"] == name]
    return _number(own.iloc[0], "value", "value_low", "value_high", "{:.3f}") if len(own) else "not measured"


# ---- what was expected, and where it comes from ---------------------------------------------------------------------


def _expected(data: Data) -> list[str]:
    """Every entry of ``expected.toml`` with what came out in the run that it names."""
    if not data.expected:
        return []
    parts = ["## What was expected, and what came", "Written before the runs, with the date, and quoted as it stands."]
    for name, entry in data.expected.items():
        found = _run_of(data.claims, str(entry["run"]))
        rows = [
            [text, _came(data, found, about)]
            for about, text in entry.items()
            if about not in ("written", "run", "known") and isinstance(text, str)
        ]
        parts.append(f"### {name}\n\nWritten {entry['written']}: `{entry['run']}`")
        if "known" in entry:
            parts.append(str(entry["known"]))
        parts.append(markdown_table(["expected", "came"], rows))
    return parts


def _run_of(claims: pd.DataFrame, command: str) -> pd.DataFrame:
    """The rows of the run that a text describes by its options; a model in words is SmolLM2."""

    def option(name: str, default: str) -> str:
        match = re.search(rf"--{name} ([\w-]+)", command)
        return match[1] if match else default

    asked = {"model": option("model", "smollm2"), "task": option("task", ""), "labels": option("labels", "natural")}
    for axis, value in asked.items():
        claims = claims[claims[axis] == value]
    claims = claims[claims["shots"] == int(option("shots", "0"))]
    own = claims["directory"] == f"{option('queries', '')} queries"
    return claims[own] if own.any() else claims


def _came(data: Data, run: pd.DataFrame, about: str) -> str:
    if run.empty:
        return "not run yet"
    cells = []
    if about in ("accuracy", "item_3"):
        own = _of(data.table("accuracies"), next(iter(_keys(run))))
        wanted = own[own["quantity"].isin(_SETTINGS) | own["quantity"].str.contains("against the")]
        cells += [
            f"{row['quantity']} {_number(row, 'value', 'low', 'high', '{:.2f}')}"
            for row in wanted.to_dict("records")
            if row["value"] == row["value"] and (about == "accuracy") == (row["quantity"] in _SETTINGS)
        ]
    if about == "item_3":
        cells += _following(data, next(iter(_keys(run)))[:-1])
    if about in _MEASURED:
        cells += _measured(data, next(iter(_keys(run)))[:-1], about)
    for key in _ABOUT.get(about, (about,)):
        for row in run[(run["claim"] == key) & (run["verdict"] != "lacking")].to_dict("records"):
            numbers = "" if row["estimate"] != row["estimate"] else f" {_number(row, 'estimate', 'low', 'high')}"
            why = f" ({row['because']})" if row["because"] else ""
            cells.append(f"{_NAMES[key].what}:{numbers}, {row['verdict']}{why}")
    return "; ".join(cells) or "not measured"


def _measured(data: Data, run: Sequence[Any], about: str) -> list[str]:
    """The numbers themselves, of which a claim reads the difference."""
    name, names, column = _MEASURED[about]
    own = _of(data.table(name), run)
    if name == "ceiling":
        own = own[own["target"] == "value"]
    elif name == "summary":
        own = own[own[names].isin(_SUMMARY_ROWS[about])]
    elif name == "algebra":
        own = own[own[names].str.startswith("R^2")]
    rules = own["rule"].nunique() > 1
    low, high = ("low", "high") if "low" in own else (f"{column}_low", f"{column}_high")
    return [
        f"{row[names]}{' (layer-causal)' * (rules and row['rule'] == 'lcgd')} "
        f"{_number(row, column, low, high, '{:.3f}')}"
        for row in own.to_dict("records")
        if row[column] == row[column]
    ]


def _following(data: Data, run: Sequence[Any]) -> list[str]:
    """In context, behind the demonstrations' label words: how often what they show, and how often the natural label."""
    table = data.table("label_following")
    if table.empty:
        return []
    own = _of(table, run)
    own = own[(own["learner"] == "in context") & (own["label_words"] != "natural")]
    return [
        f"in context, {row['label_words']} labels, against the {row['against']} ones "
        f"{_number(row, 'accuracy', 'low', 'high', '{:.2f}')}"
        for row in own.to_dict("records")
    ]


def _provenance(data: Data) -> list[str]:
    models, tasks = {}, {}
    for run in data.runs:
        weights = run["weights_file"] or {}
        model = run["model"]
        sizes = f"{model['n_layers']} layers × {model['n_heads']} heads"
        checksum = str(weights.get("sha256") or model["fingerprint"])[:12]
        models[model["name"]] = [model["name"], sizes, model["quantization"] or model["dtype"], f"`{checksum}`"]
        own = run["data"]
        rows = f"{_count(own['train_rows'])} / {_count(own['validation_rows'])}"
        tasks.setdefault(run["config"]["task"], [run["config"]["task"], own["public"] or "", own["source"], rows])
    versions = dict.fromkeys(
        ", ".join(f"{name} {v}" for name, v in version.items()) for run in data.runs for version in run["versions"]
    )
    return [
        "## Models, data, versions",
        markdown_table(["model", "size", "weights", "SHA-256"], list(models.values())),
        markdown_table(["task", "public data set", "rows from", "training / validation rows"], list(tasks.values())),
        " ".join(dict.fromkeys(body["sampled"] for body in data.provenance)),
        f"Versions: {'; '.join(versions)}.",
    ]


# ---- words ----------------------------------------------------------------------------------------------------------


def _keys(rows: pd.DataFrame) -> list[tuple[Any, ...]]:
    return list(rows[[*_AXES, "rule"]].itertuples(index=False, name=None))


def _of(table: pd.DataFrame, key: Sequence[Any]) -> pd.DataFrame:
    for column, value in zip([*_AXES, "rule"], key, strict=False):  # the rule may be left open
        table = table[table[column] == value]
    return table


def _place(key: Sequence[Any]) -> list[str]:
    """Model, and task with what else tells the run apart."""
    model, task, shots, _, labels, directory, rule = key
    more = (
        [f"{shots} shots"]
        + [directory] * bool(directory)
        + [f"{labels} labels"] * (labels != "natural")
        + ["layer-causal"] * (rule == "lcgd")
    )
    return [str(model), f"{task} ({', '.join(more)})"]


def _list(keys: Sequence[Sequence[Any]]) -> str:
    return "; ".join(" on ".join(_place(key)) for key in keys)


def _number(row: Any, value: str, low: str, high: str, form: str = "{:+.3f}") -> str:
    return f"{form.format(float(row[value]))}{span_text(float(row[low]), float(row[high]), form)}"


def _range(values: Sequence[Any]) -> str:
    return str(values[0]) if len(set(values)) == 1 else f"{values[0]} to {values[-1]}"


def _count(rows: int | dict[str, int]) -> str:
    """Rows of a task; where they are made by seed, of every seed."""
    return f"{rows}" if isinstance(rows, int) else f"{_range(sorted(set(rows.values())))} a seed"


def _file(key: str) -> str:
    return f"claim-{key.replace('_', '-')}.svg"


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


if __name__ == "__main__":
    write_pages(HERE / "data", HERE)
    README.write_text(with_headline(README.read_text("utf-8"), HERE / "data"), encoding="utf-8")
