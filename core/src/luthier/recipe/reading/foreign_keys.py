"""Options of other tools without counterpart here: why each is not needed, or what to write instead."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from luthier.error_lists import flatten_errors
from luthier.errors import LuthierError
from luthier.recipe.reading.aliases import ALIASES

REASONS: Final[dict[str, str]] = {
    "the model's class and code are those of its config; remote code is never run": "model_type tokenizer_type "
    "is_llama_derived_model is_mistral_derived_model is_qwen_derived_model trust_remote_code tokenizer_use_fast "
    "use_fast_tokenizer tokenizer_legacy processor_type cls_model_config",
    "every option is checked, always": "strict",
    "a training run is what the verb `train` starts": "do_train do_eval do_predict do_sample predict_with_generate",
    "layers whose weights are stored transposed are recognised": "lora_fan_in_fan_out fan_in_fan_out",
    "a loss that becomes NaN ends the run by itself (see on_nonfinite)": "loss_watchdog_threshold "
    "loss_watchdog_patience",
    "documents are packed without padding and attend to themselves alone, with the fastest attention that is there": (
        "flash_attention flash_attn flash_attn_cross_entropy flash_attn_rms_norm sdp_attention xformers_attention "
        "s2_attention pad_to_sequence_len group_by_length eval_sample_packing neat_packing sample_packing_group_size "
        "sample_packing_eff_est total_num_tokens padding_free padding_side use_unsloth enable_liger_kernel "
        "use_liger_kernel liger_rope liger_rms_norm liger_glu_activation liger_fused_linear_cross_entropy shift_attn "
        "unsloth_cross_entropy_loss"
    ),
    "prepared rows are cached by their content": "dataset_prepared_path overwrite_cache push_dataset_to_hub "
    "dataset_keep_in_memory cache_dir tokenized_path dataset_dir shuffle_merged_datasets",
    "a finished run is never overwritten, and a stopped one goes on by itself when the same command runs again": (
        "overwrite_output_dir resume_from_checkpoint auto_resume_from_checkpoints"
    ),
    "processes are started by torchrun or `distributed`": "local_rank ddp_timeout ddp_find_unused_parameters "
    "ddp_bucket_cap_mb ddp_broadcast_buffers device_map deepspeed fsdp fsdp_config fsdp_transformer_layer_cls_to_wrap "
    "world_size gpu_memory_limit",
    "matrix products in TF32 are chosen by `precision`": "tf32",
    "rows are read ahead by itself": "dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor "
    "dataloader_drop_last dataloader_persistent_workers remove_unused_columns",
    "evaluation packs as training does": "per_device_eval_batch_size eval_batch_size eval_accumulation_steps "
    "eval_table_size eval_max_new_tokens include_tokens_per_second",
    "a row's format is recognised by its columns": "type ds_type conversation field_messages chat_template_jinja "
    "default_system_message formatting "
    "dataset_text_field",
    "checkpoints hold everything that resuming needs": "save_only_model save_safetensors save_on_each_node",
    "the loss curve is always drawn, and metrics always written": "plot_loss logging_dir logging_first_step "
    "logging_strategy log_level disable_tqdm debug profiler_steps",
    "quantization is chosen by `quantizer`": "gptq gptq_groupsize bnb_4bit_quant_type bnb_4bit_compute_dtype "
    "bnb_4bit_use_double_quant bnb_config_kwargs double_quantization quantization_method quantization_type",
    "new tokens belong to the model's tokenizer: add them there before training": "special_tokens tokens "
    "resize_token_embeddings_to_32x resize_vocab add_tokens new_special_tokens",
    "a folder of results is not uploaded unasked": "hub_model_id hub_strategy push_to_hub hub_token",
}
TRACKER: Final = "Write callbacks: [{name: wandb, project: NAME}], after `pip install luthier-wandb`."
TRACKIO: Final = (
    "Write callbacks: [{name: trackio, project: NAME, space_id: SPACE}], after `pip install luthier-trackio`."
)
INSTEAD: Final[dict[str, str]] = {  # another tool's option -> what to write here
    **{f"wandb_{name}": TRACKER for name in ("project", "entity", "watch", "name", "run_id", "log_model")},
    **dict.fromkeys(("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), TRACKIO),
    "evals_per_epoch": "Write eval_steps: N.",
    "saves_per_epoch": "Write save_strategy: epoch, or save_steps: N.",
    "max_samples": "Write max_rows: N in each source of data.train.",
    "max_eval_samples": "Write max_rows: N in each source of data.validation.",
}
WORD: Final = re.compile(r"\w+")
FOREIGN: Final = {key: reason for reason, keys in REASONS.items() for key in keys.split()}


def explain_foreign(errors: Sequence[LuthierError], *, lost: bool = False) -> list[LuthierError]:
    """Return the errors, with the reason added to each unknown option that only another tool needs.

    `lost` says that some entries could not be read, so that an option reported as missing may have been given.
    """
    flat = flatten_errors(errors)
    certain = [error for error in flat if not (lost and error.code == "recipe-missing")]
    return [_explained(error) for error in certain or flat]


def find_remedy(path: str) -> tuple[str, str] | None:
    """Return the problem and the remedy for another tool's option at a dotted path; None if it is not known."""
    key = path.rpartition(".")[2] if path.startswith("data.") else path
    if key in INSTEAD:
        return "is written otherwise here", INSTEAD[key]
    return (f"is not needed here, because {FOREIGN[key]}", "Leave it out.") if key in FOREIGN else None


def _meant_option(path: str, known: str) -> str | None:
    """Return the option among the `known` ones that other tools call as the last word of `path`, as in `lora_rank`."""
    kind, _, option = path.rpartition(".")
    names = WORD.findall(known) if known.startswith("Known:") else []
    meant = [ALIASES[alias].rpartition(".") for alias in ALIASES if alias.endswith(f"_{option}")]
    return next((own for section, _, own in meant if section == kind and own in names), None)


def _explained(error: LuthierError) -> LuthierError:
    path = (error.where or "").rpartition(": ")[2].lstrip("-")
    answer = find_remedy(path) if error.code == "recipe-unknown-option" else None
    if answer is None:
        meant = _meant_option(path, error.remedy or "") if error.code == "recipe-unknown-option" else None
        if meant is None:
            return error
        answer = error.problem, f"Did you mean {meant!r}?"
    return LuthierError(error.code, answer[0], where=error.where, found=error.found, remedy=answer[1])
