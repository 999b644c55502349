"""Style sheet and JavaScript, inlined: circuitsvis's bundle comes with its pip package, plotly's with plotly."""

from __future__ import annotations

from functools import cache
from html import escape
from importlib.resources import files

# The page may run what it carries and load nothing: the browser itself keeps it off the network.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
)


def page(title: str, body: str, *, with_plotly: bool) -> str:
    """A whole HTML document that carries everything it needs, each library once."""
    libraries = f"<script>{circuitsvis_js()}</script>"
    if with_plotly:
        libraries = f"<script>{_plotly_js()}</script>{libraries}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_own('page.css')}</style>\n{libraries}\n</head>\n"
        f'<body class="ml">\n<main>\n{body}\n</main>\n<script>{_own("page.js")}</script>\n</body>\n</html>\n'
    )


def standalone(html: str) -> str:
    """A fragment for a notebook's output; a second one in the same notebook does not load the bundle again."""
    return (
        f'<style>{_own("page.css")}</style><div class="ml">{html}</div>'
        f'<script>if (typeof CircuitsVis === "undefined") {{ {circuitsvis_js()}\n'
        f"window.CircuitsVis = CircuitsVis; }}\n{_own('page.js')}</script>"
    )


@cache
def circuitsvis_js() -> str:
    """The bundle that defines the global `CircuitsVis`, safe inside a script element."""
    text = (files("circuitsvis") / "dist" / "cdn" / "iife.js").read_text(encoding="utf-8")
    code = text.partition("//# sourceMappingURL=")[0]
    return code.replace("</script", "<\\/script")


@cache
def _plotly_js() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs()).replace("</script", "<\\/script")


@cache
def _own(name: str) -> str:
    return (files("metaopt_lens.viz") / "assets" / name).read_text(encoding="utf-8")
