"""bitsandbytes, imported without asking a hub for anything: it would fetch a binary where the package `kernels` is."""

from __future__ import annotations

import os
from typing import Any

_BEFORE = os.environ.get("HF_HUB_OFFLINE")
os.environ["HF_HUB_OFFLINE"] = "1"
try:
    import bitsandbytes as _bitsandbytes
    import bitsandbytes.functional as _functional
finally:
    if _BEFORE is None:
        del os.environ["HF_HUB_OFFLINE"]
    else:
        os.environ["HF_HUB_OFFLINE"] = _BEFORE

bitsandbytes: Any = _bitsandbytes
functional: Any = _functional
