"""The kit's checks of `anyscale-jobs`, by the SDK itself, against the fake console."""

import pytest
from fake_console import FakeConsole
from luthier.testing import conformance
from luthier_anyscale import luthier_providers

pytest.importorskip("anyscale", reason="the extra `jobs` is not installed: pip install 'luthier-anyscale[jobs]'")


@pytest.mark.slow
@conformance(luthier_providers()[1:], fake=FakeConsole)
def test_conforms(check):
    check()
