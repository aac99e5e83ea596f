"""What every test shares: one thread in each process, as many of them run beside others on few cores; the long first."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; a run takes it for what was asked for

LONG = ("test_tutorial.py", "test_generated.py")  # begun first, so that no worker is alone with one at the end


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)
