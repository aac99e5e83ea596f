"""The context of a check is the engine's, and the kit's quantized base is worth the name."""

from __future__ import annotations

import attrs
import pytest
import torch
from luthier.errors import LuthierError
from luthier.plugins.contracts.values import Context
from luthier.plugins.registry import check_part
from luthier.testing import context, expect_error
from luthier.testing.contexts import base_model, batch_logits, probe_batch, relative_distance, separate_documents
from luthier.testing.quantizers.kit_quantizer import CodedLinear, CodedQuantizer
from luthier.testing.states import carry_tree
from luthier.testing.worlds import random_batch, tiny_model


def test_it_is_a_context_with_the_models_own_values():
    model = tiny_model()
    found = context(model, seed=5, total_steps=7)
    assert isinstance(found, Context)
    assert (found.config, found.dtype, found.seed, found.total_steps) == (model.config, torch.float32, 5, 7)
    assert len(list(found.batches(3))) == 3


def test_a_dense_layer_gives_its_weight_and_takes_another():
    model = tiny_model("gpt2")
    layer = model.transformer.h[0].attn.c_attn  # Conv1D holds [in, out]
    found = context(model)
    weight = found.dequantize(layer).clone()
    assert weight.shape == (96, 32)
    found.requantize(layer, 2 * weight)
    torch.testing.assert_close(found.dequantize(layer), 2 * weight)


def test_a_quantized_layer_is_read_and_written_through_its_quantizer():
    quantizer = CodedQuantizer()
    model = base_model(quantizer=quantizer)
    layer = model.model.layers[0].self_attn.q_proj
    found = context(model, quantizer=quantizer)
    other = torch.randn(32, 32)
    found.requantize(layer, other)
    assert isinstance(layer, CodedLinear)
    assert relative_distance(found.dequantize(layer), other) < 0.01


def test_an_original_weight_is_given_or_refused_by_path():
    model = tiny_model()
    layer, weight = model.model.layers[0].self_attn.q_proj, torch.ones(32, 32)
    found = context(model, originals={"model.layers.0.self_attn.q_proj": weight})
    assert found.original(layer).equal(weight)
    with pytest.raises(LuthierError, match=r"model\.layers\.0\.self_attn\.k_proj"):
        found.original(model.model.layers[0].self_attn.k_proj)
    with expect_error("part-unsupported"):
        context(model).original(layer)


def test_the_kits_quantizer_keeps_the_protocol_and_the_head():
    quantizer = check_part(CodedQuantizer(), "quantizer", "kit")
    model = base_model(quantizer=quantizer)
    assert type(model.lm_head) is torch.nn.Linear
    assert sum(isinstance(m, CodedLinear) for m in model.modules()) == 14
    before, after = (
        batch_logits(base_model(), probe_batch()),
        batch_logits(base_model(quantizer=quantizer), probe_batch()),
    )
    assert 0 < relative_distance(after, before) < 0.05


def test_documents_are_taken_apart_as_they_were_packed():
    batch = random_batch((4, 2, 5), supervised=1.0)
    parts = separate_documents(batch)
    assert [p.num_tokens for p in parts] == [4, 2, 5]
    assert torch.cat([p.labels for p in parts]).equal(batch.labels)


def test_distance_is_relative_and_sees_nan():
    one = torch.tensor([3.0, 4.0])
    assert relative_distance(one * 1.1, one) == pytest.approx(0.1)
    assert relative_distance(one * float("nan"), one) == float("inf")


def test_a_carried_state_is_fresh_memory_with_the_same_bits():
    tensor = torch.randn(3, dtype=torch.bfloat16)
    found = carry_tree({"a": tensor, "b": [1, 2.5, None, "x"], "c": {"d": True}})
    assert (found["b"], found["c"]) == ([1, 2.5, None, "x"], {"d": True})
    assert found["a"].equal(tensor) and found["a"].data_ptr() != tensor.data_ptr()


def test_a_carried_state_names_what_no_checkpoint_holds():
    with expect_error("checkpoint-state", "b/0") as caught:
        carry_tree({"b": [attrs.asdict, {1}][1:]})
    assert caught.value.code == "checkpoint-state"
