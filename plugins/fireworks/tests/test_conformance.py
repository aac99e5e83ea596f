"""The kit's checks against the fake."""

from fake_fireworks import FakeFireworks
from luthier.testing import conformance
from luthier_fireworks import luthier_providers


@conformance(luthier_providers(), fake=FakeFireworks)
def test_conforms(check):
    check()
