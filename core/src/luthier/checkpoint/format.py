"""The format of checkpoints that this luthier writes."""

from __future__ import annotations

from typing import Final

FORMAT: Final = 4
