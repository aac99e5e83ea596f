"""Puts the folder of `mutants` on the path, so that records can name their classes as any plugin's."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = str(Path(__file__).parent)
if HERE not in sys.path:
    sys.path.insert(0, HERE)
