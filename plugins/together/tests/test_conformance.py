"""The kit's checks against the fake."""

from fake_together import FakeTogether
from luthier.testing import conformance
from luthier_together import luthier_providers


@conformance(luthier_providers(), fake=FakeTogether)
def test_conforms(check):
    check()
