"""luthier-trackio keeps what every callback must keep."""

from luthier.testing import conformance
from luthier_trackio import luthier_callbacks


@conformance(luthier_callbacks(), vary=False)  # a Space or a server would ask for a token
def test_conforms(check):
    check()
