"""The optimizer `auto`: what it chooses for which memory, and that it then is that optimizer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from luthier import Group
from luthier.state_tree import optimizer_state, restore_optimizer
from luthier.testing import expect_error
from luthier_kernels.optimizers import AdamW8bit as EightBitStepper
from luthier_optimizers import Auto, choosing
from luthier_optimizers.choosing import AutoPart, choose_optimizer, device_memory
from luthier_optimizers.paged import PagedStepper

GIB = 2**30
ORDER = ("adamw", "adamw_8bit", "paged_adamw")


@pytest.mark.parametrize(
    ("weights", "memory", "expected"),
    [
        (10**8, 24 * GIB, "adamw"),  # LoRA of a model of 7 billion
        (10**9, 24 * GIB, "adamw_8bit"),  # 8 of 6 GiB
        (7 * 10**9, 24 * GIB, "paged_adamw"),
        (7 * 10**9, 141 * GIB, "adamw_8bit"),
        (10**12, 0, "adamw"),  # nothing is known of the device
    ],
)
def test_the_choice_follows_from_weights_and_memory(weights, memory, expected):
    assert choose_optimizer(weights, memory, 0.25) == expected


@given(st.integers(0, 10**11), st.integers(1, 2**40), st.integers(1, 2**40), st.floats(0, 1))
def test_more_memory_never_means_a_smaller_state(weights, one, other, share):
    less, more = sorted((one, other))
    assert ORDER.index(choose_optimizer(weights, more, share)) <= ORDER.index(choose_optimizer(weights, less, share))


@pytest.mark.parametrize(
    ("bytes_each", "kind"), [(8.5, torch.optim.AdamW), (3, EightBitStepper), (1, PagedStepper)], ids=str
)
def test_what_is_built_is_what_was_chosen_with_its_options(monkeypatch, tmp_path, bytes_each, kind):
    weight = torch.nn.Parameter(torch.ones(64, 128))
    (tmp_path / "limit").write_text(f"{int(weight.numel() * bytes_each)}\n")
    monkeypatch.setattr(choosing, "LIMITS", (str(tmp_path / "limit"),))
    group = Group(parameters=[weight], names=["one.weight"], weight_decay=None)
    part = AutoPart(Auto(memory_share=1.0, betas=(0.7, 0.8), eps=1e-4, weight_decay=0.3))
    optimizer = part.build([group])
    assert type(optimizer) is kind
    found = optimizer.param_groups[0]
    assert (found["betas"], found["eps"], found["weight_decay"]) == ((0.7, 0.8), 1e-4, 0.3)


def test_a_processors_memory_is_known_and_bounded_by_its_container(monkeypatch, tmp_path):
    whole = device_memory(torch.device("cpu"))
    assert GIB / 4 < whole < 2**50
    for number, (text, expected) in enumerate([("1048576\n", 2**20), ("max\n", None)]):
        limit = tmp_path / str(number)
        limit.write_text(text)
        monkeypatch.setattr(choosing, "LIMITS", (str(limit), str(tmp_path / "absent")))
        found = device_memory(torch.device("cpu"))
        assert found == expected if expected else found >= whole
    assert device_memory(torch.device("meta")) == 0


def test_sharded_weights_keep_an_exact_state():
    weight = torch.nn.Parameter(torch.ones(64, 128))
    weight.full_tensor = lambda: weight
    group = Group(parameters=[weight], names=["one.weight"])
    assert type(AutoPart(Auto(memory_share=0.0)).build([group])) is torch.optim.AdamW


def test_a_state_of_another_choice_is_refused_by_name(monkeypatch, tmp_path):
    weight = torch.nn.Parameter(torch.ones(64, 128))
    monkeypatch.setattr(choosing, "LIMITS", (str(tmp_path / "limit"),))
    held = None
    for bytes_each in (8.5, 3):
        (tmp_path / "limit").write_text(f"{int(weight.numel() * bytes_each)}\n")
        part = AutoPart(Auto(memory_share=1.0))
        optimizer = part.build([Group(parameters=[weight], names=["one.weight"])])
        if held is None:
            weight.grad = torch.ones_like(weight)
            optimizer.step()
            held = optimizer_state(optimizer)
    with expect_error("checkpoint-corrupt", "optimizer", "AdamW"):
        restore_optimizer(optimizer, held)


def test_a_sample_is_stepped_by_what_the_run_was_given(monkeypatch, tmp_path):
    (tmp_path / "limit").write_text("100000\n")
    monkeypatch.setattr(choosing, "LIMITS", (str(tmp_path / "limit"),))
    part = AutoPart(Auto(memory_share=1.0))
    kinds = [
        type(part.build([Group(parameters=[torch.nn.Parameter(torch.ones(n, n))], names=["w"])])) for n in (1000, 8)
    ]
    assert kinds == [PagedStepper, PagedStepper]
