"""The conformance kit, on the part and on examples that it would not draw."""

from luthier.testing import conformance
from luthier_slao import Slao, luthier_adapters


@conformance(luthier_adapters(), examples=[Slao(target_modules="all-linear"), Slao(r=2, target_modules=["down_proj"])])
def test_conforms(check):
    check()
