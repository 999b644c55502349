"""All checks: ``pip install -c constraints.txt nox && nox``. Every session installs what it needs.

``nox -s newest`` (not among the defaults) runs the suite on whatever is newest, without constraints.
"""

import nox

nox.options.sessions = ["lint", "tests"]
nox.options.error_on_missing_interpreters = False
nox.options.reuse_existing_virtualenvs = True

CONSTRAINTS = {"3.9": "constraints.txt", "4.3": "constraints-4x.txt"}
CODE = ("metaopt_lens", "tests", "benchmarks", "noxfile.py")


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
    """The whole suite on one TransformerLens version."""
    session.install("-c", CONSTRAINTS[lens], ".[test]")
    session.run("pytest", "-n", "2", *session.posargs)


@nox.session(default=False)
def newest(session: nox.Session) -> None:
    """The suite on the newest release of everything: tells what is coming, blocks nothing."""
    session.install("--upgrade", ".[test]")
    session.run("pytest", *session.posargs, success_codes=[0, 1])
