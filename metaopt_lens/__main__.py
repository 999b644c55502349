"""``python -m metaopt_lens``."""

from metaopt_lens.cli import main

main()
