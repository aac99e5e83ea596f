"""The kit's checks against the fake; OpenAI's plugin stands on the same service of the core in the default suite."""

import pytest
from fake_anyscale import FakeAnyscale
from luthier.testing import conformance
from luthier_anyscale import luthier_providers


@pytest.mark.slow
@conformance(luthier_providers()[:1], fake=FakeAnyscale)
def test_conforms(check):
    check()
