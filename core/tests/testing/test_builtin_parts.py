"""The core's own parts pass the kit that everyone else's must."""

from __future__ import annotations

from luthier import builtin
from luthier.testing import conformance

RECORDS = [
    *builtin.luthier_adapters(),
    *builtin.luthier_losses(),
    *builtin.luthier_optimizers(),
    *builtin.luthier_quantizers(),
    *builtin.luthier_providers(),
    *builtin.luthier_callbacks(),
]


@conformance(RECORDS)
def test_conforms(check):
    check()
