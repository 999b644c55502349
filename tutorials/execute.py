"""Execute the tutorials, each from a clean kernel.

``python tutorials/execute.py`` runs all of them and stops at the first error: this is what CI does.
``--weights bundled`` leaves out those that load a pretrained model, ``--weights pretrained`` runs
only them.
``python tutorials/execute.py --save [NAME ...]`` also stores their outputs, with nothing of this
machine in them. Stored pictures are plotly's own data and, for viewers that run no JavaScript, a
PNG; that one needs Chromium.
"""

from __future__ import annotations

import argparse
import base64
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
SECONDS_PER_CELL = 900  # ends what hangs; a shared machine may be slow
PLOTLY = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"
WIDTH = 820


def needs_pretrained(path: Path) -> bool:
    """Whether a notebook loads SmolLM2, whose weights are a package of their own."""
    cells = nbformat.read(path, as_version=4).cells
    return any("smollm2" in cell.source for cell in cells if cell.cell_type == "code")


def execute(path: Path) -> nbformat.NotebookNode:
    """Run all cells in a fresh kernel of this Python; anything on stderr is an error."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=SECONDS_PER_CELL,
        kernel_name="python3",
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(FOLDER)}},
    )
    client.execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                raise RuntimeError(
                    f"{path.name}: a cell wrote to stderr:\n{output.text}\nThe cell:\n{cell.source}"
                )
    return notebook


def clean(
    notebook: nbformat.NotebookNode, picture: Callable[[dict[str, Any]], bytes | None]
) -> None:
    """Keep what a reader sees: no metadata of kernel or machine, pictures as pictures."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":  # progress bars are nothing without their kernel
            cell.outputs = [
                output for output in cell.outputs if WIDGET not in output.get("data", {})
            ]
        for output in cell.get("outputs", []):
            output.pop("metadata", None)
            if "data" not in output:
                continue
            output.metadata = {}
            png = picture(output.data)
            if png is not None:
                output.data["image/png"] = base64.b64encode(png).decode()
                # A view is up to a megabyte of JavaScript: live where it is run, else a PNG.
                output.data.pop("text/html", None)
                output.data.setdefault("text/plain", "")
    nbformat.validate(notebook)


class Camera:
    """Takes pictures of plotly figures and HTML views in a headless Chromium."""

    def __enter__(self) -> Camera:
        from playwright.sync_api import sync_playwright
        from plotly.offline import get_plotlyjs

        found = shutil.which("chromium") or shutil.which("google-chrome")
        self._playwright = sync_playwright().start()
        self._browser = self._playwright.chromium.launch(
            executable_path=found, args=["--no-sandbox"]
        )
        self._page = self._browser.new_page(
            viewport={"width": WIDTH, "height": 600}, device_scale_factor=1.5
        )
        self._plotly_js = get_plotlyjs()
        return self

    def __exit__(self, *_: object) -> None:
        self._browser.close()
        self._playwright.stop()

    def __call__(self, data: dict[str, Any]) -> bytes | None:
        """A PNG of an output, or None if it is neither a figure nor a view."""
        if PLOTLY in data:
            self._page.set_content('<div id="shot"></div>')
            self._page.add_script_tag(content=self._plotly_js)
            figure = {
                "data": data[PLOTLY]["data"],
                "layout": {"width": WIDTH, **data[PLOTLY]["layout"]},
            }
            draw = (
                "figure => Plotly.newPlot('shot', figure.data, figure.layout, {staticPlot: true})"
            )
            self._page.evaluate(draw, figure)
            shown = self._page.locator("#shot .svg-container")
        elif "<script" in data.get("text/html", ""):
            self._page.set_content(
                f'<div id="shot" style="background: white">{data["text/html"]}</div>'
            )
            shown = self._page.locator("#shot")
        else:
            return None
        self._page.wait_for_timeout(500)
        return shown.screenshot()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="only notebooks whose name begins so (default: all)",
    )
    parser.add_argument("--save", action="store_true", help="store the outputs in the notebooks")
    parser.add_argument(
        "--weights", choices=["bundled", "pretrained"], help="only those (default: all)"
    )
    options = parser.parse_args()
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"
    os.environ.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # on a busy machine threads make a model this small ten times slower
    if os.environ.get("METAOPT_LENS_NETWORK") != "1":
        os.environ["HF_HUB_OFFLINE"] = (
            "1"  # no waiting for retries: the notebook says that it goes on without the hub
        )
    paths = [
        p for p in sorted(FOLDER.glob("*.ipynb")) if p.name.startswith(tuple(options.names) or "")
    ]
    if options.weights:
        wanted = options.weights == "pretrained"
        paths = [path for path in paths if needs_pretrained(path) is wanted]
    if not paths:
        sys.exit(f"no notebook in {FOLDER.name}/ begins with {' or '.join(options.names)}")
    began = time.perf_counter()
    for path in paths:
        start = time.perf_counter()
        notebook = execute(path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)
        if options.save:
            with Camera() as camera:
                clean(notebook, camera)
            nbformat.write(notebook, path)
    print(f"all: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
