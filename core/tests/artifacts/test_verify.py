"""Verification of artifacts: a device without room for a second model leaves the comparison to the CPU."""

import pytest
import torch
from luthier.artifacts.verify import compute_where_it_fits

META = torch.device("meta")


def full(device):
    if device == META:
        raise torch.OutOfMemoryError
    return torch.ones(2, device=device)


def test_a_device_with_room_is_used():
    assert compute_where_it_fits(lambda device: torch.ones(2, device=device), META).is_meta


def test_what_does_not_fit_on_the_device_is_computed_on_the_cpu():
    assert compute_where_it_fits(full, META).device == torch.device("cpu")


def test_another_error_is_raised_as_it_is():
    with pytest.raises(ZeroDivisionError):
        compute_where_it_fits(lambda device: 1 / 0, META)
