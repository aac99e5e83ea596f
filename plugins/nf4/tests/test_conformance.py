"""What Luthier asks of every quantizer."""

from luthier.testing import conformance
from luthier_nf4 import Nf4, luthier_quantizers


@conformance(luthier_quantizers(), examples=[Nf4(block_size=32, skip_modules=["mlp"]), Nf4(use_double_quant=False)])
def test_conforms(check):
    check()
