"""The kit's checks against the fake."""

from fake_openai import FakeOpenAI
from luthier.testing import conformance
from luthier_openai import luthier_providers


@conformance(luthier_providers(), fake=FakeOpenAI)
def test_conforms(check):
    check()
