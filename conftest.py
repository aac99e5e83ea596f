"""What every test shares: one thread in each process, the same drawn examples, the long tests first."""

import os

import hypothesis
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; a run takes it for what was asked for

# the same examples in every run, so that what passes here passes elsewhere; HYPOTHESIS_PROFILE=default draws others
SLOW = (hypothesis.HealthCheck.too_slow,)  # which a busy machine makes of any test
hypothesis.settings.register_profile("same", derandomize=True, suppress_health_check=SLOW)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

LONG = ("test_tutorial.py", "test_generated.py")  # begun first, so that no worker is alone with one at the end


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)
