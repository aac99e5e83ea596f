"""The names of the engine's operations, for which a plugin may offer a faster form. This module imports no torch.

The signatures are those of the references in `luthier.model.operations`; docs/hooks.md shows them.
"""

from __future__ import annotations

from typing import Final

OPERATIONS: Final = (
    "rms_norm",
    "add_rms_norm",
    "rope",
    "swiglu",
    "geglu",
    "linear",
    "token_logprobs",
    "document_attention",
)
