"""The command line: a command parses its options, calls one function of the library, and shows what comes back.

Everything heavy is imported inside the commands, so that --help answers at once.
"""

from metaopt_lens.cli._app import app as app
from metaopt_lens.cli._app import main as main
