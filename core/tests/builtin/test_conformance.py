"""The core's own parts pass the kit that everyone else's must pass."""

from luthier import builtin
from luthier.testing import conformance


@conformance(builtin.luthier_adapters())
def test_adapters_conform(check):
    check()


@conformance(builtin.luthier_losses())
def test_losses_conform(check):
    check()


@conformance(builtin.luthier_optimizers())
def test_optimizers_conform(check):
    check()


@conformance(builtin.luthier_quantizers())
def test_quantizers_conform(check):
    check()


@conformance(builtin.luthier_callbacks())
def test_callbacks_conform(check):
    check()
