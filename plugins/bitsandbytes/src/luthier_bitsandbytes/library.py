"""bitsandbytes, imported without a look at the network: where the package `kernels` is, it would fetch a binary."""

from __future__ import annotations

from typing import Any

from luthier import import_offline

bitsandbytes: Any = import_offline("bitsandbytes")
functional: Any = import_offline("bitsandbytes.functional")
