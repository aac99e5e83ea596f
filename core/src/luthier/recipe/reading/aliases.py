"""Other tools' names for our options, and what they mean here.

Axolotl, LLaMA-Factory, TRL, torchtune, mini_trainer, training_hub, backpropagate and brainwires name the same settings
in many ways. Each name is read as our own name, and a note tells the user which that is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import attrs

from luthier.errors import LuthierError
from luthier.plugins.structure import bare_value
from luthier.recipe.reading.computing_aliases import COMPUTING, QUANTIZED
from luthier.recipe.reading.draft import Draft, Entry

if TYPE_CHECKING:
    from luthier.plugins.registry import Plugins

SPELLINGS: Final[dict[str, str]] = {  # our name -> the other names
    "model.name_or_path": "base_model model_name_or_path model_path model_name model_id pretrained_model_name_or_path "
    "base_model_name_or_path",
    "model.revision": "revision model_revision",
    "model.tokenizer": "tokenizer tokenizer_name tokenizer_path tokenizer_name_or_path",
    "data.train": "dataset datasets dataset_name dataset_path data_path train_data train_dataset train_file "
    "train_data_path training_data training_dataset",
    "data.validation": "val_set_size val_size validation_split validation validation_data validation_dataset "
    "validation_data_path val_data val_dataset eval_data eval_dataset eval_data_path test_datasets",
    "data.max_length": "max_length max_seq_length max_seq_len sequence_len sequence_length cutoff_len model_max_length",
    "data.block_size": "block_size",
    "data.streaming": "streaming",
    "data.shuffle_buffer": "buffer_size streaming_multipack_buffer_size",
    "data.num_proc": "num_proc dataset_num_proc preprocessing_num_workers dataset_processes",
    "data.chat_template": "chat_template chat_template_path",
    "adapter": "finetuning_type peft_method adapter_method",
    "adapter.r": "lora_r lora_rank lora_dim",
    "adapter.lora_alpha": "lora_alpha",
    "adapter.lora_dropout": "lora_dropout",
    "adapter.use_rslora": "use_rslora peft_use_rslora",
    "adapter.init_lora_weights": "init_lora_weights peft_init_lora_weights",
    "adapter.target_parameters": "lora_target_parameters",
    "adapter.exclude_modules": "lora_exclude_modules",
    "adapter.modules_to_save": "lora_modules_to_save additional_target",
    "adapter.unfreeze_rank_ratio": "unfreeze_rank_ratio osft_unfreeze_rank_ratio",
    "adapter.target_patterns": "target_patterns osft_target_patterns",
    "loss": "method stage rl alignment loss_function",
    "loss.beta": "dpo_beta orpo_beta simpo_beta kto_beta pref_beta",
    "loss.desirable_weight": "kto_desirable_weight",
    "loss.undesirable_weight": "kto_undesirable_weight",
    "optimizer": "optim",
    "optimizer.weight_decay": "weight_decay",
    "optimizer.momentum": "momentum",
    "optimizer.eps": "eps adam_epsilon adam_eps",
    "adapter_from": "adapter_name_or_path lora_model_dir",
    "reference_cache": "precompute_ref_log_probs",
    "teacher": "teacher_model teacher_model_name_or_path",
    "learning_rate": "lr optimizer.lr peak_lr peak_learning_rate",
    "lr_scheduler_type": "lr_scheduler lr_schedule lr_scheduler_name scheduler",
    "lr_scheduler_kwargs": "scheduler_kwargs",
    "warmup_steps": "num_warmup_steps lr_warmup_steps",
    "num_train_epochs": "num_epochs epochs max_epochs n_epochs",
    "max_steps": "steps num_steps max_train_steps max_training_steps num_training_steps",
    "max_tokens": "max_train_tokens",
    "global_batch_size": "effective_batch_size total_batch_size",
    "max_tokens_per_device": "max_tokens_per_gpu max_batch_len",
    "per_device_train_batch_size": "micro_batch_size per_device_batch_size device_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation grad_accum grad_accumulation_steps accumulation_steps",
    "packing": "sample_packing",
    "max_grad_norm": "gradient_clipping grad_clip clip_grad_norm gradient_clip_val max_gradient_norm",
    "router_aux_loss_coef": "aux_loss_coef",
    "num_threads": "torch_num_threads",
    "layerwise_lr_decay": "layer_wise_lr_decay layer_decay lr_layer_decay",
    "eval_steps": "validation_frequency eval_every eval_interval",
    "save_steps": "checkpoint_every save_every save_interval",
    "save_total_limit": "keep_last_n",
    "logging_steps": "log_every log_every_n_steps log_interval",
    "output_dir": "ckpt_output_dir output output_path out_dir",
    "seed": "random_seed",
}
ALIASES: Final = {alias: name for name, others in SPELLINGS.items() for alias in others.split()}

BATCH_SIZE: Final = (
    "has two readings: global_batch_size, the examples of one optimizer step over all ranks, "
    "and per_device_train_batch_size, those of one micro-batch on one device"
)
DTYPES: Final = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "half": "float16", "float": "float32"}
OPTIMIZERS: Final = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf"), "adamw"),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_torch_8bit", "paged_adamw_8bit"), "adamw_8bit"),
    "paged_adamw_32bit": "paged_adamw",
}
VALUES: Final[dict[tuple[str, ...], dict[str, str]]] = {
    ("optimizer",): OPTIMIZERS,
    ("model", "dtype"): DTYPES,
    ("loss",): {"pt": "sft", "rm": "reward"},  # pretraining is sft on rows of text
}
APART: Final = {"beta1", "beta2"}  # an optimizer may have these as options beside `betas`
BETAS: Final = {"beta1": "beta1", "beta2": "beta2", "adam_beta1": "beta1", "adam_beta2": "beta2"}


def rename_alias(entry: Entry, notes: list[str]) -> list[Entry]:
    """Return the entries that an alias stands for, and add a note; the entry itself if it is no alias."""
    written = ".".join(entry.steps)
    if written in ("batch_size", "train_batch_size"):
        remedy = "Write the one that is meant."
        raise LuthierError("recipe-conflict", BATCH_SIZE, where=".".join(entry.origin), found=bare_value(entry.value),
                           remedy=remedy)  # fmt: skip
    if written in READINGS:
        meant = {} if bare_value(entry.value) is None else READINGS[written](bare_value(entry.value))
        means = " and ".join(f"{name}: {_shown(value)}" for name, value in meant.items())
        meaning = f"means {means}" if meant else "changes nothing"
        notes.append(_labelled(entry, f"{written}: {_shown(bare_value(entry.value))} {meaning}"))
        return [_under(entry, name, value, written) for name, value in meant.items()]
    return _values(_renamed(entry, notes), notes)


def _renamed(entry: Entry, notes: list[str]) -> Entry:
    for n in range(len(entry.steps), 0, -1):
        alias = ".".join(entry.steps[:n])
        if alias in ALIASES:
            notes.append(_labelled(entry, f"{alias} is called {ALIASES[alias]} here"))
            steps = (*ALIASES[alias].split("."), *entry.steps[n:])
            return attrs.evolve(entry, steps=steps, implies=_implied(alias) or entry.implies)
    return entry


def _values(entry: Entry, notes: list[str]) -> list[Entry]:
    """Return the entry with a value that other tools spell differently replaced by ours."""
    known: Mapping[str, str] = VALUES.get(entry.steps, {})
    value = bare_value(entry.value)
    if not isinstance(value, str) or value not in known:
        return [entry]
    notes.append(_labelled(entry, f"{'.'.join(entry.steps)}: {value} is called {known[value]} here"))
    return [attrs.evolve(entry, value=known[value])]


def _labelled(entry: Entry, message: str) -> str:
    label = entry.layer.label(entry.origin)
    return f"{label}: {message}" if label else message


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _under(entry: Entry, name: str, value: Any, alias: str) -> Entry:
    return attrs.evolve(entry, steps=tuple(name.split(".")), value=value, implies=_implied(alias))


def _implied(alias: str) -> str | None:
    """Return the part that an option belongs to if the recipe names none: `lora_r` alone means adapter lora."""
    if ALIASES.get(alias, "").startswith("loss."):
        return alias.split("_", maxsplit=1)[0].replace("pref", "dpo")
    if ALIASES.get(alias, "").startswith("adapter.") or alias in TARGETS:
        return "osft" if "unfreeze" in alias or "patterns" in alias else "lora"
    return None


def _targets(value: Any) -> dict[str, Any]:
    """Return LLaMA-Factory's targets as ours: it separates names by commas, and `all` means all-linear."""
    if isinstance(value, str) and "," in value:
        value = [name.strip() for name in value.split(",")]
    return {"adapter.target_modules": "all-linear" if value in ("all", ["all"]) else value}


