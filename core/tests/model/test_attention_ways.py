"""Which way attention takes: what is decided and said, kernels of a GPU by their signature, and one document alone."""

import pytest
import torch
import transformers
from luthier import logs
from luthier.errors import LuthierError
from luthier.model import self_check as probe
from luthier.model.attention import attend_documents, decide_attention, install_attention, varlen, ways
from luthier.model.attention.document_masks import cut_documents
from luthier.model.attention.plain import attend_singly
from luthier.model.attention.score_blocks import Rule
from luthier.model.attention.varlen import Kernel, attend_at_once
from luthier.model.policy import ModelPolicy
from luthier.runs.writing.decisions import Decisions
from luthier.testing.worlds import random_batch, tiny_model

STARTS, CONTINUES = (0, 4, 9, 11, 15), (-1, -1, 1, 2)
RULES = [Rule(scale=0.5), Rule(scale=0.3, window=3), Rule(scale=0.5, cap=2.0), Rule(scale=0.5, window=2, cap=1.0)]


@pytest.fixture(autouse=True)
def aloud():
    logs.set_up("info")
    ways._ANY.said.clear()  # what tests before this one have made it say
    yield
    logs.set_up("warning")


def inputs(heads=4, keys=2, size=8, dtype=torch.float64):
    random = torch.Generator().manual_seed(0)
    return [torch.randn(1, h, STARTS[-1], size, dtype=dtype, generator=random) for h in (heads, keys, keys)]


def on_cpu(q, k, v, rule, continues=None, dropout=0.0):
    """[1, T, heads, d] by the products that other tests compare with a masked softmax."""
    told = {"cu_seq_lens_k": torch.tensor(STARTS), "scaling": rule.scale, "softcap": rule.cap}
    told |= {"sliding_window": rule.window, "dropout": dropout}
    told |= {} if continues is None else {"continues": torch.tensor(continues)}
    return attend_documents(torch.nn.Module(), q, k, v, None, **told)[0]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("continues", [None, CONTINUES])
@pytest.mark.parametrize("keys", [2, 4])
def test_one_document_at_a_time_gives_the_same(rule, continues, keys):
    q, k, v = inputs(keys=keys)
    found = attend_singly(q, k, v, cut_documents(STARTS, continues), rule)
    torch.testing.assert_close(found, on_cpu(q, k, v, rule, continues), rtol=1e-10, atol=1e-10)


