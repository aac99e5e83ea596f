"""The kit's checks against the fake."""

from fake_bedrock import FakeBedrock
from luthier.testing import conformance
from luthier_bedrock import luthier_providers


@conformance(luthier_providers(), fake=FakeBedrock)
def test_conforms(check):
    check()
