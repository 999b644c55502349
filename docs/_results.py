"""Write docs/results.md, docs/claims.md, their pictures and README's headline: ``python docs/_results.py``.

No number is typed by hand: tables and sentences are made from ``docs/data/*.csv``, ``provenance.json`` and, for what
was expected before the runs, ``expected.toml``. Folders in ``docs/data`` with a ``provenance.json`` are read too.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

sys.path.insert(0, str(Path(__file__).parent))

from _dot_plot import Dot, dot_plot
from _result_data import SETTINGS, Data, count, keys_of, listed, number, place, rows_of, runs_of, span
from _result_expected import expected

from metaopt_lens.experiments import CLAIMS, claims_markdown, markdown_table, published_numbers

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
_NAMES = {claim.key: claim for claim in CLAIMS}
PRETRAINED = {"smollm2": "SmolLM2-135M", "gemma3-270m": "Gemma-3-270M"}


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
        ("sim_aou_analytic", "normalisation", "trained", "untrained", "layer_causal"),
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
_DIFFERS = (
    "What differs: smaller models; the mean over {sets} demonstration sets instead of the best of seven; {shots} "
    "demonstrations instead of up to 32; {queries} queries a set instead of all validation rows; outputs are read "
    "where the label is predicted, not at the label token; the learning rate is chosen on held-out rows instead of the "
    "validation rows."
)
_QUANTITIES = {"Rec2FTP": "Rec2FTP %", "Kendall": "Kendall, token level"}


def write_pages(found: Data, out: Path) -> list[Path]:
    """Write both pages and the pictures.

    Args:
        found: the exported tables.
        out: where the pages go, and ``images`` for the pictures.
    """
    pictures = {name: text for section in SECTIONS for name, text in _pictures(found, section)}
    pages = {"results.md": _results(found), "claims.md": _claims(found)}
    pages |= {f"images/{name}": text for name, text in pictures.items()}
    for name, text in pages.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in pages]


def with_headline(readme: str, found: Data) -> str:
    """README with the lines between its two marks made from the tables.

    Args:
        readme: its text.
        found: the exported tables.
    """
    lines = "\n".join(f"- {line}" for line in _headline(found))
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
    parts += _published(data) + expected(data) + _provenance(data)
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
        f"{len(data.runs)} runs of {models} on {tasks} tasks, finished {span(dates)}. Every number on this page is "
        "made from the tables in `docs/data` by `python docs/_results.py`. Intervals are 95 % t intervals over "
        "demonstration sets, in brackets; where the sets agree exactly there is none. [How to repeat a row](atlas.md); "
        "[all claims as a table](claims.md)."
    )
    if named := [f"`{name}`" for name in data.names if name]:
        queries = sorted({run["config"]["queries"] for run in data.provenance[0]["runs"].values()})
        text += (
            f" Runs ask {span(queries)} queries behind each set; those marked {' and '.join(named)} belong to "
            "[all controls on one task](atlas.md#all-controls-on-one-task)."
        )
    return f"{text}\n\nNot finished when the tables were exported: {', '.join(left)}." if left else text


def _accuracies(data: Data) -> str:
    table, rows = data.table("accuracies"), []
    for key in runs_of(table):
        cells = rows_of(table, key).set_index("quantity")
        found = [number(cells.loc[name], "value", "low", "high", "{:.2f}") for name in SETTINGS]
        rows.append([*place(key), *found, int(cells.loc["accuracy ZS", "n"]), _shown(data, key)])
    header = ["model", "task", "zero-shot", "in context", "finetuned", "queries", "shown to work"]
    return markdown_table(header, rows)


def _shown(data: Data, key: Sequence[Any]) -> str:
    own = rows_of(data.claims, key)
    words = {"learns": "in-context learning", "finetunes": "finetuning"}
    found = [word for claim, word in words.items() if (own[own["claim"] == claim]["verdict"] == "holds").any()]
    return "both" if len(found) == 2 else " and ".join(found) or "neither"


def _interpreted(data: Data) -> str:
    runs = runs_of(data.claims)
    both = [key for key in runs if key in data.works]
    rest = [key for key in runs if key not in data.works]
    text = (
        f"In {len(both)} of {len(runs)} runs both are shown to work; only there is a similarity of the two "
        "interpreted. In the figures filled circles are decided, empty ones are not."
    )
    return text + (f"\n\nNot interpreted: {listed(rest)}." if both and rest else "")


def _headline(data: Data) -> list[str]:
    """Three lines: where both work; how alike the updates are there, and what depends on the labels; what else is."""
    own = data.claims[data.claims["model"].isin(PRETRAINED) & (data.claims["labels"] == "natural")]
    own = own[(own["rule"] == "gd") & (own["directory"] == data.names[0])]
    runs = runs_of(own)
    both = [key for key in runs if key in data.works]
    models = " and ".join(dict.fromkeys(PRETRAINED[key[0]] for key in runs))
    first = f"{models} on {len({key[1] for key in runs})} tasks: in {len(both)} of {len(runs)} runs, in-context learning and finetuning both raise the accuracy"  # noqa: E501
    if not both:
        return [f"{first}."]
    tasks = {model: ", ".join(key[1] for key in both if key[0] == model) for model in PRETRAINED}
    named = "; ".join(f"{PRETRAINED[model]} on {found}" for model, found in tasks.items() if found)
    shown = own[[key in both for key in keys_of(own)]]

    def told(claim: str) -> tuple[str, str]:
        rows = shown[(shown["claim"] == claim) & shown["estimate"].notna()]
        ends = dict.fromkeys(f"{value:+.2f}" for value in (rows["estimate"].min(), rows["estimate"].max()))
        return " to ".join(ends), f"{(rows['verdict'] == 'holds').sum()} of {len(rows)}"

    alike, labels = told("direction"), told("contrast")
    second = f"There both move the heads alike: mean cosine {alike[0]}; more than finetuning uphill in {told('uphill')[1]}, on unrelated text in {told('unrelated')[1]}. What depends on the labels shown is small: {labels[0]} in the direction that tells labels apart (shown in {labels[1]})."  # noqa: E501
    return [f"{first} ({named}).", second, *_against(data)]


def _against(data: Data) -> list[str]:
    """Where both work and every control was run: what permuted weights, and one constant vector, do as well."""
    rows = data.claims[(data.claims["claim"] == "trained") & data.claims["model"].isin(PRETRAINED)]
    rows = rows[[key in data.works for key in keys_of(rows)]].dropna(subset="estimate")
    if rows.empty:
        return []
    row, key = rows.iloc[0], keys_of(rows)[0]
    table = rows_of(data.table("ceiling"), key)
    fit = table[table["target"] == "value"].set_index("update")["r_squared"]
    constant, finetuned = fit["one constant vector"], fit["finetuning, scaled"]
    return [
        f"Likeness alone is weak evidence. For {PRETRAINED[key[0]]} on {key[1]}, its excess over a model with permuted "
        f"weights is {number(row, 'estimate', 'low', 'high', '{:+.2f}')}; on other queries, one constant vector "
        f"explains R² {constant:.2f} of the in-context updates, finetuning {finetuned:.2f}."
    ]


def _controls(data: Data) -> list[str]:
    """Where both work: the cosine of the updates, and its excess over each control."""
    columns = ("direction", "query", "unrelated", "uphill", "contrast", "assignment")
    if not data.works:
        return []
    rows = []
    for key in runs_of(data.claims):
        if key in data.works:
            own = rows_of(data.claims, key).set_index("claim")
            rows.append([*place(key), *(_cell(own.loc[name]) for name in columns)])
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
    text = number(row, "estimate", "low", "high")
    return f"**{text}**" if row["verdict"] == "holds" else text


def _evaluated(data: Data, claim: str) -> pd.DataFrame:
    """The runs that have made what a claim reads."""
    return data.claims[(data.claims["claim"] == claim) & (data.claims["verdict"] != "lacking")]


def _claim(data: Data, key: str) -> str:
    claim, own = _NAMES[key], _evaluated(data, key)
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
            f"{' on '.join(place(key))} {number(row, 'estimate', 'low', 'high')}"
            for key, row in zip(keys_of(rows), rows.to_dict("records"), strict=True)
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
        own = _evaluated(data, key)
        dots = [
            Dot(", ".join(place(run)), row["estimate"], row["low"], row["high"], row["verdict"] != "undecided")
            for run, row in zip(keys_of(own), own.to_dict("records"), strict=True)
        ]
        if any(dot.estimate == dot.estimate for dot in dots):
            found.append((_file(key), dot_plot(dots, _NAMES[key].what)))
    return found


# ---- next to what was published -------------------------------------------------------------------------------------


def _published(data: Data) -> list[str]:
    accuracies, summary, tables = data.table("accuracies"), data.table("summary"), []
    natural = [key for key in runs_of(accuracies) if key[4] == "natural"]
    for task in dict.fromkeys(key[1] for key in natural):
        sizes = {size: published_numbers(f"fairseq-dense-{size}", task, "gd") for size in ("1.3b", "2.7b")}
        known = {(n.quantity, n.source): n for numbers in sizes.values() for n in numbers if "Dai" in n.source}
        keys = [key for key in natural if key[1] == task and key[-1] == "gd"]
        rows = [
            [
                quantity,
                *(_ours(rows_of(accuracies, key), rows_of(summary, key), quantity) for key in keys),
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
    text = _DIFFERS.format(sets=span(sets), shots=span(shots), queries=span(queries))
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
        return number(row, "value", "low", "high", "{:.1f}") if row["value"] == row["value"] else "undefined"
    own = summary[summary["statistic"] == name]
    return number(own.iloc[0], "value", "value_low", "value_high", "{:.3f}") if len(own) else "not measured"


# ---- where it comes from ---------------------------------------------------------------------------------------------


def _provenance(data: Data) -> list[str]:
    models, tasks = {}, {}
    for run in data.runs:
        weights = run["weights_file"] or {}
        model = run["model"]
        sizes = f"{model['n_layers']} layers × {model['n_heads']} heads"
        checksum = str(weights.get("sha256") or model["fingerprint"])[:12]
        models[model["name"]] = [model["name"], sizes, model["quantization"] or model["dtype"], f"`{checksum}`"]
        own = run["data"]
        rows = f"{count(own['train_rows'])} / {count(own['validation_rows'])}"
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


def _file(key: str) -> str:
    return f"claim-{key.replace('_', '-')}.svg"


if __name__ == "__main__":
    tables = Data(HERE / "data")
    write_pages(tables, HERE)
    README.write_text(with_headline(README.read_text("utf-8"), tables), encoding="utf-8")
