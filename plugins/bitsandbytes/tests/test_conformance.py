"""What Luthier asks of every quantizer and optimizer."""

from luthier.testing import conformance
from luthier_bitsandbytes import BnbNf4, luthier_optimizers, luthier_quantizers

OPTIMIZERS = [one for one in luthier_optimizers() if "paged" not in one.name]


@conformance([one for one in luthier_quantizers() if one.name == "bnb.nf4"], examples=[BnbNf4(use_double_quant=False)])
def test_the_quantizer_conforms(check):
    check()
