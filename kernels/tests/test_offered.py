"""The operations that the package offers the engine: by the kit, and in a run that trains."""

import json

import luthier
import pytest
import torch
from luthier.model.operations.signatures import REFERENCES
from luthier.testing import conformance, raise_inside
from luthier.testing.worlds import save_tiny_model
from luthier_kernels import count_runs, forget_runs, offered
from luthier_kernels.attention import is_fast
from luthier_kernels.elementwise import norm
from luthier_kernels.plugin import luthier_operations

ON_CPU = [one for one in luthier_operations() if "gate" not in one.predicate]


@pytest.fixture
def every_size(monkeypatch):
    monkeypatch.setattr(offered, "SMALLEST", 1)
    forget_runs()


@pytest.mark.usefixtures("every_size")
@conformance([one for one in ON_CPU if one.operation in ("add_rms_norm", "token_logprobs")])
def test_conforms(check):
    check()


@pytest.mark.slow
@pytest.mark.usefixtures("every_size")
@conformance([one for one in ON_CPU if one.operation in ("rms_norm", "rope", "document_attention")])
def test_others_conform(check):
    check()


@pytest.fixture
def train(tmp_path):
    save_tiny_model(tmp_path / "model", "llama")
    rows = [{"prompt": f"{i} and {i}?", "completion": f"{2 * i}"} for i in range(8)]

    def run(name, **changes):
        settings = {"adapter": "lora", "max_steps": 3, "learning_rate": 1e-2, "num_threads": 1, **changes}
        return luthier.train(model=str(tmp_path / "model"), data=rows, output_dir=tmp_path / name, **settings)

    return run


def ran(run):
    lines = [json.loads(line) for line in (run.output_path / "log.jsonl").read_text().splitlines()]
    return {line["name"]: line["implementation"] for line in lines if line["event"] == "operation"}


@pytest.mark.usefixtures("every_size")
def test_a_run_computes_by_them_unnamed_and_learns_the_same(train):
    mine, theirs = train("mine"), train("theirs", kernels="reference")
    assert {"add_rms_norm": "kernels.add_rms_norm", "rope": "kernels.rope"}.items() <= ran(mine).items()
    assert set(ran(theirs).values()) == {"reference"}
    assert mine.loss_history == pytest.approx(theirs.loss_history, rel=2e-2)
    assert count_runs()["normalize_rms"]["native"] > 0


@pytest.mark.skipif(not is_fast(), reason="attention in C needs AVX512-BF16")
def test_attention_is_computed_where_nothing_but_documents_is_asked():
    query, key = torch.randn(1, 4, 128, 64).bfloat16(), torch.randn(1, 2, 128, 64).bfloat16()
    starts, chain = torch.tensor([0, 50, 128]), torch.tensor([-1, 0])  # the second document continues the first
    assert offered.takes_attention(query.device, query.dtype, query.shape)
    assert not offered.takes_attention(query.device, torch.float32, query.shape)
    assert not offered.takes_attention(query.device, query.dtype, torch.Size([1, 4, 128, 72]))
    ours = offered._attend(query, key, key, starts, None, 0.125, None, None)
    wide = (tensor.double() for tensor in (query, key, key))
    theirs = REFERENCES["document_attention"](*wide, starts, None, 0.125)
    assert float((ours - theirs).abs().max()) < 0.02
    chained = offered._attend(query, key, key, starts, chain, 0.125, None, None)
    wide = (tensor.double() for tensor in (query, key, key))
    theirs = REFERENCES["document_attention"](*wide, starts, chain, 0.125)
    assert float((chained - theirs).abs().max()) < 0.02
    for rest in ((None, 0.125, 9, None), (chain, 0.125, 9, None), (None, 0.125, None, 2.0)):
        assert offered._attend(query, key, key, starts, *rest) is NotImplemented
    longer = torch.cat([key, key], 2)
    assert offered._attend(query, longer, longer, starts, None, 0.125, None, None) is NotImplemented


def test_small_calls_are_left_to_the_engine(train):
    assert "kernels.add_rms_norm" not in ran(train("small")).values()


@pytest.mark.usefixtures("every_size")
def test_one_that_fails_falls_back_once_and_the_run_goes_on(train, caplog):
    with raise_inside(norm._normalize_native, RuntimeError("no such kernel")):
        run = train("run")
    assert run.steps == 3
    assert [r.message for r in caplog.records if "no such kernel" in r.message] == [
        "normalize_rms: implementation 'native' failed and is not used again: RuntimeError('no such kernel')"
    ]
    assert count_runs()["normalize_rms"].keys() == {"torch"}
    forget_runs()


def test_calls_that_are_none_of_ours_are_declined():
    x, weight = torch.randn(3, 4), torch.ones(4)
    assert offered._normalize(x, weight, 1e-6, 0.0, True, torch.bfloat16) is NotImplemented
    assert offered._normalize(x.bfloat16(), weight, 1e-6, 0.0, True, None) is NotImplemented
    assert offered._add_and_normalize(x, x.bfloat16(), weight, 1e-6, 0.0, True, None) is NotImplemented
    trained = torch.randn(9, 4, requires_grad=True)
    assert offered._score(x, trained, None, torch.arange(3), 1.0, None) is NotImplemented
    with torch.no_grad():
        assert offered._score(x, trained, None, torch.arange(3), 1.0, None).shape == (3,)
