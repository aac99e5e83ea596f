"""An entry module that imports torch, as none may."""

from __future__ import annotations

import attrs
import torch
from luthier.plugins.options import option


@attrs.frozen(kw_only=True)
class HeavyOptions:
    size: int = option(torch.finfo(torch.float32).bits, help="Bits of a float.")
