"""Loading a base model and its tokenizer: from a hub, a folder, the embedded model, or the caller's hands."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from luthier.data.read.hub import explain_unreachable
from luthier.errors import LuthierError

if TYPE_CHECKING:
    from luthier.recipe.schema import Model


def tokenizer_of(spec: Model) -> Any:
    """The tokenizer alone, so that data is checked before any weight is read."""
    name = spec.tokenizer or spec.name_or_path
    return tokenizer_at(model_location(name, file="tokenizer_config.json"), revision_of(spec, name))


def tokenizer_at(name: str, revision: str = "main") -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise LuthierError("model-not-found", f"no tokenizer: {first_line(error)}", where=name) from error


def load_model(spec: Model, device: torch.device, arguments: dict[str, Any]) -> Any:
    """The causal LM on its device; `arguments` come from the quantizer."""
    import transformers

    name = model_location(spec.name_or_path)
    dtype = "auto" if spec.dtype == "auto" else getattr(torch, spec.dtype)
    with quiet():
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                name, revision=revision_of(spec, name), dtype=dtype, trust_remote_code=False, **arguments
            )
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise LuthierError("model-not-found", first_line(error), where=name) from error
    return model.to(device)


def check_causal(model: Any) -> None:
    """Raise `recipe-wrong-type` where an object is no causal LM of transformers."""
    import transformers

    known = isinstance(model, transformers.PreTrainedModel) and hasattr(model, model.base_model_prefix)
    if not known or model.config.is_encoder_decoder or model.get_output_embeddings() is None:
        expected = "expected a causal language model of transformers, a hub name, or a folder"
        raise LuthierError("recipe-wrong-type", expected, where="model", found=type(model).__name__)


def read_model(folder: Path, dtype: torch.dtype) -> Any:
    """The causal LM of a folder, on the CPU; the folder's own errors are `artifact-not-found`."""
    import transformers

    with quiet():
        try:
            return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise LuthierError("artifact-not-found", first_line(error), where=str(folder)) from error


def empty_model(folder: Path, device: torch.device) -> Any:
    """Return the causal LM of a folder's config, with weights that are still to be filled."""
    import transformers

    with quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=config.dtype, trust_remote_code=False)
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise LuthierError("artifact-not-found", first_line(error), where=str(folder)) from error
    return model.to(device)


def model_location(name: str, file: str = "config.json") -> str:
    """What transformers is asked for: a folder that exists, or a hub name; a path that is neither is refused here."""
    if name == "demo":
        from luthier.demo import MODEL

        return str(MODEL)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / file).is_file():
            raise LuthierError("model-not-found", f"the folder has no {file}", where=name)
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


def _is_cached(name: str) -> bool:
    """Whether the hub's client has kept anything of this model."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return (Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}").is_dir()


def original_weight(source: str | None, model: nn.Module, layer: nn.Module) -> Tensor:
    """[out, in] float32: a layer's weight as the checkpoint has it, read again from its safetensors."""
    from safetensors import safe_open

    name = next((f"{n}.weight" for n, m in model.named_modules() if m is layer), None)
    if source is None or name is None:
        raise LuthierError("model-not-found", "there is no checkpoint to read the original weight from", where=name)
    plain = name.replace(".base_layer.", ".")
    for file in _weight_files(source):
        with safe_open(file, framework="pt") as held:
            for candidate in (plain, plain.removeprefix("model.")):
                if candidate in held.keys():  # noqa: SIM118 - safe_open is no mapping
                    return held.get_tensor(candidate).float()
    raise LuthierError("model-not-found", f"the checkpoint holds no {plain}", where=source)


def _weight_files(source: str) -> list[Path]:
    folder = Path(model_location(source))
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(source, allow_patterns="*.safetensors"))
    return sorted(folder.glob("*.safetensors"))


def revision_of(spec: Model, name: str) -> str:
    return spec.revision if spec.revision and not os.path.isdir(name) else "main"


def first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


class quiet:  # noqa: N801
    """transformers draws a bar for every load; ours is the only bar."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self.was = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        if self.was:
            logging.enable_progress_bar()
