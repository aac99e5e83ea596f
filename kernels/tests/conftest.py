"""One thread, as tiny tensors are slower with more; bitsandbytes stays offline; compiled sources go to a folder of the tests."""

import os

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before bitsandbytes is imported: it would ask a hub for a binary
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Tests neither find nor leave anything in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