def packed_reference(q, k, v, starts_q, starts_k, scale, left, cap=0.0):
    """[T, heads, d]: what flash kernels define, by one masked softmax for each sequence, aligned at its end."""
    pieces = []
    for i in range(len(starts_q) - 1):
        own, seen = slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1])
        groups = q.shape[1] // k.shape[1]
        queries = q[own].transpose(0, 1)
        keys, values = (t[seen].transpose(0, 1).repeat_interleave(groups, 0) for t in (k, v))
        scores = queries @ keys.transpose(1, 2) * scale
        scores = cap * torch.tanh(scores / cap) if cap else scores
        count, total = scores.shape[1:]
        here = torch.arange(total - count, total)[:, None]
        there = torch.arange(total)[None]
        hidden = there > here if left < 0 else (there > here) | (there < here - left)
        pieces.append((scores.masked_fill(hidden, float("-inf")).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(pieces)


def torch_213(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
              window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):  # fmt: skip
    assert window_size[1] == 0 and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert max_q == int(cu_seq_q.diff().max()) and max_k == int(cu_seq_k.diff().max())
    return packed_reference(query, key, value, cu_seq_q.tolist(), cu_seq_k.tolist(), scale, window_size[0])


def torch_210(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None, scale=None):
    assert is_causal and query.shape[1] == key.shape[1]
    return packed_reference(query, key, value, cu_seq_q.tolist(), cu_seq_k.tolist(), scale, -1)


def flash_2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
            causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None):  # fmt: skip
    assert causal
    starts = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    return packed_reference(q, k, v, *starts, softmax_scale, window_size[0], softcap)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("continues", [None, CONTINUES])
@pytest.mark.parametrize("keys", [2, 4])
@pytest.mark.parametrize("function", [torch_213, torch_210, flash_2])
def test_a_kernel_is_asked_for_the_same_or_not_at_all(rule, continues, keys, function):
    q, k, v = inputs(keys=keys)
    kernel = Kernel.of(function)
    asked = kernel.arguments(rule, 0.0, grouped=keys == 2)
    cannot = {
        torch_213: rule.cap is not None,
        torch_210: rule.cap is not None or rule.window is not None,
        flash_2: False,
    }
    assert (asked is None) == cannot[function]
    if asked is not None:
        found = attend_at_once(kernel, asked, q, k, v, cut_documents(STARTS, continues))
        torch.testing.assert_close(found, on_cpu(q, k, v, rule, continues), rtol=1e-10, atol=1e-10)


def test_dropout_is_asked_of_kernels_that_have_it():
    assert Kernel.of(torch_213).arguments(RULES[0], 0.1, grouped=False) is None
    assert Kernel.of(flash_2).arguments(RULES[0], 0.1, grouped=False)["dropout_p"] == 0.1


def test_the_installed_torchs_kernel_can_be_asked():
    kernel = varlen.torch_kernel()
    assert kernel is not None
    assert kernel.arguments(RULES[1], 0.0, grouped=True) == {"window_size": (2, 0), "scale": 0.3, "enable_gqa": True}
    assert kernel.arguments(RULES[0], 0.0, grouped=False)["window_size"] == (-1, 0)


class Held:
    """Decisions that were taken on another machine, and can be had here by their word."""

    def __init__(self, way):
        self.way = way

    def take(self, name, decide, usable):
        return self.way


@pytest.mark.parametrize("way", ["varlen_attn", "flash-attn"])
def test_a_way_that_the_tensors_do_not_allow_is_left_for_another_aloud(way, capsys):
    model = tiny_model()
    decide_attention(model, torch.device("cpu"), torch.float32, Held(way))
    q, k, v = inputs(dtype=torch.float32)
    told = {"cu_seq_lens_k": torch.tensor(STARTS), "scaling": 0.5}
    for layer in model.model.layers:
        found = attend_documents(layer.self_attn, q, k, v, None, **told)[0]
    torch.testing.assert_close(found, on_cpu(q, k, v, RULES[0]), rtol=1e-5, atol=1e-5)
    lines = [line for line in capsys.readouterr().err.splitlines() if "one document at a time" in line]
    assert len(lines) == 1 and "there is none for cpu" in lines[0]


def test_what_was_decided_is_held_and_what_cannot_be_had_is_decided_anew_aloud(capsys):
    model, cpu = tiny_model(), torch.device("cpu")
    held = {"attention": {"value": "sdpa", "reason": "so it began"}}
    assert decide_attention(model, cpu, torch.float32, Decisions(held)) == "sdpa"
    assert ways._OWN[model.model.layers[1].self_attn].way == "sdpa"
    capsys.readouterr()
    held = {"attention": {"value": "varlen_attn", "reason": "there was a GPU"}}
    assert decide_attention(model, cpu, torch.float32, Decisions(held)) == "products"
    assert "decided anew" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "dtype", "has_torchs", "has_flash", "way"),
    [
        ("cpu", torch.bfloat16, True, True, "products"),
        ("mps", torch.bfloat16, True, True, "sdpa"),
        ("cuda", torch.float32, True, True, "sdpa"),
        ("cuda", torch.bfloat16, True, True, "varlen_attn"),
        ("cuda", torch.bfloat16, False, True, "flash-attn"),
        ("cuda", torch.float16, False, False, "sdpa"),
    ],
)
def test_the_preferred_way_and_its_reason(device, dtype, has_torchs, has_flash, way):
    kernels = varlen.Kernels(
        torch=Kernel.of(torch_213) if has_torchs else None, flash=Kernel.of(flash_2) if has_flash else None
    )
    found, reason = ways.preferred(torch.device(device), dtype, kernels)
    assert found == way and len(reason) > 20


def test_a_run_records_and_says_how_it_attends(train, tmp_path):
    import json

    train(max_steps=1)
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["decisions"]["attention"]["value"] == "products"
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert sum(line["event"] == "head" for line in lines) == 1


def test_dropout_is_computed_by_torch_aloud_and_as_often_as_it_says(capsys):
    model = tiny_model("gpt2", attn_pdrop=0.5)
    install_attention(model)
    batch = random_batch((30, 20))
    torch.manual_seed(0)
    one = ModelPolicy(model).token_logprobs(batch)
    again = ModelPolicy(model).token_logprobs(batch)
    torch.manual_seed(0)
    same = ModelPolicy(model).token_logprobs(batch)
    assert torch.equal(one, same) and not torch.allclose(one, again)
    assert "dropout" in capsys.readouterr().err
    assert torch.isfinite(one).all() and one.sum().backward() is None
    torch.testing.assert_close(
        ModelPolicy(model.eval()).token_logprobs(batch), ModelPolicy(model).token_logprobs(batch)
    )


SLIDING = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
           "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 5, "max_position_embeddings": 512,
           "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip
OPT = {"vocab_size": 320, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
       "word_embed_proj_dim": 32, "dropout": 0.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
       "max_position_embeddings": 512}  # fmt: skip


def other(kind, settings):
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    install_attention(model)
    return model


def test_layers_of_which_some_slide_are_packed_rightly():
    assert probe.find_disagreement(other("Gemma3TextConfig", {**SLIDING, "query_pre_attn_scalar": 8})) is None


def test_an_architecture_that_tells_its_attention_nothing_is_packed_rightly():
    assert probe.find_disagreement(other("OPTConfig", OPT)) is None


def test_terms_of_the_scores_that_are_not_computed_are_refused():
    settings = {**SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0}
    model = other("GptOssConfig", settings)
    with pytest.raises(LuthierError, match="s_aux"):
        probe.check_architecture(model, packing=True)
