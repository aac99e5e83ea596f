"""The kit's checks against the fake."""

from fake_cluster import FakeCluster
from luthier.testing import conformance
from luthier_kubernetes import luthier_providers


@conformance(luthier_providers(), fake=FakeCluster)
def test_conforms(check):
    check()
