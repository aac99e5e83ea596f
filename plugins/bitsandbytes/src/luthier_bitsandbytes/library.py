"""Import bitsandbytes without network access: with the package `kernels` it would download a binary."""

from __future__ import annotations

from typing import Any

from luthier import import_offline

bitsandbytes: Any = import_offline("bitsandbytes")
functional: Any = import_offline("bitsandbytes.functional")
