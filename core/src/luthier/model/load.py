"""Loading a base model and its tokenizer: from a hub, a folder, the embedded model, or the caller's hands."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from luthier.data.read.hub import explain_unreachable
from luthier.errors import LuthierError
from luthier.model.config_limits import check_config
from luthier.model.foreign import check_files, explain_reading, locate_file
from luthier.model.weights.loaded_weights import check_finite, check_keys
from luthier.runs.find import describe_folder

if TYPE_CHECKING:
    from luthier.recipe.schema import Model


def tokenizer_of(spec: Model) -> Any:
    """Return the tokenizer alone, so that data is checked before any weight is read."""
    name = spec.tokenizer or spec.name_or_path
    return tokenizer_at(model_location(name, file="tokenizer_config.json"), revision_of(spec, name))


def tokenizer_at(name: str, revision: str = "main") -> Any:
    import transformers

    with explain_reading(name, file="tokenizer.json", said="no tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    with explain_reading(name, file="tokenizer_config.json", said="the tokenizer cannot be used"):
        tokenizer.decode(tokenizer("a")["input_ids"])  # its settings are not looked at before
    return tokenizer


def load_config(name: str, revision: str = "main", code: str = "model-not-found") -> Any:
    """Return the config of a folder or hub model; refused where it asks for what no model has, or for foreign code."""
    import transformers

    with explain_reading(name, code, file="config.json"):
        config = transformers.AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        check_config(config, locate_file(name, "config.json"))
    return config


def load_model(spec: Model, device: torch.device, arguments: dict[str, Any]) -> Any:
    """Return the causal LM on its device, with exactly its weights. `arguments` come from the quantizer."""
    name = model_location(spec.name_or_path)
    dtype = "auto" if spec.dtype == "auto" else getattr(torch, spec.dtype)
    model = _whole_model(name, "model-not-found", revision=revision_of(spec, name), dtype=dtype, **arguments)
    model = model.to(device)
    check_finite(model, name)
    return model


def _whole_model(name: str, code: str, revision: str = "main", *, compared: bool = False, **arguments: Any) -> Any:
    """Return the causal LM of a checkpoint; `model-weights` where its weights are not those that its config asks for.

    `compared`: its outputs are compared with those of the model that it was written from, so that it may hold more.
    """
    load_config(name, revision, code)
    with quiet(), explain_reading(name, code):
        model, info = _model_and_info(name, revision=revision, **arguments)
    check_keys({**info, "unexpected_keys": ()} if compared else info, name)
    return model


def _model_and_info(name: str, **arguments: Any) -> tuple[Any, dict[str, Any]]:
    """Return the causal LM, and which weights were missing, unexpected or of another shape."""
    import transformers

    reader: Any = transformers.AutoModelForCausalLM  # transformers' annotations do not declare the second return value
    return reader.from_pretrained(name, trust_remote_code=False, use_safetensors=True, output_loading_info=True,
                                  ignore_mismatched_sizes=True, **arguments)  # fmt: skip


def read_headers(folder: str, code: str = "model-not-found") -> tuple[Any, dict[str, Any]] | None:
    """Return the causal LM of a folder without numbers, and which weights its files lack or have in another shape.

    None where accelerate is not installed: transformers loads to `meta` with it alone.
    """
    from transformers.utils import is_accelerate_available

    if not is_accelerate_available():
        return None
    with quiet(), explain_reading(folder, code):
        return _model_and_info(folder, device_map="meta")


def check_named_model(spec: Model) -> None:
    """Raise `model-not-found` for what of a named model can be seen to be broken without its weights being read."""
    name = model_location(spec.name_or_path)
    if spec.revision is not None and Path(name).is_dir():
        problem, remedy = "nothing reads it: a folder has no revisions", "Leave it out."
        raise LuthierError("recipe-conflict", problem, where="model.revision", found=spec.revision, remedy=remedy)
    check_files(name)
    config = load_config(name, revision_of(spec, name))
    if getattr(config, "quantization_config", None) is None and any(Path(name).glob("*.safetensors")):
        headers = read_headers(name)
        if headers is not None:  # elsewhere, the load itself tells
            check_keys(headers[1], name)


def check_causal(model: Any) -> None:
    """Raise `recipe-wrong-type` where an object is no causal LM of transformers."""
    import transformers

    known = isinstance(model, transformers.PreTrainedModel) and hasattr(model, model.base_model_prefix)
    if not known or model.config.is_encoder_decoder or model.get_output_embeddings() is None:
        expected = "expected a causal language model of transformers, a hub name, or a folder"
        raise LuthierError("recipe-wrong-type", expected, where="model", found=type(model).__name__)


def read_model(folder: Path, dtype: torch.dtype) -> Any:
    """Return the causal LM of a folder, on the CPU; the folder's own errors are `artifact-not-found`."""
    return _whole_model(str(folder), "artifact-not-found", compared=True, dtype=dtype)