def _flag(alias: str, value: Any, true: dict[str, Any], false: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(value, bool):
        raise LuthierError("recipe-wrong-type", "expected bool", where=alias, found=value)
    return true if value else false


def _switch(alias: str, true: dict[str, Any], false: dict[str, Any] | None = None) -> Callable[[Any], dict[str, Any]]:
    return lambda value: _flag(alias, value, true, false or {})


def _bits(value: Any) -> dict[str, Any]:
    names = {4: "nf4", 8: "int8"}
    if type(value) is not int or value not in names:
        raise LuthierError("recipe-out-of-range", "expected 4 or 8", where="quantization_bit", found=value)
    return {"quantizer": names[value]}


def _optimizer_option(key: str) -> Callable[[Any], dict[str, Any]]:
    return lambda value: {f"optimizer.{key}": value}


def _dtype(value: Any) -> dict[str, Any]:
    return {"model.dtype": DTYPES.get(value, value) if isinstance(value, str) else value}


def _warmup(value: Any) -> dict[str, Any]:
    return {"warmup_ratio" if isinstance(value, float) and value < 1 else "warmup_steps": value}


ASSISTANT, ALL = {"data.train_on": "assistant"}, {"data.train_on": "all"}
TARGETS: Final = ("lora_target", "lora_target_modules", "target_modules", "lora_target_linear")
READINGS: Final[dict[str, Callable[[Any], dict[str, Any]]]] = {
    **dict.fromkeys(TARGETS, _targets),
    "lora_target_linear": _switch("lora_target_linear", {"adapter.target_modules": "all-linear"}),
    **{name: _switch(name, {"adapter": "dora"}) for name in ("use_dora", "peft_use_dora")},
    **{name: _switch(name, {"adapter": "lora"}, {"adapter": "full"}) for name in ("use_peft", "lora")},
    "mode": lambda value: {"adapter": value},
    "label_smoothing_factor": lambda value: {"loss.label_smoothing": value},
    "use_dft_loss": _switch("use_dft_loss", {"loss.dft": True}),
    "osft": _switch("osft", {"adapter": "osft"}),
    "load_in_4bit": _switch("load_in_4bit", {"quantizer": "nf4"}),
    "load_in_8bit": _switch("load_in_8bit", {"quantizer": "int8"}),
    "quantization_bit": _bits,
    **{name: _switch(name, ALL, ASSISTANT) for name in ("train_on_inputs", "train_on_prompt", "unmask_messages")},
    **{
        name: _switch(name, ASSISTANT, ALL)
        for name in ("train_on_responses", "train_on_responses_only", "assistant_only_loss", "completion_only_loss")
    },
    **dict.fromkeys(("dtype", "torch_dtype", "train_dtype"), _dtype),
    "warmup": _warmup,
    **COMPUTING,
    **{name: _optimizer_option(key) for name, key in BETAS.items()},
}


def quantized_names(draft: Draft, plugins: Plugins) -> None:
    """Replace `qlora` and `qdora` by the adapters `lora` and `dora` on a base quantized to nf4; errors name both."""
    adapter = draft.tree.get("adapter")
    name = adapter.get("name") if isinstance(adapter, dict) else adapter
    if not isinstance(name, str) or name not in QUANTIZED:
        return
    draft.tree["adapter"] = adapter | {"name": QUANTIZED[name]} if isinstance(adapter, dict) else QUANTIZED[name]
    given = draft.tree.get("quantizer", "nf4")
    other = given.get("name") if isinstance(given, dict) else given
    if other != "nf4":
        problem = f"adapter {name} means {QUANTIZED[name]} with quantizer nf4"
        remedy = f"Write adapter {QUANTIZED[name]} to use it with another quantizer."
        raise LuthierError("recipe-conflict", problem, where="quantizer", found=bare_value(other), remedy=remedy)
    if "quantizer" not in draft.tree:
        draft.tree["quantizer"] = "nf4"
        draft.origins[("quantizer",)] = draft.origins[("adapter",)]
    meaning = f"{name} means adapter {QUANTIZED[name]} with quantizer nf4"
    label = draft.label(("adapter",))
    draft.notes.append(f"{label}: {meaning}" if label else meaning)
    try:
        plugins.get("quantizer", "nf4")
    except LuthierError as error:
        remedy = f"{error.remedy} Or write adapter {QUANTIZED[name]}, with or without another quantizer."
        raise LuthierError(error.code, f"{meaning}, but {error.problem}", where="adapter", remedy=remedy) from None


def joined_betas(draft: Draft, plugins: Plugins) -> None:
    """Join `beta1` and `beta2` into `betas`, unless the optimizer has options of their names."""
    optimizer = draft.tree.get("optimizer")
    if not isinstance(optimizer, dict) or not (apart := APART & set(optimizer)):
        return
    try:
        fields = attrs.fields_dict(plugins.options(plugins.get("optimizer", str(optimizer.get("name")))))
    except LuthierError:
        return  # an unknown optimizer is reported where parts are looked up
    if apart <= set(fields) or "betas" not in fields:
        return
    default: Any = fields["betas"].default
    pair = [optimizer.pop(key, default[i]) for i, key in enumerate(sorted(APART))]
    optimizer["betas"] = pair
