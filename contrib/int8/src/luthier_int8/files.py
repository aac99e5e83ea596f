"""Write and read an int8 model: its configuration, and every tensor once in one safetensors file.

The header of the file says, as JSON, which layers are int8 and how. The file is not called `model.safetensors`, because
transformers would load that and take the codes for weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from luthier import LuthierError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from luthier_int8.layer import Int8Linear

FILE: Final = "int8.safetensors"
FORMAT: Final = "luthier-int8/1"


def export(model: Any, folder: Path) -> None:
    """Write a model with `Int8Linear` layers into `folder`. Merge an adapter before."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Int8Linear)}
    header = {name: {"group_size": one.group_size, "transposed": one.transposed} for name, one in layers.items()}
    tensors, tied = _unique(model.state_dict())
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": FORMAT, "layers": json.dumps(header), "tied": json.dumps(tied)}
    save_file(tensors, folder / FILE, metadata)
    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


def load(folder: Path) -> Any:
    """Return the causal LM that `export` wrote, on the CPU, in evaluation mode, with the dtypes it had.

    Raises `artifact-not-found` if there is no such file, `file-damaged` if it is not whole, and `artifact-mismatch` if
    it does not fit its configuration.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    tensors, metadata = _read(Path(folder) / FILE)
    layers, tied = json.loads(metadata["layers"]), json.loads(metadata["tied"])
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    model = AutoModelForCausalLM.from_config(config)
    for name, settings in layers.items():
        _replace(model, name, settings)
    key_mismatch = model.load_state_dict(tensors, strict=False, assign=True)
    wrong = sorted({*key_mismatch.unexpected_keys, *(set(key_mismatch.missing_keys) - tied.keys())})
    if wrong:
        raise LuthierError(
            "artifact-mismatch", "the file has tensors that do not fit the model", where=str(folder), found=wrong[:4]
        )
    for name, first_name in tied.items():
        _tie(model, name, first_name)
    return model.eval()


def _unique(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return each tensor once, and for its other names the name under which it is written."""
    first: dict[tuple[int, Any], str] = {}
    tensors, tied = {}, {}
    for name, tensor in state.items():
        first_name = first.setdefault((tensor.data_ptr(), tensor.shape), name) if tensor.numel() else name
        if first_name == name:
            tensors[name] = tensor.contiguous()
        else:
            tied[name] = first_name
    return tensors, tied


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise LuthierError("artifact-not-found", f"no {FILE} in this folder", where=str(path.parent))
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # cloned: a view of the file may be unaligned, and some kernels then add in another order
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise LuthierError("file-damaged", f"not a whole safetensors file: {error}", where=str(path)) from None
    if metadata.get("format") != FORMAT:
        problem = f"the file's format is not {FORMAT}"
        raise LuthierError("artifact-mismatch", problem, where=str(path), found=metadata.get("format"))
    return tensors, metadata


def _replace(model: nn.Module, name: str, settings: dict[str, Any]) -> None:
    """Replace the dense layer of this name by an empty `Int8Linear`."""
    try:
        dense: Any = model.get_submodule(name)
    except AttributeError:
        raise LuthierError("artifact-mismatch", "the model has no such layer", where=name) from None
    rows, columns = dense.weight.shape[::-1] if settings["transposed"] else dense.weight.shape
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, Int8Linear(columns, rows, bias=dense.bias, **settings))


def _tie(model: nn.Module, name: str, shared: str) -> None:
    """Tie the tensor `name` to the tensor `shared`."""
    (owner, last), (source, first) = (model_path.rpartition(".")[::2] for model_path in (name, shared))
    setattr(model.get_submodule(owner), last, getattr(model.get_submodule(source), first))
