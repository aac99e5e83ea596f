"""Read the written files back with ONNX Runtime and transformers, and compare them with the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import onnx
import onnxruntime
import torch
from luthier import LuthierError
from onnxruntime.capi import onnxruntime_pybind11_state as runtime_errors
from transformers import AutoTokenizer

from luthier_onnx import Onnx
from luthier_onnx.traced import OUTPUT, draw_inputs

UNREADABLE: Final = (  # what a damaged file makes of a session or of a run
    runtime_errors.Fail, runtime_errors.InvalidProtobuf, runtime_errors.InvalidGraph, runtime_errors.InvalidArgument,
    runtime_errors.NoSuchFile, runtime_errors.RuntimeException, onnx.checker.ValidationError, OSError, ValueError,
)  # fmt: skip
LENGTHS: Final = ((32,), (1,), (7, 4, 12))  # tokens of the rows of each comparison; shorter rows are padded
TEXTS: Final = ("Hello world!", "It's so,  isn't\tit?\n\nYes: naïve — 北京 🙂", "1234567 and 3.14")


def compare_files(path: Path, model: Any, tokenizer: Any, options: Onnx) -> dict[str, float]:
    """Return the largest difference of logits, relative to their spread. Raises `artifact-mismatch` above its bound."""
    _compare_tokens(path, tokenizer)
    try:
        onnx.checker.check_model(str(path))
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except UNREADABLE as error:
        raise _mismatch(path, f"ONNX Runtime cannot open the file: {error}") from error
    worst = max(_difference(path, session, model, lengths) for lengths in LENGTHS)
    if not worst <= options.max_logit_error:
        raise _mismatch(path, f"logits differ by more than {options.max_logit_error:g} of their spread", worst)
    return {"logits, relative": worst}


def _difference(path: Path, session: Any, model: Any, lengths: tuple[int, ...]) -> float:
    """Return the root mean square difference over that of the model's logits from their means, without padding."""
    inputs = draw_inputs(model, lengths)
    try:
        (found,) = session.run([OUTPUT], {name: value.numpy() for name, value in inputs.items()})
    except UNREADABLE as error:
        raise _mismatch(path, f"ONNX Runtime cannot run the file: {error}") from error
    expected = model(**inputs, use_cache=False).logits.float()
    if found.shape != tuple(expected.shape):
        raise _mismatch(path, "logits have another shape", found.shape)
    real = inputs["attention_mask"].bool()
    ours, theirs = expected[real], torch.from_numpy(found)[real]
    spread = (ours - ours.mean(-1, keepdim=True)).square().mean().sqrt()
    return float((theirs - ours).square().mean().sqrt() / spread)


def _compare_tokens(path: Path, tokenizer: Any) -> None:
    """Check that the tokenizer that stands besides the file gives the same tokens and the same chat template."""
    try:
        read = AutoTokenizer.from_pretrained(path.parent, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _mismatch(path, f"the tokenizer cannot be read: {error}") from error
    for text in TEXTS:
        ours, theirs = (one(text, add_special_tokens=False)["input_ids"] for one in (tokenizer, read))
        if ours != theirs:
            raise _mismatch(path, f"the text {text!r} becomes other tokens", theirs)
    if read.chat_template != tokenizer.chat_template:
        raise _mismatch(path, "the chat template differs from the tokenizer's")


def _mismatch(path: Path, problem: str, value: object = None) -> LuthierError:
    return LuthierError("artifact-mismatch", problem, where=str(path), found=value)
