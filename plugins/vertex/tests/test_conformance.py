"""The kit's checks against the fake."""

from fake_vertex import FakeVertex
from luthier.testing import conformance
from luthier_vertex import luthier_providers


@conformance(luthier_providers(), fake=FakeVertex)
def test_conforms(check):
    check()
