"""What costs little is computed again in backward: when it has a source, and that this gives the same bits."""

import pytest
import torch
from luthier import find_source
from luthier.model.operations.install_operations import ordinary_operations
from luthier.model.operations.signatures import Operations

GATED = ("swiglu", "geglu")


def gated(operation, operations=None, dtype=torch.float32, **made):
    torch.manual_seed(0)
    gate, up = (torch.randn(3, 8, dtype=dtype, **made) for _ in range(2))
    return getattr(operations or ordinary_operations(), operation)(gate, up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operations", [Operations, ordinary_operations])
@pytest.mark.parametrize("operation", GATED)
def test_a_gated_product_is_computed_again_to_the_same_bits(operation, operations, dtype):
    result = gated(operation, operations(), dtype, requires_grad=True)
    source = find_source(result)
    with torch.no_grad():
        assert torch.equal(source.function(*source.inputs), result)


@pytest.mark.parametrize("operation", GATED)
def test_its_inputs_are_no_copies_and_belong_to_no_graph(operation):
    gate, up = (torch.randn(3, 8, requires_grad=True) for _ in range(2))
    source = find_source(getattr(ordinary_operations(), operation)(gate, up))
    assert [t.data_ptr() for t in source.inputs] == [gate.data_ptr(), up.data_ptr()]
    assert not any(t.requires_grad for t in source.inputs)


@pytest.mark.parametrize("operation", GATED)
def test_without_a_gradient_nothing_is_kept_that_it_could_be_computed_from(operation):
    assert find_source(gated(operation)) is None


def test_what_was_changed_in_place_has_no_source():
    result = gated("swiglu", Operations(), requires_grad=True)
    assert find_source(result) is not None
    result.mul_(2)
    assert find_source(result) is None


def test_a_tensor_derived_from_it_has_no_source():
    assert find_source(gated("swiglu", requires_grad=True) * 2) is None