def empty_model(folder: Path, device: torch.device) -> Any:
    """Return the causal LM of a folder's config, with weights that are still to be filled."""
    import transformers

    config = load_config(str(folder), code="artifact-not-found")
    with quiet(), explain_reading(folder, "artifact-not-found"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=config.dtype, trust_remote_code=False)
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.to(device)


def model_location(name: str, file: str = "config.json") -> str:
    """Return the name that transformers loads: a folder that exists, or a hub name; other paths are refused here."""
    if name == "demo":
        from luthier.demo import MODEL

        return str(MODEL)
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        if not (path / file).is_file():
            remedy = describe_folder(path)
            raise LuthierError("model-not-found", f"the folder has no {file}", where=name, remedy=remedy)
        return str(path)
    if name.startswith("python:"):
        remedy = "Give the name or folder of the same model as base."
        raise LuthierError("model-not-found", "the base model was an object in Python", where=name, remedy=remedy)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.is_file():
        raise LuthierError("model-not-found", "there is no such folder", where=name)
    if not _is_cached(name) and (problem := explain_unreachable()):
        problem, remedy = f"there is no such folder, and {problem}", "Check the path, or the network."
        raise LuthierError("model-not-found", problem, where=name, remedy=remedy)
    return name


def find_model_folder(name: str) -> Path:
    """Return the folder of the model that a recipe names so, `demo` among them; nothing is fetched.

    The path does not exist where the model is not on this machine.
    """
    return Path(model_location(name)) if name == "demo" else cached_folder(name)


def cached_folder(name: str) -> Path:
    """Return a model's folder: that of its name, or where the hub's client keeps it; nothing is fetched.

    The path does not exist where there is neither.
    """
    path = Path(os.path.expanduser(name))
    if path.is_dir() or not _is_cached(name):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return path


def _is_cached(name: str) -> bool:
    """Return True if the hub's client has kept anything of this model."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return (Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}").is_dir()


def original_weight(source: str | None, model: nn.Module, layer: nn.Module) -> Tensor:
    """Return [out, in] float32: a layer's weight as the checkpoint has it, read again from its safetensors.

    A checkpoint has [in, out] for transformers' Conv1D, and for a quantized layer that is `transposed`.
    """
    from safetensors import safe_open

    name = next((f"{n}.weight" for n, m in model.named_modules() if m is layer), None)
    if source is None or name is None:
        raise LuthierError("model-not-found", "there is no checkpoint to read the original weight from", where=name)
    plain = name.replace(".base_layer.", ".")
    for file in _weight_files(source):
        with explain_reading(file), safe_open(file, framework="pt") as tensors:
            for candidate in (plain, plain.removeprefix("model.")):
                if candidate in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                    weight = tensors.get_tensor(candidate)
                    if not weight.is_floating_point():
                        problem = "the checkpoint is quantized, and holds no original weight"
                        raise LuthierError("model-not-found", problem, where=plain)
                    weight = weight.float()
                    return weight.T if getattr(layer, "transposed", type(layer).__name__ == "Conv1D") else weight
    raise LuthierError("model-not-found", f"the checkpoint holds no {plain}", where=source)


def _weight_files(source: str) -> list[Path]:
    folder = Path(model_location(source))
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(source, allow_patterns="*.safetensors"))
    return sorted(folder.glob("*.safetensors"))


def revision_of(spec: Model, name: str) -> str:
    return spec.revision if spec.revision and not os.path.isdir(name) else "main"


class quiet:  # noqa: N801
    """transformers draws a bar for every load, and a table of what did not fit; ours is the only bar, and an error."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self.was, self.level = logging.is_progress_bar_enabled(), logging.get_verbosity()
        logging.disable_progress_bar()
        logging.set_verbosity(max(self.level, logging.ERROR))

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self.level)
        if self.was:
            logging.enable_progress_bar()
