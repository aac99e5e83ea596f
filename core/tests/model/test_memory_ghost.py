"""Ghosts: tensors without data behave as those with it would, but for their numbers; meters count them alike."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier.hardware.memory_meter import Allocations, Ledger, Meter
from luthier.model.attention import score_blocks as blocks
from luthier.model.attention.document_masks import cut_documents, make_buckets
from luthier.model.attention.products import Products
from luthier.model.fake_tensors import Ghost, Ghosts, is_ghost, tensor_storages
from luthier.testing.worlds import tiny_model
from torch import nn

CPU = torch.device("cpu")


def ghosts(**sizes):
    return Ghosts(Ledger(), CPU, **sizes)


def block(width, tokens):
    """Forward and backward of a small network with products, views, an in-place change and an index."""
    layer = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
    x = torch.randn(tokens, width, requires_grad=True)
    out = layer(x).view(tokens, -1, 1).transpose(0, 1).contiguous()
    out = out.squeeze(-1).T[torch.arange(tokens - 1)]
    out.mul_(2.0)
    out.float().softmax(-1).square().sum().backward()
    return layer, x


@settings(max_examples=15, deadline=None)
@given(width=st.integers(1, 40), tokens=st.integers(2, 60))
def test_a_step_of_ghosts_holds_at_its_peak_what_a_real_one_holds(width, tokens):
    world = ghosts()
    with world:
        held = block(width, tokens)
    assert is_ghost(held[1].grad)
    with Meter() as meter:
        real = block(width, tokens)
    assert world.ledger.peak == meter.ledger.peak
    del held, real


def test_the_meter_agrees_with_the_allocator():
    with Allocations() as allocations:
        block(64, 200)
    with Meter() as meter:
        block(64, 200)
    assert meter.ledger.peak == pytest.approx(allocations.peak, rel=0.01)


def test_what_is_let_go_is_no_longer_counted():
    with Meter() as meter:
        kept = torch.zeros(1000)
        lost = torch.zeros(3000)
        view = lost[10:]
        del lost
        assert meter.ledger.live == 16000
        del view
    assert meter.ledger.live == 4000
    assert meter.ledger.peak == 16000
    assert len(kept) == 1000


def test_storages_count_once_under_the_cause_they_were_moved_to():
    ledger = Ledger(grain=512)
    tensor = torch.zeros(3)
    ledger.blame(tensor_storages([tensor, tensor[1:]]), "weights")
    ledger.reset()
    assert ledger.live == 512
    assert ledger.at_peak == {"weights": 512, "activations": 0}


def test_a_ghost_has_shape_dtype_and_device_and_no_data():
    with ghosts():
        ghost = torch.randn(3, 4, dtype=torch.bfloat16)
    assert (ghost.shape, ghost.dtype, ghost.device) == ((3, 4), torch.bfloat16, CPU)
    assert repr(ghost) == "Ghost([3, 4], torch.bfloat16, cpu)"
    with pytest.raises(RuntimeError):
        ghost.numpy()


def test_small_integers_stay_real_and_large_ones_do_not():
    with ghosts():
        places = torch.arange(6).view(2, 3).sum(1)
        assert places.tolist() == [3, 12]
        assert is_ghost(torch.zeros(1 << 23, dtype=torch.int64))


def test_a_number_of_a_ghost_is_one_and_nothing_is_true():
    with ghosts():
        ghost = torch.randn(3)
        assert float(ghost.sum()) == 1.0
        assert int(ghost.argmax()) == 1
        assert not bool((ghost > 0).any())


@pytest.mark.parametrize("bound", [0.0, 0.5, 1.5])
def test_a_single_number_compares_as_one(bound):
    with ghosts():
        drawn = torch.rand(1)
        assert bool(drawn > bound) == bool(drawn >= bound) == (bound < 1)
        assert not bool(drawn < bound) or bound > 1
        assert is_ghost(drawn > bound)


def test_which_entries_are_set_is_what_balanced_experts_would_have():
    with ghosts(experts=4):
        mask = torch.randn(2, 8) > 0
        assert len(mask.nonzero()) == 4
        assert torch.randn(2, 8)[mask].shape == (4,)
        assert len((torch.randn(5) > 0).nonzero()) == 5


def test_what_lies_elsewhere_and_what_belongs_to_the_head_is_told_apart():
    world = Ghosts(Ledger(), CPU, vocabulary=50)
    with world:
        logits, other = torch.randn(4, 50), torch.randn(4, 51)
        far = torch.empty(100, device="meta")
        world.ledger.reset()
    assert world.ledger.at_peak == {"head": 800, "activations": 816}
    assert len((logits, other, far)) == 3


def test_a_loaded_models_ghost_shares_nothing_with_it_and_keeps_its_ties():
    model = tiny_model("llama", tie_word_embeddings=True)
    world = ghosts()
    twin = world.copy(model)
    assert all(isinstance(p, Ghost) for p in twin.parameters())
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert {n: p.shape for n, p in twin.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert not any(isinstance(p, Ghost) for p in model.parameters())


def test_a_loaded_models_ghost_writes_products_into_memory_that_it_made():
    model = tiny_model("llama")
    world = ghosts()
    with world:
        weight = world.copy(model).lm_head.weight.detach()  # as a rehearsal copies a model that was handed over
        memory = weight.new_empty(4 * weight.shape[0]).view(4, -1)
        products = torch.mm(torch.randn(4, weight.shape[1]), weight.t(), out=memory)
    assert not is_ghost(weight.inner)
    assert products is memory


def test_a_ghost_that_is_only_written_to_is_enough():
    with ghosts():
        memory = torch.randn(2, 5)
    assert torch.mm(torch.ones(2, 3), torch.ones(3, 5), out=memory) is memory


def test_a_module_of_ghosts_moves_to_another_dtype_with_its_inside():
    world = ghosts()
    with world:
        layer = nn.Linear(3, 5).to(torch.bfloat16)
        out = layer(torch.randn(2, 3, dtype=torch.bfloat16))
    assert layer.weight.inner.dtype == layer.weight.dtype == out.dtype == torch.bfloat16


def test_operations_of_products_and_attention_are_counted():
    world = ghosts()
    with world:
        torch.randn(8, 16) @ torch.randn(16, 32)
    assert world.flops == 2 * 8 * 16 * 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(300, 300, 40), (700, 200), (100, 20)], ids=str)
def test_one_tile_of_attention_stands_for_all_in_memory_and_in_operations(monkeypatch, lengths, dtype):
    monkeypatch.setattr(blocks, "TILE", 2**14)
    plan = make_buckets(cut_documents((0, *itertools.accumulate(lengths)), None))

    def attended(times, shortened):
        with (world := ghosts(shortened=shortened)):
            q, k, v = (torch.randn(1, heads, sum(lengths), 16, dtype=dtype, requires_grad=True) for heads in (4, 2, 2))
            for _ in range(times):
                Products.apply(q, k, v, plan, blocks.Rule(scale=0.25), True).sum().backward()
        return world.ledger.peak, world.flops

    peak, flops = attended(2, shortened=False)
    assert attended(2, shortened=True) == (
        pytest.approx(peak, rel=0.12),
        flops,
    )  # a second tile meets what the first has in hand
