"""What Luthier asks of every quantizer and optimizer."""

import pytest
from luthier.testing import conformance
from luthier_torchao import TorchaoFloat8, TorchaoInt4, luthier_optimizers, luthier_quantizers

QUANTIZERS = {one.name: one for one in luthier_quantizers()}
OPTIMIZERS = {one.name: one for one in luthier_optimizers()}


@conformance([QUANTIZERS["torchao.int4"]], examples=[TorchaoInt4(mapping="symmetric", group_size=64)])
def test_the_quantizer_conforms(check):
    check()


@pytest.mark.slow
@conformance([QUANTIZERS["torchao.int8"]])
def test_the_other_quantizer_conforms(check):
    check()


@pytest.mark.slow
@conformance(
    [QUANTIZERS["torchao.float8"]],
    examples=[TorchaoFloat8(recipe_name="rowwise", emulate=True), TorchaoFloat8(recipe_name="rowwise_with_gw_hp")],
)
def test_the_quantizer_of_training_conforms(check):
    check()


@pytest.mark.slow
@conformance(list(OPTIMIZERS.values()))
def test_the_optimizers_conform(check):
    check()
