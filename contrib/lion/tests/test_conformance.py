"""What Luthier asks of every optimizer."""

from luthier.testing import conformance
from luthier_lion import Lion, luthier_optimizers


@conformance(luthier_optimizers(), examples=[Lion(betas=(0.95, 0.98), weight_decay=0.3)])
def test_conforms(check):
    check()
