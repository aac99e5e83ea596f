"""Architectures whose layers carry state: found by structure, packed documents kept apart by not packing, aloud."""

import luthier
import numpy as np
import pytest
import torch
import transformers
from luthier.data.batches.micro_batches import rank_batches
from luthier.data.batches.packing import Packing
from luthier.data.examples import TokenDataset, TokenExample
from luthier.model import attention
from luthier.model import self_check as probe
from luthier.model.recurrent import state_of
from luthier.runs.writing.record import read_record
from luthier.testing.worlds import ARCHITECTURES, SHAPE, tiny_model, tiny_tokenizer

MAMBA = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
MIXED = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8}
DELTA = {f"linear_{kind}_{size}": n for kind, size, n in (("num", "key_heads", 2), ("num", "value_heads", 2),
                                                         ("key", "head_dim", 8), ("value", "head_dim", 8))}  # fmt: skip
SPARSE = {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
STATEFUL = {
    "MambaConfig": MAMBA,
    "FalconH1Config": {**SHAPE, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 8, "mamba_n_groups": 1},
    "RwkvConfig": {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2},
    "RecurrentGemmaConfig": {**SHAPE, "num_hidden_layers": 3},
    "Lfm2Config": {**SHAPE, "layer_types": ["conv", "full_attention"]},
    "Qwen3NextConfig": {**SHAPE, **MIXED, **DELTA, **SPARSE},
    "MiniMaxConfig": {**SHAPE, **MIXED, "num_local_experts": 2, "num_experts_per_tok": 1},
    "xLSTMConfig": {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2},
}


def made(name):
    config = getattr(transformers, name)(**STATEFUL[name])
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize("name", STATEFUL)
def test_layers_that_carry_state_are_found_in_the_config_alone(name):
    assert state_of(getattr(transformers, name)(**STATEFUL[name])) is not None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_carries_nothing(architecture):
    model = tiny_model(architecture)
    assert state_of(model.config) is None
    assert state_of(model.config, model) is None


def test_recurrent_modules_are_found_where_no_config_tells_of_them():
    model = tiny_model()
    model.model.layers[0].extra = torch.nn.LSTM(4, 4)
    assert state_of(model.config, model) == "LSTM modules"
    model.model.layers[0].extra = torch.nn.Conv1d(32, 32, 4, groups=32)
    assert state_of(model.config, model) == "convolutions over positions"


@pytest.mark.parametrize("name", ["MambaConfig", "Qwen3NextConfig"])
def test_one_document_at_a_time_such_a_model_computes_what_it_does_by_itself(name):
    model = made(name).eval()
    attention.install_attention(model)
    assert probe.find_disagreement(model, packing=False) is None


@pytest.fixture
def mamba(tmp_path):
    from luthier.model.load import quiet

    with quiet():
        made("MambaConfig").save_pretrained(tmp_path / "mamba")
    tiny_tokenizer().save_pretrained(tmp_path / "mamba")
    return tmp_path / "mamba"


def test_packing_is_turned_off_aloud_and_the_run_remembers_why(train, mamba, capsys):
    run = train(model=str(mamba), max_steps=2)
    told = capsys.readouterr().err
    assert "packing is off: one document in each micro-batch" in told
    decision = read_record(run.output_path)["decisions"]["packing"]
    assert decision["value"] is False
    assert "linear_attention layers carry state across positions" in decision["reason"]
    assert np.isfinite(run.loss_history).all()


def test_documents_of_such_a_model_do_not_touch_each_other(train, mamba, tmp_path, rows):
    """The loss of a step over many documents is that of each by itself."""
    whole = train(model=str(mamba), max_steps=1, global_batch_size=4, data=rows[:4], output_dir=tmp_path / "whole")
    total = count = 0
    for i, row in enumerate(rows[:4]):
        one = train(model=str(mamba), max_steps=1, global_batch_size=1, data=[row], output_dir=tmp_path / f"{i}")
        (line,) = (one.output_path / "metrics.jsonl").read_text().splitlines()
        tokens = luthier.inspect(model=str(mamba), data=[row]).report.supervised_tokens
        total, count = total + one.loss_history[0] * tokens, count + tokens
    assert whole.loss_history[0] == pytest.approx(total / count, rel=1e-5)


def test_packing_false_is_not_spoken_of(train, mamba, capsys):
    run = train(model=str(mamba), max_steps=1, packing=False)
    assert "packing is off" not in capsys.readouterr().err
    assert "packing" not in read_record(run.output_path).get("decisions", {})


def test_without_packing_a_block_is_one_batch_all_the_same():
    ids = np.arange(20, dtype=np.int32)
    block = TokenExample(input_ids=ids, labels=ids, documents=np.array([0, 5, 13]), where="book:1")
    short = TokenExample(input_ids=ids[:4], labels=ids[:4], where="book:2")
    rows = TokenDataset.of([block, short])
    found = list(rank_batches(rows, Packing(max_tokens=20, on=False), torch.device("cpu")))
    assert [b.input_ids.tolist() for b in found] == [list(range(20)), [0, 1, 2, 3]]
    assert [b.num_documents for b in found] == [3, 1]
    packed = list(rank_batches(rows, Packing(max_tokens=24), torch.device("cpu")))
    assert sum(len(b.supervised) for b in found) == sum(len(b.supervised) for b in packed) == 20
