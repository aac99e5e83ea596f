"""The kit's checks against the fake."""

from fake_ray import FakeRay
from luthier.testing import conformance
from luthier_ray import luthier_providers


@conformance(luthier_providers(), fake=FakeRay)
def test_conforms(check):
    check()
