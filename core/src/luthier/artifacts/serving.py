"""Serving: the commands with which other programs serve an artifact, depending on what is in its folder."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any, Final

import attrs

from luthier.errors import LuthierError
from luthier.plugins.registry import installed_plugins
from luthier.recipe.artifact_note import MOVED, RECORD, keeps_base, read_note

USUAL_RANK: Final = 16  # the largest rank that vLLM and SGLang accept by default
RANKS: Final = (32, 64, 128, 256, 320, 512)  # further ranks that vLLM's --max-lora-rank accepts (0.14 to 0.22)


@attrs.frozen(kw_only=True)
class Serving:
    """Commands by the program that they start. `because` says why a merge comes first, or why there is no command."""

    commands: dict[str, str]
    because: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return attrs.asdict(self)


def find_serving(folder: Path, name: str | None = None) -> Serving:
    """Return how an artifact's folder is served under a name; None means its own name, or its run's."""
    run = folder.absolute().parent if (folder.absolute().parent / RECORD).is_file() else None
    word = re.sub(r"[^A-Za-z0-9._-]+", "-", name or (run or folder.absolute()).name)
    files = sorted(folder.glob("*.gguf"))
    if files:
        return _serve_gguf(folder, files[0], word)
    graph = next(iter(sorted(folder.glob("*.onnx"))), None)
    if graph is not None:  # config.json lies beside it, for its tokenizer
        return Serving(commands={"ONNX Runtime": f'onnxruntime.InferenceSession("{graph}")'})
    config, note = _read_json(folder / "adapter_config.json"), read_note(folder)
    if config is None:
        return _serve_model(folder, note, run, word)
    reason = _no_plain_lora(config, note)
    if reason is None:
        return _serve_lora(folder, config, word)
    if not _is_mergeable(note):
        loads = f'PeftModel.from_pretrained(model, "{folder}")'
        return Serving(commands={"PEFT": loads}, because=f"{reason}, and it cannot be merged")
    return _merge_first(folder, run, word, reason)


def _serve_gguf(folder: Path, file: Path, name: str) -> Serving:
    commands = {"llama.cpp": _line("llama-server", "-m", file)}
    if (folder / "Modelfile").is_file():
        commands = {"Ollama": _line("ollama", "create", name, "-f", folder / "Modelfile"), **commands}
    return Serving(commands=commands)


def _serve_model(folder: Path, note: dict[str, Any], run: Path | None, name: str) -> Serving:
    """Return how to serve a whole model: dense, in its quantizer's form, or in a form that transformers knows."""
    config = _read_json(folder / "config.json")
    if config is None:
        return Serving(commands={}, because="the folder has no files that other programs read")
    if note.get("artifact") == "quantized":
        return _serve_quantized(folder, note, run, name)
    if "quantization_config" in config:
        return Serving(commands={"transformers": _loads(folder)})
    return Serving(commands=_of_dense(folder, run))


def _serve_quantized(folder: Path, note: dict[str, Any], run: Path | None, name: str) -> Serving:
    """Layers in a form that only Luthier reads: merged first, or, where they cannot be, written by an exporter."""
    reason = "only Luthier reads its quantized layers"
    if _is_mergeable(note):
        return _merge_first(folder, run, name, reason)
    exporters = [o.record.name for o in installed_plugins().offers("exporter") if getattr(o.record, "quantized", False)]
    source = run or folder.absolute()
    commands = {name: _line("luthier", "export", source, "--format", name) for name in exporters}
    return Serving(commands=commands, because=f"{reason}, and it cannot be merged")


def _serve_lora(folder: Path, config: dict[str, Any], name: str) -> Serving:
    base, rank = str(config["base_model_name_or_path"]), _rank(config)
    size = _line("--max-lora-rank", next(r for r in RANKS if r >= rank)) if rank > USUAL_RANK else ""
    lora = f"{name}={folder}"
    return Serving(commands={
        "vLLM": f"{_line('vllm', 'serve', base, '--enable-lora', '--lora-modules', lora)} {size}".rstrip(),
        "SGLang": _line("python", "-m", "sglang.launch_server", "--model-path", base, "--lora-paths", lora),
        "transformers": f"{_loads(folder)}  # with peft installed",
    })  # fmt: skip


def _merge_first(folder: Path, run: Path | None, name: str, reason: str) -> Serving:
    source = run or folder.absolute()
    dense = _of_dense(source / "merged", run)
    return Serving(commands={"first": _line("luthier", "merge", source), **dense}, because=reason)


def _of_dense(folder: Path, run: Path | None) -> dict[str, str]:
    commands = {
        "vLLM": _line("vllm", "serve", folder),
        "SGLang": _line("python", "-m", "sglang.launch_server", "--model-path", folder),
    }
    if any(offer.record.name == "gguf" for offer in installed_plugins().offers("exporter")):
        newest = run is not None and folder.name in ("merged", "model")  # the run's export is made of this folder
        source, made = (run, run / "gguf") if run and newest else (folder, folder.with_name(f"{folder.name}-gguf"))
        words = () if newest else ("--output-dir", made)
        export = _line("luthier", "export", source, "--format", "gguf", *words)
        create = _line("ollama", "create", source.name, "-f", made / "Modelfile")
        return {**commands, "Ollama": f"{export} && {create}"}
    return {**commands, "transformers": _loads(folder)}


def _no_plain_lora(config: dict[str, Any], note: dict[str, Any]) -> str | None:
    """Return why vLLM and SGLang cannot add an adapter to its base; None if they can."""
    quantizer = note.get("quantizer", {}).get("name", "none")
    kind = str(config.get("peft_type"))
    unread = [n for n in ("modules_to_save", "trainable_token_indices", "target_parameters") if config.get(n)]
    reasons = {
        f"vLLM and SGLang take LoRA, and this is {kind.lower().replace('_', ' ')}": kind != "LORA",
        "vLLM and SGLang take no DoRA": bool(config.get("use_dora")),
        MOVED: kind == "LORA" and not keeps_base(config),
        f"it was trained on weights in {quantizer}, which a merge preserves": quantizer != "none",
        f"vLLM and SGLang take no {' and no '.join(unread)}": bool(unread),
        "vLLM and SGLang take no trained biases": config.get("bias", "none") != "none",
        f"vLLM takes ranks up to {RANKS[-1]}": _rank(config) > RANKS[-1],
        "its base model has no name": not config.get("base_model_name_or_path"),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _rank(config: dict[str, Any]) -> int:
    return max([int(config.get("r") or 0), *(int(r) for r in (config.get("rank_pattern") or {}).values())])


def _is_mergeable(note: dict[str, Any]) -> bool:
    """Return False if the parts said so when the artifact was saved, or if their records do."""
    if not note.get("mergeable", True):
        return False
    plugins = installed_plugins()
    try:
        records = [plugins.get(kind, note[kind]["name"]).record for kind in ("adapter", "quantizer") if kind in note]
    except (LuthierError, KeyError):  # a part from Python, or one that is no longer installed
        return True
    return all(getattr(record, "mergeable", True) for record in records)


def _loads(folder: Path) -> str:
    return f'AutoModelForCausalLM.from_pretrained("{folder}")'


def _line(*words: Any) -> str:
    return shlex.join(str(word) for word in words)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
