"""What Luthier asks of every quantizer and optimizer; pages need a GPU."""

import pytest
from luthier.testing import conformance
from luthier_bitsandbytes import BnbNf4, luthier_optimizers, luthier_quantizers

QUANTIZERS = {one.name: one for one in luthier_quantizers()}


@conformance([QUANTIZERS["bnb.nf4"]], examples=[BnbNf4(use_double_quant=False)])
def test_the_quantizer_conforms(check):
    check()


@pytest.mark.slow
@conformance([QUANTIZERS["bnb.fp4"], QUANTIZERS["bnb.int8"]])
def test_the_other_quantizers_conform(check):
    check()


@pytest.mark.slow
@conformance([one for one in luthier_optimizers() if "paged" not in one.name])
def test_the_optimizers_conform(check):
    check()
