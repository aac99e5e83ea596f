"""torch_compile: when it pays back, what it computes, and what happens where there is no compiler."""

import json

import attrs
import pytest
import torch
from luthier.errors import LuthierError
from luthier.model.operations.functions import list_implementations
from luthier.model.operations.signatures import Operations
from luthier.runs.writing.decisions import Decisions
from luthier.runs.writing.record import read_record
from luthier.step import compile_step as compiling
from luthier.step.compile_step import Facts, Passes, choose

LONG = Facts(device="cpu", compiler="/usr/bin/g++", tokens=1e9, saved=25_000.0, threads=1, warm=False)


def test_a_long_run_pays_the_compiler_back_and_a_short_one_does_not():
    assert choose(LONG)[0]
    assert not choose(attrs.evolve(LONG, tokens=1e4))[0]
    assert "s saved" in choose(LONG)[1]


def test_kernels_that_lie_on_the_disk_pay_back_sooner():
    between = attrs.evolve(LONG, tokens=compiling.WARM_SECONDS * 2 / (LONG.saved * 1e-9))
    assert not choose(between)[0]
    assert choose(attrs.evolve(between, warm=True))[0]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"device": "cuda"}, "cuda"),
        ({"compiler": None}, "no C++ compiler"),
        ({"saved": 0.0}, "nothing"),
    ],
)
def test_it_is_off_with_a_reason_where_it_cannot_help(change, word):
    wanted, reason = choose(attrs.evolve(LONG, **change))
    assert not wanted
    assert word in reason


def test_a_run_without_end_is_compiled():
    assert choose(attrs.evolve(LONG, tokens=None))[0]


def test_true_without_a_compiler_is_refused_before_a_folder_appears(train, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(LuthierError) as caught:
        train(torch_compile=True)
    assert caught.value.code == "dependency-missing"
    assert "CXX" in caught.value.remedy
    assert not (tmp_path / "run").exists()


def test_auto_without_a_compiler_trains_and_says_why(train, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    train(max_steps=1)
    decided = read_record(tmp_path / "run")["decisions"]["torch_compile"]
    assert decided == {"value": False, "reason": "there is no C++ compiler here"}


def test_a_tiny_run_is_not_compiled_and_the_reason_has_the_numbers(train, tmp_path):
    train(max_steps=1)
    decided = read_record(tmp_path / "run")["decisions"]["torch_compile"]
    assert decided["value"] is False
    assert "of compiling" in decided["reason"]


def norm_of(passes):
    operations = Operations(list_implementations("compiled", passes.kernels(), lambda *_: True))
    x, weight = torch.randn(6, 8).requires_grad_(), torch.rand(8).requires_grad_()
    return operations, x, weight


def broken(monkeypatch, error):
    """A compiler that fails as torch's own does."""

    def compile_(*_, **__):
        def call(*_):
            raise error

        return call

    monkeypatch.setattr(torch, "compile", compile_)


def compiler_error():
    from torch._dynamo.exc import TorchDynamoException

    return TorchDynamoException("g++ ended with 1\nand a long story")


def test_a_compiler_that_fails_is_told_and_the_eager_kernels_go_on(monkeypatch, capsys):
    broken(monkeypatch, compiler_error())
    decisions = Decisions()
    operations, x, weight = norm_of(Passes(strict=False, decisions=decisions))
    found = operations.rms_norm(x, weight, 1e-5)
    found.sum().backward()
    torch.testing.assert_close(found, Operations().rms_norm(x, weight, 1e-5))
    assert weight.grad is not None
    assert decisions.to_dict()["torch_compile"]["value"] is False
    assert capsys.readouterr().err.count("compiling failed") == 1


def test_where_it_was_asked_for_a_compiler_that_fails_is_an_error(monkeypatch):
    broken(monkeypatch, compiler_error())
    operations, x, weight = norm_of(Passes(strict=True, decisions=Decisions()))
    with pytest.raises(LuthierError) as caught:
        operations.rms_norm(x, weight, 1e-5)
    assert caught.value.code == "compile-failed"
    assert caught.value.problem == "g++ ended with 1"


def test_a_kernel_that_finds_no_memory_is_no_failure_of_the_compiler(monkeypatch):
    broken(monkeypatch, RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    passes = Passes(strict=False, decisions=Decisions())
    operations, x, weight = norm_of(passes)
    with pytest.raises(RuntimeError, match="can't allocate"):
        operations.rms_norm(x, weight, 1e-5)
    assert not passes.failed


def test_the_formulas_are_the_kernels_without_a_compiler():
    """torch runs the compiler's input as it stands: the numbers are shown without waiting for g++."""
    operations, x, weight = norm_of(Passes(strict=True, decisions=Decisions()))
    plain = Operations()
    tables = torch.randn(1, 6, 4), torch.randn(1, 6, 4)
    heads = torch.randn(1, 2, 6, 4).requires_grad_()
    cases = [
        (lambda o: o.rms_norm(x, weight, 1e-5), (x, weight)),
        (lambda o: o.rms_norm(x, weight, 1e-5, 1.0, False), (x, weight)),
        (lambda o: o.add_rms_norm(x, x.detach(), weight, 1e-5)[1], (x, weight)),
        (lambda o: o.rope(heads, heads, *tables)[0], (heads,)),
        (lambda o: o.swiglu(x, x * 2), (x,)),
        (lambda o: o.geglu(x, x * 2), (x,)),
    ]
    with torch.compiler.set_stance("force_eager"):
        for compute, inputs in cases:
            mine, theirs = compute(operations), compute(plain)
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
            grads = [torch.autograd.grad(y.square().sum(), inputs) for y in (mine, theirs)]
            torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_run_takes_the_same_steps(train, tmp_path, capfd):
    shared = {"max_steps": 3, "optimizer": {"name": "sgd"}, "precision": "float32"}
    plain = train(output_dir=tmp_path / "plain", torch_compile=False, **shared)
    compiled = train(output_dir=tmp_path / "compiled", torch_compile=True, **shared)
    assert compiled.loss_history == pytest.approx(plain.loss_history, rel=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "compiled" / "log.jsonl").read_text().splitlines()]
    assert "compiled" in {line.get("implementation") for line in lines}


@pytest.mark.slow
def test_another_number_of_tokens_compiles_nothing_anew(monkeypatch):
    from torch._dynamo.utils import counters

    operations, _, weight = norm_of(Passes(strict=True, decisions=Decisions()))
    counts = []
    for tokens in (6, 7, 50, 3):
        x = torch.randn(tokens, 8).requires_grad_()
        operations.rms_norm(x, weight, 1e-5).sum().backward()
        counts.append(counters["stats"]["unique_graphs"])
    assert len(set(counts)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operation", ["swiglu", "geglu"])
def test_compiled_gates_are_right_for_large_numbers_too(operation, dtype):
    operations, *_ = norm_of(Passes(strict=True, decisions=Decisions()))
    gate = torch.tensor([[-1e4, -90.0, -1.0, 0.0], [1.0, 20.0, 90.0, 1e4]], dtype=dtype).requires_grad_()
    up = torch.full_like(gate, 1.5).detach()
    grads = []
    for one in (operations, Operations()):
        y = getattr(one, operation)(gate, up)
        grads.append((y, *torch.autograd.grad(y.sum(), gate)))
    torch.testing.assert_close(*grads, rtol=1e-2, atol=1e-2)
