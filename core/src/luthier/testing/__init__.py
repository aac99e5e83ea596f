"""The conformance kit for plugin authors, and the tiny models that it and luthier's own tests run on.

    from luthier.testing import conformance
    from luthier_muon import luthier_optimizers

    @conformance(luthier_optimizers())
    def test_conforms(check):
        check()

Importing it loads neither torch nor hypothesis; torch is loaded when a check that needs it runs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "luthier.testing.checks": ("Check", "checks_for", "conformance"),
    "luthier.testing.strategies": ("options_of",),
    "luthier.testing.contexts": ("context",),
    "luthier.testing.raised.expected_error": ("expect_error",),
    "luthier.testing.raised.fault_injection": ("raise_inside",),
    "luthier.testing.policies": ("TablePolicy",),
    "luthier.testing.loopback": ("Fault", "LoopbackServer", "Reply", "Request"),
    "luthier.logs": ("captured_logs",),
    "luthier.testing.providers.fake_wire": ("FakeWire",),
    "luthier.testing.providers.provider_bench": ("FakeService",),
    "luthier.testing.providers.virtual_clock": ("VirtualClock",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = [
    "Check",
    "FakeService",
    "FakeWire",
    "Fault",
    "LoopbackServer",
    "Reply",
    "Request",
    "TablePolicy",
    "VirtualClock",
    "captured_logs",
    "checks_for",
    "conformance",
    "context",
    "expect_error",
    "options_of",
    "raise_inside",
]

if TYPE_CHECKING:
    from luthier.logs import captured_logs
    from luthier.testing.checks import Check, checks_for, conformance
    from luthier.testing.contexts import context
    from luthier.testing.loopback import Fault, LoopbackServer, Reply, Request
    from luthier.testing.policies import TablePolicy
    from luthier.testing.providers.fake_wire import FakeWire
    from luthier.testing.providers.provider_bench import FakeService
    from luthier.testing.providers.virtual_clock import VirtualClock
    from luthier.testing.raised.expected_error import expect_error
    from luthier.testing.raised.fault_injection import raise_inside
    from luthier.testing.strategies import options_of


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'luthier.testing' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
