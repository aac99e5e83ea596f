"""Rounding to bfloat16: the rest that is kept, and the chance that makes the mean exact."""

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from luthier import wide_weight
from luthier.precision import rounding
from luthier.precision.rounding import join_halves, round_stochastically, split_halves
from luthier.precision.weight_dtypes import hold_weight
from torch.utils._python_dispatch import TorchDispatchMode

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
TENSORS = arrays.arrays(np.float32, arrays.array_shapes(max_dims=2, max_side=5), elements=FINITE).map(torch.from_numpy)


@settings(deadline=None, max_examples=60)
@given(x=TENSORS)
def test_the_two_halves_give_the_tensor_back_to_the_bit(x):
    top, rest = split_halves(x.clone())
    assert top.dtype is torch.bfloat16
    assert torch.equal(join_halves(top, rest).view(torch.int32), x.view(torch.int32))


@settings(deadline=None, max_examples=60)
@given(x=TENSORS)
def test_the_upper_half_is_the_nearest_but_for_ties(x):
    top, nearest = split_halves(x.clone())[0].float(), x.to(torch.bfloat16).float()
    small = x.abs() < 1e38  # above, the nearest may be infinity
    assert torch.equal((top - x).abs()[small], (nearest - x).abs()[small])


@pytest.mark.parametrize("published", [torch.float32, torch.bfloat16])
def test_a_weight_is_wide_if_it_has_more_than_16_bits_wherever_they_are(published):
    weight = torch.nn.Parameter(torch.randn(4, 3).to(published).float(), requires_grad=False)
    whole = weight.detach().clone()
    assert torch.equal(wide_weight(weight), whole)
    assert wide_weight(whole.bfloat16()) is None and torch.equal(wide_weight(whole.double()), whole.double())
    hold_weight(weight, torch.bfloat16)
    if published is torch.bfloat16:
        assert wide_weight(weight) is None
    else:
        assert torch.equal(wide_weight(weight), whole)


def test_every_pattern_of_bits_near_a_tie_comes_back():
    high = torch.tensor([0x3F80, 0x3F81, 0x0001, 0x7F7F, -0x4080, -0x407F], dtype=torch.int32)[:, None]
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)[None]
    x = ((high << 16) | low).view(torch.float32).flatten()
    assert torch.equal(join_halves(*split_halves(x.clone())).view(torch.int32), x.view(torch.int32))


@settings(deadline=None, max_examples=20)
@given(x=TENSORS)
def test_what_bfloat16_holds_keeps_no_rest_and_is_never_moved(x):
    held = x.to(torch.bfloat16).float()
    held = torch.where(held.isfinite(), held, 0.0)
    assert split_halves(held)[1] is None
    assert torch.equal(round_stochastically(held).float(), held)


def test_the_two_halves_take_no_more_room_than_the_one():
    x = torch.randn(64, 64)
    top, rest = split_halves(x)
    assert top.nbytes + rest.nbytes == x.nbytes


@attrs.define(slots=False)
class LargestTensors(TorchDispatchMode):
    """Notes the bytes of every new tensor that operations give."""

    sizes: list[int] = attrs.field(factory=list)

    def __attrs_pre_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not any(a.alias_info for a in func._schema.returns):
            self.sizes.append(out.nbytes)
        return out


def test_cutting_a_weight_takes_the_room_of_its_halves_and_of_one_piece(monkeypatch):
    monkeypatch.setattr(rounding, "PIECE", 64)
    x = torch.randn(64, 64)
    with LargestTensors() as made:
        top, rest = split_halves(x)
    assert sorted(made.sizes)[-2:] == [top.nbytes, rest.nbytes]
    assert sorted(made.sizes)[-3] <= 64 * 4


@settings(deadline=None, max_examples=30)
@given(x=TENSORS)
def test_pieces_are_all_numbers_of_a_tensor_in_any_layout(x):
    for layout in (x, x.t() if x.dim() == 2 else x):
        assert torch.equal(torch.cat(list(rounding.cut_pieces(layout))), layout.reshape(-1))
        assert torch.equal(join_halves(*split_halves(layout)), layout)


@pytest.mark.parametrize("value", [1.0 + 2**-9, -3.0 - 2**-10, 1e-3, 2.0**-130])
def test_the_mean_of_many_roundings_is_the_number(value):
    """Within five standard errors: the step of bfloat16 times sqrt(p (1 - p) / n)."""
    x = torch.full((200_000,), value, dtype=torch.float32)
    drawn = round_stochastically(x, torch.Generator().manual_seed(0)).double()
    values = drawn.unique()
    assert len(values) <= 2
    step = float(values.max() - values.min())
    assert abs(float(drawn.mean()) - float(x[0].double())) <= 5 * step * 0.5 / 200_000**0.5


def test_the_generator_alone_decides_the_rounding():
    x = torch.randn(1001)
    one, same, other = (round_stochastically(x, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
