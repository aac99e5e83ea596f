"""Written files: what ONNX Runtime makes of them, what is refused, and what a damaged one does."""

import numpy as np
import onnxruntime
import pytest
import torch
from luthier.testing import expect_error
from luthier.testing.worlds import tiny_model, tiny_tokenizer
from luthier_onnx import Onnx
from luthier_onnx.exporter import FILE, OnnxExporter
from transformers import T5Config

INPUTS = ["input_ids", "attention_mask", "position_ids"]


def written(folder, model):
    exporter = OnnxExporter(Onnx())
    exporter.check(model.config)
    exporter.export(model, tiny_tokenizer(), folder)
    return exporter


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
def test_onnx_runtime_gives_the_models_logits(tmp_path, architecture):
    model = tiny_model(architecture).eval()
    found = written(tmp_path, model).verify(model, tiny_tokenizer(), tmp_path)
    assert found["logits, relative"] < 1e-5
    session = onnxruntime.InferenceSession(str(tmp_path / FILE), providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == INPUTS
    ids = np.array([[1, 5, 7]], dtype=np.int64)
    (logits,) = session.run(None, dict(zip(INPUTS, (ids, np.ones_like(ids), np.arange(3)[None]), strict=True)))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids), use_cache=False).logits
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_model_in_bfloat16_is_written_in_float32_and_stays_as_it_is(tmp_path):
    model = tiny_model().to(torch.bfloat16).train()
    exporter = written(tmp_path, model)
    assert exporter.verify(model, tiny_tokenizer(), tmp_path)["logits, relative"] < 1e-5
    assert model.training and model.dtype == torch.bfloat16


@pytest.mark.slow
def test_damaged_files_are_found_out(tmp_path):
    model = tiny_model().eval()
    exporter = written(tmp_path, model)
    weights = tmp_path / f"{FILE}.data"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with expect_error("artifact-mismatch", str(tmp_path / FILE)):
        exporter.verify(model, tiny_tokenizer(), tmp_path)
    weights.write_bytes(whole[:-4000] + b"\1" * 4000)
    with expect_error("artifact-mismatch", str(tmp_path / FILE)):
        exporter.verify(model, tiny_tokenizer(), tmp_path)
    weights.write_bytes(whole)
    strict = OnnxExporter(Onnx(max_logit_error=0.0))
    with expect_error("artifact-mismatch", str(tmp_path / FILE)):
        strict.verify(model, tiny_tokenizer(), tmp_path)
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    with expect_error("artifact-mismatch", str(tmp_path / FILE)):
        exporter.verify(model, tiny_tokenizer(), tmp_path)


def test_a_file_that_is_no_graph_is_refused(tmp_path):
    model = tiny_model().eval()
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / FILE).write_bytes(b"not a graph")
    with expect_error("artifact-mismatch", str(tmp_path / FILE)):
        OnnxExporter(Onnx()).verify(model, tiny_tokenizer(), tmp_path)


def test_a_model_with_an_encoder_is_refused_before_anything_is_read():
    with expect_error("part-unsupported", "exporter"):
        OnnxExporter(Onnx()).check(T5Config())


@pytest.mark.slow
def test_a_model_that_cannot_be_traced_is_refused(tmp_path):
    model = tiny_model().eval()
    plain = model.forward

    def forward(input_ids, attention_mask, use_cache):
        if input_ids.sum().item() > 0:  # depends on values, which no trace has
            return plain(input_ids, attention_mask=attention_mask, use_cache=use_cache)
        raise AssertionError

    model.forward = forward
    with expect_error("part-unsupported", "exporter"):
        OnnxExporter(Onnx()).export(model, tiny_tokenizer(), tmp_path)
    assert not any(tmp_path.iterdir())
