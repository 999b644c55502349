"""How commands take a model."""

from __future__ import annotations

from typing import Annotated

import typer

MODEL_HELP = (
    "A GGUF file, a local folder, a name on the hub, 'smollm2' or 'gemma3-270m' from packages, or 'tiny' for the "
    "bundled model."
)

Model = Annotated[str, typer.Option("--model", help=MODEL_HELP)]
NoCache = Annotated[
    bool, typer.Option("--no-cache", help="Convert a GGUF file each time, and keep nothing in the cache.")
]
