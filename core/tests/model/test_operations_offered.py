"""Operations that a plugin offers: where each is called from, and that a reference says what the engine computes."""

import pytest
import torch
from luthier.errors import LuthierError
from luthier.model import attention
from luthier.model.operations import reference
from luthier.model.operations.guard import GuardedOperation
from luthier.model.operations.install_operations import installed_operations, ordinary_operations
from luthier.model.operations.signatures import REFERENCES, Implementation
from luthier.model.policy import ModelPolicy
from luthier.plugins.contracts.operation_names import OPERATIONS
from luthier.plugins.records import OperationRecord
from luthier.testing.worlds import random_batch, tiny_model
from torch import nn

LENGTHS = (9, 4, 1, 12)


def offered(operation, function, supports=lambda *_: True, **changes):
    record = OperationRecord(
        name=f"own.{operation}",
        summary="Own.",
        operation=operation,
        build="own:build",
        predicate="own:fits",
        priority=5,
    )
    guard = GuardedOperation(
        record=record, owner="own 1", function=function, reference=REFERENCES[operation], **changes
    )
    return Implementation(
        operation=operation, name=record.name, function=guard.compute, supports=supports, priority=5, guard=guard
    )


def step(model, batch=None):
    model.zero_grad(set_to_none=True)
    found = ModelPolicy(model).token_logprobs(batch or random_batch(LENGTHS))
    found.sum().backward()
    return found.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def packed_model(architecture="llama"):
    model = tiny_model(architecture)
    attention.install_attention(model)
    return model


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "geglu"])
@pytest.mark.parametrize("frozen", [False, True])
def test_an_offered_operation_computes_a_step_with_the_same_numbers(operation, frozen):
    model, calls = packed_model(), []
    if frozen:
        model.lm_head.requires_grad_(False)
    theirs = step(model)

    def counted(*given):
        calls.append(given)
        return REFERENCES[operation](*given)

    operations = ordinary_operations()
    operations.prefer([offered(operation, counted)])
    with installed_operations(model, operations):
        mine = step(model)
    assert calls
    assert f"{operation}: own.{operation}" in operations.ran()
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine[1], theirs[1], rtol=1e-4, atol=1e-4)
    calls.clear()
    step(model)
    assert not calls  # taken away with the rest


def test_geglu_is_offered_to_gemma():
    model, calls = packed_model("gemma2"), []
    operations = ordinary_operations()
    operations.prefer([offered("geglu", lambda *given: calls.append(1) or reference.geglu(*given))])
    with installed_operations(model, operations):
        step(model)
    assert calls


def test_an_offered_norm_takes_the_sum_of_a_layer_too():
    model, calls = packed_model(), []
    operations = ordinary_operations()
    operations.prefer([offered("rms_norm", lambda *given: calls.append(1) or reference.rms_norm(*given))])
    with installed_operations(model, operations):
        step(model)
        calls.clear()
        step(model)
    assert len(calls) == 5  # every norm of two layers, and the last


def test_the_core_computes_what_a_predicate_leaves():
    model, calls = packed_model(), []
    operations = ordinary_operations()
    operations.prefer([offered("rms_norm", lambda *given: calls.append(1), lambda device, dtype, shape: False)])
    with installed_operations(model, operations):
        step(model)
    assert not calls
    assert "rms_norm: eager" in operations.ran() or "add_rms_norm: eager" in operations.ran()


def test_a_call_may_be_declined_without_leaving_the_run():
    operations = ordinary_operations()
    one = offered("rms_norm", lambda *given: NotImplemented)
    operations.prefer([one])
    x, weight = torch.randn(3, 4), torch.ones(4)
    torch.testing.assert_close(operations.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
    assert not one.guard.fallen


def test_the_higher_priority_wins_and_the_core_comes_last():
    operations = ordinary_operations()
    low, high = (offered("swiglu", reference.swiglu) for _ in range(2))
    high = Implementation(operation="swiglu", name="high", function=reference.swiglu, priority=9, guard=high.guard)
    operations.prefer([low])
    operations.prefer([high])
    operations.swiglu(torch.randn(2, 4), torch.randn(2, 4))
    assert operations.ran() == ["swiglu: high"]


@pytest.mark.parametrize("place", [0, 1])
def test_a_wrong_shape_is_told(place):
    operations = ordinary_operations()
    operations.prefer([offered("rope", lambda q, k, *rest: (q[:, :, :1], k))])
    x = torch.randn(1, 2, 3, 4)
    with pytest.raises(LuthierError) as caught:
        operations.rope(x, x, torch.randn(1, 3, 4), torch.randn(1, 3, 4))
    assert caught.value.code == "operation-differs"
    assert "shape" in str(caught.value)


def test_memory_that_runs_out_is_nobodys_fallback():
    def hungry(*given):
        raise torch.OutOfMemoryError("all of it")

    operations = ordinary_operations()
    one = offered("rms_norm", hungry)
    operations.prefer([one])
    with pytest.raises(torch.OutOfMemoryError):
        operations.rms_norm(torch.randn(3, 4), torch.ones(4), 1e-6)
    assert not one.guard.fallen


def test_a_comparison_is_made_once_for_each_kind_of_call():
    calls = []
    operations = ordinary_operations()
    operations.prefer([offered("swiglu", lambda *given: calls.append(1) or reference.swiglu(*given))])
    x = torch.randn(2, 4)
    for _ in range(3):
        operations.swiglu(x, x)
    assert len(calls) == 4
    operations.swiglu(x.bfloat16(), x.bfloat16())
    assert len(calls) == 6


CONTINUES = (None, (-1, 0, 0, -1), (-1, 0, 1, 2))


@pytest.mark.parametrize("continues", CONTINUES, ids=str)
@pytest.mark.parametrize(("window", "cap", "prefix"), [(None, None, 0), (3, None, 0), (None, 2.0, 0), (6, 2.0, 3)])
def test_the_reference_of_attention_is_what_the_engine_computes(continues, window, cap, prefix):
    torch.manual_seed(0)
    total, starts = sum(LENGTHS), torch.tensor([0, 9, 13, 14, 26], dtype=torch.int32)
    query = torch.randn(1, 4, total, 8, dtype=torch.float64)
    key, value = (torch.randn(1, 2, total, 8, dtype=torch.float64) for _ in range(2))
    before = [torch.randn(prefix, 2, 8, dtype=torch.float64) for _ in range(2)]
    links = None if continues is None else torch.tensor(continues)
    module = nn.Module()
    module.layer_idx = 0
    told = {"cu_seq_lens_k": starts, "continues": links, "prefixes": (lambda layer: before) if prefix else None}
    theirs, _ = attention.attend_documents(module, query, key, value, None, sliding_window=window, softcap=cap, **told)
    whole = [torch.cat([own.transpose(0, 1)[None], t], 2) for own, t in zip(before, (key, value), strict=True)]
    mine = reference.document_attention(query, *whole, starts, links, 8**-0.5, window, cap)
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite", "gpt2"])
def test_the_reference_of_token_logprobs_is_what_the_head_computes(architecture):
    model, seen = packed_model(architecture).double(), []
    theirs = step(model)

    def kept(*given):
        seen.append(given)
        return reference.token_logprobs(*given)

    operations = ordinary_operations()
    operations.prefer([offered("token_logprobs", kept)])
    with installed_operations(model, operations):
        mine = step(model)
    assert seen
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
