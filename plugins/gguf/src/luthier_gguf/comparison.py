"""Read a written file back with gguf's reader and with transformers, and compare it with the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import torch
from luthier import LuthierError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from luthier_gguf import Gguf
from luthier_gguf.vocabulary import Vocabulary, read_vocabulary
from luthier_gguf.weights import BOUNDS, Place, decode, extra_tensors, largest_error, place_weights, prepare

# largest accepted relative differences of logits (root mean square): what the rounding of weights causes
LOGIT_BOUNDS: Final = {"f16": 0.02, "q8_0": 0.1, "q4_0": 0.6, "tq1_0": 0.02, "tq2_0": 0.02}
LENGTH: Final = 32  # tokens of the text whose logits are compared
LISTS: Final = {"tokens": "tokens", "types": "token_type", "merges": "merges"}
NUMBERS: Final = {"begin": "bos_token_id", "pad": "padding_token_id", "unknown": "unknown_token_id",
                  "adds_begin": "add_bos_token", "adds_end": "add_eos_token", "pre": "pre"}  # fmt: skip
TEXTS: Final = ("Hello world!", "It's so,  isn't\tit?\n\nYes: naïve — 北京 🙂", "def f(x):\n    return x")
NUMERALS: Final = ("1234567 and 3.14",)


def compare_file(path: Path, model: Any, tokenizer: Any, options: Gguf) -> dict[str, float]:
    """Return the largest differences. Raises `artifact-mismatch` if one exceeds its bound."""
    with _unchanged(model), torch.no_grad():
        vocabulary = read_vocabulary(model, tokenizer, options)
        places = place_weights(model, options)
        _compare_metadata(path, vocabulary)
        weights = _compare_weights(path, model, places)
        read = _read_model(path, model)
        through = _compare_parameters(path, model, read, places)
        logits = _compare_logits(path, model, read, options)
        _compare_tokens(path, tokenizer, vocabulary)
    return {"weights, of their block's largest": max(weights, through), "logits, relative": logits}


@contextlib.contextmanager
def _unchanged(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _reader(path: Path) -> gguf.GGUFReader:
    try:
        return gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError) as error:
        raise _mismatch(path, f"the file cannot be read: {error}") from error


def _compare_metadata(path: Path, vocabulary: Vocabulary) -> None:
    fields = _reader(path).fields

    def held(key: str) -> Any:
        return fields[key].contents() if key in fields else None

    for name, key in {**LISTS, **NUMBERS}.items():
        if held(f"tokenizer.ggml.{key}") != getattr(vocabulary, name):
            raise _mismatch(path, f"tokenizer.ggml.{key} differs from the tokenizer's")
    if held("tokenizer.chat_template") != vocabulary.template:
        raise _mismatch(path, "the chat template differs from the tokenizer's")
    stops = [held(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    if [stop for stop in stops if stop is not None] != vocabulary.stops:
        raise _mismatch(path, "the tokens that end an answer differ from the model's", stops)


def _compare_weights(path: Path, model: Any, places: dict[str, Place]) -> float:
    """Compare every tensor that gguf reads with the parameter of the model."""
    tensors, state = {tensor.name: tensor for tensor in _reader(path).tensors}, model.state_dict()
    extras = dict(extra_tensors(model.config))
    if tensors.keys() != {place.name for place in places.values()} | extras.keys():
        raise _mismatch(path, "the file holds other tensors than the model")
    for name, values in extras.items():
        if not np.array_equal(tensors[name].data, values):
            raise _mismatch(path, f"{name} differs")
    worst = 0.0
    for weight, place in places.items():
        values, file_tensor = prepare(state[weight], place), tensors[place.name]
        read = decode(file_tensor.data, file_tensor.tensor_type).reshape(values.shape)
        worst = max(worst, _bounded(path, weight, read, values, place))
    return worst


def _compare_parameters(path: Path, model: Any, read: Any, places: dict[str, Place]) -> float:
    """Compare every parameter that transformers reads, with rows in the model's order, with the model's."""
    ours, theirs = model.state_dict(), read.state_dict()
    if ours.keys() != theirs.keys():
        raise _mismatch(path, "transformers reads another model", sorted(ours.keys() ^ theirs.keys()))
    worst = 0.0
    for weight, place in places.items():
        values, read_values = (d[weight].detach().to("cpu", torch.float32).numpy() for d in (ours, theirs))
        worst = max(worst, _bounded(path, weight, read_values, values, place))
    return worst


def _bounded(path: Path, weight: str, read: Any, values: Any, place: Place) -> float:
    error, bound = largest_error(read, values, place.kind), BOUNDS[place.kind]
    if error > bound:
        raise _mismatch(path, f"{weight} differs by more than {place.kind.name} may, {bound:.3g}", error)
    return error


def _read_model(path: Path, model: Any) -> Any:
    """Return the file as transformers loads it, with the model's values for settings that its reader ignores."""
    config = AutoConfig.from_pretrained(
        path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
    )
    for field in ("rope_parameters", "head_dim", "tie_word_embeddings"):
        if hasattr(model.config, field):
            setattr(config, field, getattr(model.config, field))
    return AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        config=config,
        dtype=torch.float32,
        attn_implementation=model.config._attn_implementation,
        local_files_only=True,
        trust_remote_code=False,
    ).eval()


def _compare_logits(path: Path, model: Any, read: Any, options: Gguf) -> float:
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, model.config.vocab_size, (1, LENGTH)))
    ours = _logits(model, ids)
    theirs = _logits(read.to(model.device, model.dtype), ids)
    error = float((theirs - ours).square().mean().sqrt() / (ours - ours.mean(-1, keepdim=True)).square().mean().sqrt())
    bound = LOGIT_BOUNDS[options.type] if options.max_logit_error is None else options.max_logit_error
    if not error <= bound:
        raise _mismatch(path, f"logits differ by more than {bound:g} of their spread", error)
    return error


def _logits(model: Any, ids: Tensor) -> Tensor:
    ids = ids.to(model.device)
    logits: Tensor = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits.float().cpu()


def _compare_tokens(path: Path, tokenizer: Any, vocabulary: Vocabulary) -> None:
    """Check that the tokenizer that transformers reads gives the same tokens and the same chat."""
    read = AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
    )
    for text in (
        TEXTS if vocabulary.pre == "smollm" else TEXTS + NUMERALS
    ):  # transformers does not read its splitting of digits
        ours, theirs = (t(text, add_special_tokens=False)["input_ids"] for t in (tokenizer, read))
        if ours != theirs:
            raise _mismatch(path, f"the text {text!r} becomes other tokens", theirs)
    if read.chat_template != vocabulary.template:
        raise _mismatch(path, "transformers reads another chat template")


def _mismatch(path: Path, problem: str, value: object = None) -> LuthierError:
    return LuthierError("artifact-mismatch", problem, where=str(path), found=value)
