"""State carried through a checkpoint: written to files and read again, by the engine's own code."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def carry_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree after a checkpoint: fresh tensors and JSON values.

    Raises `checkpoint-state` for anything else.
    """
    from luthier.state_tree import load_state, save_state

    with tempfile.TemporaryDirectory() as folder:
        save_state(tree, Path(folder))
        return load_state(Path(folder))
