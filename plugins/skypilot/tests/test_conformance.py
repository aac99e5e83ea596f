"""The kit's checks against the fake."""

import pytest
from fake_skypilot import FakeSkypilot
from luthier.testing import conformance
from luthier_skypilot import luthier_providers


@pytest.mark.slow
@conformance(luthier_providers(), fake=FakeSkypilot)
def test_conforms(check):
    check()
