"""Every method can be planned: its step is tried on fake tensors, or the plan says that it needs the weights."""

import luthier
import pytest
from luthier.testing.worlds import save_tiny_model

from .conftest import SAMPLE, every_method, fitting

NEEDS_WEIGHTS = {"frod", "shira", "waveft"}  # they take a decomposition, a mask or a place in it from values
UNFIT = {"beft", "lily"}  # one needs layers with a bias, the other cannot be packed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("method", every_method(sample=(*SAMPLE, "loha", "lokr", "shira")))
def test_a_method_is_planned_without_weights_unless_it_reads_them(method, folder, tmp_path):
    if method in UNFIT:
        pytest.skip("not for a packed Llama")
    rows = [{"prompt": "one", "completion": "two"}] * 4
    plan = luthier.plan(model=str(folder), data=rows, adapter=fitting(method), max_steps=2,
                        output_dir=str(tmp_path / "run"))  # fmt: skip
    assert plan.memory["optimizer"] > 0
    assert any("the weights were loaded" in note for note in plan.notes) == (method in NEEDS_WEIGHTS)
    assert ("activations" in plan.memory) == (method not in NEEDS_WEIGHTS)
