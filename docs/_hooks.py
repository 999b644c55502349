"""Pages of the site that are made from something else: README, notebooks, docstrings. Formulas become MathML."""

from __future__ import annotations

import ast
import base64
import html
import json
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "metaopt_lens"
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
FIRST = (
    "guide.md",
    "models.md",
    "interventions.md",
    "theory.md",
    "results.md",
    "claims.md",
    "results-bundled.md",
    "momentum.md",
)
ORDER = (
    "prompts",
    "tasks",
    "models",
    "models.tiny",
    "decomposition",
    "finetuning",
    "interventions",
    "analysis",
    "experiments",
    "records",
    "training",
    "viz",
    "runs",
    "dual",
)
SECTIONS = {
    "Prompts": ("prompts",),
    "Models": ("models", "models.tiny"),
    "Decompose": ("decomposition", "_types"),
    "Finetune": ("finetuning",),
    "Intervene": ("interventions", "patches"),
    "Compare": ("analysis",),
    "Experiments": ("experiments",),
    "Errors": ("_errors",),
}

_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)\s]+)\)")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
_LIST = re.compile(r"^(?!\s*(?:[-*]|\d+\.)\s|\s{2,}|$)(.*)\n(?=(?:[-*]|\d+\.)\s)", re.MULTILINE)
_BADGE = re.compile(r"\[!\[([^\]]*)\]\(https://[^)]*\)\]")  # a picture from elsewhere; its text is enough
_STYLE = re.compile(r"<style.*?</style>", re.DOTALL)


def _modules() -> list[str]:
    """All packages with names for users that the front page has not, the known ones in the order of the work."""
    folders = (path.parent.relative_to(PACKAGE).parts for path in PACKAGE.rglob("__init__.py"))
    public = [".".join(parts) for parts in folders if parts and not any(part.startswith("_") for part in parts)]
    found = [module for module in public if set(_public_names(module)) - set(_public_names(""))]
    return [*(m for m in ORDER if m in found), *sorted(m for m in found if m not in ORDER)]


def on_config(config: MkDocsConfig) -> None:
    """The navigation, of what there is."""
    found = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    pages = [
        *(name for name in FIRST if name in found),
        *(name for name in found if name not in FIRST),
    ]
    tutorials = [{_title(path): f"tutorials/{path.stem}.md"} for path in NOTEBOOKS]
    api: list[Any] = ["api/index.md", *({f"metaopt_lens.{m}": f"api/{m}.md"} for m in _modules())]
    config.nav = [{"Home": "index.md"}, *pages, {"Tutorials": tutorials}, {"API": api}]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the generated pages."""

    def add(name: str, content: str | bytes) -> None:
        files.append(File.generated(config, name, content=content))

    known = {file.src_uri for file in files}
    add("index.md", _relink((ROOT / "README.md").read_text(encoding="utf-8"), known))
    for path in NOTEBOOKS:
        text, pictures = _notebook(path)
        add(f"tutorials/{path.stem}.md", text)
        add(f"tutorials/{path.name}", path.read_bytes())
        for name, png in pictures.items():
            add(f"tutorials/{name}", png)
    add("api/index.md", _front())
    for module in _modules():
        add(f"api/{module}.md", _api(module))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """An empty line before every list: Python-Markdown needs it, CommonMark (GitHub, Jupyter) does not."""
    parts = _FENCE.split(markdown)
    parts[::2] = [_LIST.sub(r"\1\n\n", text) for text in parts[::2]]
    return "".join(parts)


def on_page_content(content: str, **_: Any) -> str:
    """LaTeX to MathML, which browsers draw without any script."""

    def formula(match: re.Match[str]) -> str:
        display = match[2] == "["
        markup = convert(html.unescape(match[3]).strip(), display="block" if display else "inline")
        return f'<div class="formula">{markup}</div>' if display else markup

    return _FORMULA.sub(formula, content)


def _relink(text: str, known: set[str]) -> str:
    """Links of the repository's front page as links of the site; what the site does not have stays as text."""

    def link(match: re.Match[str]) -> str:
        bang, label, target = match.groups()
        path, mark, anchor = target.removeprefix("./").partition("#")
        if path.startswith("tutorials/"):
            path = "tutorials/" + (Path(path).stem if path.endswith(".ipynb") else NOTEBOOKS[0].stem) + ".md"
            return f"{bang}[{label}]({path})"
        path = path.removeprefix("docs/")
        if path in known:
            return f"{bang}[{label}]({path}{mark}{anchor})"
        return "" if bang else label

    return _LINK.sub(link, text)


def _title(path: Path) -> str:
    first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"]
    return "".join(first).partition("\n")[0].lstrip("# ").replace(" · ", ". ")


def _notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook with its stored outputs, as Markdown and pictures."""
    parts, pictures = [], {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(_BADGE.sub(r"[\1]", source))
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem[:2]}-{len(pictures)}.png"
                pictures[name] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![output]({name})")
            elif "text/html" in data:
                parts.append(f'<div class="output">{_STYLE.sub("", "".join(data["text/html"]))}</div>')
            else:
                text = "".join(output.get("text", data.get("text/plain", ""))).rstrip("\n")
                parts.append(f'<div class="output"><pre><code>{html.escape(text)}</code></pre></div>')
    parts.insert(1, f"[Download this notebook]({path.name}){{ download }}")
    return "\n\n".join(parts) + "\n", pictures


def _public_names(module: str) -> list[str]:
    """What a package lists in ``__all__`` (or loads lazily from ``_HOME``), in the order of its imports."""
    tree = ast.parse((PACKAGE / module.replace(".", "/") / "__init__.py").read_text(encoding="utf-8"))
    values = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    if "__all__" not in values:  # for this package alone
        return []
    listed = ast.literal_eval(values.get("_HOME", values["__all__"]))
    imports = [found for found in ast.walk(tree) if isinstance(found, ast.ImportFrom)]
    return [alias.name for found in imports for alias in found.names if alias.name in listed]


def _front() -> str:
    """The page of the names that `metaopt_lens` itself has, by what they are about."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (home,) = [ast.literal_eval(node.value) for node in tree.body if ast.unparse(node).startswith("_HOME = ")]
    if strange := set(home.values()) - {room for rooms in SECTIONS.values() for room in rooms}:
        raise ValueError(f"SECTIONS of docs/_hooks.py has no place for the public names of {strange}")
    parts = ["# metaopt_lens", "```python\nimport metaopt_lens as ml\n```"]
    for title, rooms in SECTIONS.items():
        names = [name for name in _public_names("") if home[name] in rooms]
        parts += [f"## {title}"] * bool(names)
        parts += [f"::: metaopt_lens.{name}\n    options: {{ heading_level: 3 }}" for name in names]
    return "\n\n".join(parts) + "\n"


def _api(module: str) -> str:
    front = _public_names("")
    members = "".join(f"        - {name}\n" for name in _public_names(module) if name not in front)
    return (
        f"# metaopt_lens.{module}\n\n::: metaopt_lens.{module}\n    options:\n      show_root_heading: false\n"
        f"      show_root_toc_entry: false\n      members:\n{members}"
    )
