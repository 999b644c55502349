"""README.md and its Python blocks: those that the suite runs, and those that need a pretrained model's weights."""

from __future__ import annotations

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
_PRETRAINED = re.compile(r"""load_model\(["'](?!tiny["'])""")
_BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
BUNDLED_BLOCKS = [code for code in _BLOCKS if not _PRETRAINED.search(code)]
PRETRAINED_BLOCKS = [code for code in _BLOCKS if _PRETRAINED.search(code)]
