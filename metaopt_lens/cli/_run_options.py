"""The options of ``run``: settings of a run, each None unless it is given, so that a file's settings stay."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from metaopt_lens.cli._options import Labels, Selection, Variant

Out = Annotated[Path, typer.Option("--out", help="Directory of the results; an unfinished run there is resumed.")]
Config = Annotated[
    Path | None, typer.Option(help="TOML or JSON file with settings; options given here take precedence.")
]
TaskName = Annotated[
    str | None, typer.Option(help="sst2, sst5, mr, subj, agnews, cb, word-pairs, synthetic, ..., or a TOML file.")
]
Data = Annotated[
    str | None, typer.Option(help="Local file or folder with the task's rows (default: the hub).", metavar="PATH")
]
Shots = Annotated[int | None, typer.Option(help="Demonstrations, or as many as fit the context window (default 32).")]
Seeds = Annotated[
    str | None, typer.Option(help="How many demonstration sets, or their seeds, such as 1,2,5 (default 3).")
]
Queries = Annotated[int | None, typer.Option(help="How many rows to use as queries (default: all).")]
TemplateVariant = Annotated[
    Variant | None, typer.Option(help="Form of the templates: as published, or the released code's one-line form.")
]
Chosen = Annotated[Selection | None, typer.Option(help="How demonstrations are chosen (default balanced).")]
LabelWords = Annotated[
    Labels | None,
    typer.Option(
        "--labels",
        help="Label words of the demonstrations: natural (default), flipped, so that each stands for another one, or "
        "neutral; with the last two, also who follows them, over learning rates.",
    ),
]
Rules = Annotated[str | None, typer.Option(help="gd, lcgd, or gd,lcgd (default).")]
LabelDraws = Annotated[
    int | None,
    typer.Option(help="Shuffles of the labels for each set, averaged (as --controls says: 0, 1 or 4; each is a run)."),
]
RandomWeights = Annotated[
    bool | None,
    typer.Option(
        "--random-weights/--no-random-weights", help="Also run on permuted weights (else as --controls says)."
    ),
]
Unrelated = Annotated[
    bool | None,
    typer.Option("--unrelated/--no-unrelated", help="Also finetune on unrelated texts (else as --controls says)."),
]
Attribution = Annotated[
    bool | None, typer.Option("--attribution/--no-attribution", help="Measure every head's effect (default yes).")
]
Further = Annotated[
    bool | None,
    typer.Option(
        "--further/--no-further",
        help="Also ask the further questions: ceiling, optimisers, order and company of demonstrations (else as "
        "--controls says).",
    ),
]
Profile = Annotated[
    bool | None,
    typer.Option("--profile/--no-profile", help="Also score every head by several theories (default no)."),
]
Patch = Annotated[
    bool | None,
    typer.Option("--patch/--no-patch", help="Also fit one weight patch for all queries and test it (default no)."),
]
Reference = Annotated[
    bool | None, typer.Option("--reference/--no-reference", help="Metrics with the published code's choices.")
]
Devices = Annotated[int | None, typer.Option(help="Spread the model over this many devices.")]
DeviceMap = Annotated[
    str | None, typer.Option(help="Placement of the modules, such as auto; passed to TransformerLens.")
]
Together = Annotated[int | None, typer.Option(help="Sequences run together (default 16).")]
SaveUpdates = Annotated[
    bool | None, typer.Option("--save-updates/--no-save-updates", help="Store the weight updates as well.")
]
