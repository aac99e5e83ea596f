"""The kit's checks against the fake."""

from fake_anyscale import FakeAnyscale
from luthier.testing import conformance
from luthier_anyscale import luthier_providers


@conformance(luthier_providers(), fake=FakeAnyscale)
def test_conforms(check):
    check()
