"""The table of other tools' options without counterpart here: why each is not needed, or what to write instead."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import attrs

REASONS: Final[dict[str, str]] = {
    "the model's class and code are those of its config; remote code is never run": "model_type tokenizer_type "
    "is_llama_derived_model is_mistral_derived_model is_qwen_derived_model trust_remote_code tokenizer_use_fast "
    "use_fast_tokenizer tokenizer_legacy processor_type cls_model_config model_class tokenizer_use_mistral_common "
    "model_config tokenizer_config init_config",
    "every option is checked, always": "strict",
    "how layers are recomputed changes no gradient (see gradient_checkpointing)": "use_reentrant_gc",
    "installed plugins are found without being named": "plugins",
    "a training run is what the verb `train` starts": "do_train do_eval do_predict do_sample predict_with_generate",
    "layers whose weights are stored transposed are recognised": "lora_fan_in_fan_out fan_in_fan_out",
    "a loss that becomes NaN ends the run by itself (see on_nonfinite)": "loss_watchdog_threshold "
    "loss_watchdog_patience",
    "documents are packed without padding and attend to themselves alone, with the fastest attention that is there": (
        "flash_attention flash_attn flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_mlp "
        "flash_attn_fuse_qkv flash_optimum sdp_attention xformers_attention eager_attention flex_attention "
        "flex_attn_compile_kwargs attn_implementation s2_attention shift_attn pad_to_sequence_len group_by_length "
        "eval_sample_packing neat_packing sample_packing_group_size sample_packing_bin_size sample_packing_eff_est "
        "sample_packing_sequentially sample_packing_seq_len_multiplier multipack_real_batches pretrain_multipack_attn "
        "batch_flattening max_packed_sequence_len total_num_tokens padding_free padding_side"
    ),
    "the fastest operations that are installed are used by themselves (see kernels)": (
        "use_unsloth enable_liger_kernel use_liger_kernel liger_rope liger_rms_norm liger_rms_norm_gated "
        "liger_layer_norm liger_glu_activation liger_cross_entropy liger_fused_linear_cross_entropy cut_cross_entropy "
        "unsloth_cross_entropy_loss lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel "
        "fused_attn_kernel use_kernels kernel_config use_scattermoe use_sonicmoe experts_implementation "
        "torch_compile_mode torch_compile_backend tiled_mlp"
    ),
    "prepared rows are cached by their content": "dataset_prepared_path overwrite_cache push_dataset_to_hub "
    "dataset_keep_in_memory cache_dir tokenized_path shuffle_merged_datasets skip_prepare_dataset",
    "paths of rows are relative to the recipe": "dataset_dir",
    "a finished run is never overwritten, and a stopped one goes on by itself when the same command runs again": (
        "overwrite_output_dir resume_from_checkpoint auto_resume_from_checkpoints"
    ),
    "processes are started by torchrun or by --nproc-per-node, and share the work as `distributed` says": "local_rank "
    "ddp ddp_timeout ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers device_map world_size "
    "fsdp_config fsdp_version fsdp_transformer_layer_cls_to_wrap gpu_memory_limit accelerator_config dist_config "
    "dp_shard_size dp_replicate_size tensor_parallel_size context_parallel_size expert_parallel_size "
    "sequence_parallel_degree use_ray ray_num_workers",
    "weights are read straight to the device": "low_cpu_mem_usage low_cpu_mem_usage_init torchdistx_path "
    "experimental_skip_move_to_device",
    "matrix products in TF32 are chosen by `precision`": "tf32",
    "rows are read ahead by itself": "dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor "
    "dataloader_drop_last dataloader_persistent_workers remove_unused_columns",
    "evaluation packs as training does": "per_device_eval_batch_size eval_batch_size eval_accumulation_steps "
    "eval_table_size eval_max_new_tokens include_tokens_per_second include_num_input_tokens_seen",
    "accuracy is reported by every evaluation": "compute_accuracy do_causal_lm_eval",
    "a row's format is recognised by its columns": "type ds_type conversation chat_template_jinja formatting "
    "default_system_message dataset_text_field is_file",
    "roles and texts of a conversation are recognised under their usual names": "message_property_mappings roles "
    "message_field_role message_field_content drop_system_message",
    "an answer is trained with its stop token; `data.train_on` says whose messages are": "roles_to_train train_on_eos "
    "train_on_eot eot_tokens",
    "only text is trained": "image_max_pixels video_max_pixels video_fps video_maxlen freeze_vision_tower "
    "freeze_multi_modal_projector freeze_language_model freeze_mm_modules",
    "checkpoints hold everything that resuming needs": "save_only_model save_safetensors save_on_each_node",
    "the loss curve is always drawn, and metrics always written": "plot_loss logging_dir logging_first_step "
    "logging_strategy log_level disable_tqdm debug profiler_steps",
    "a tracker gets numbers, and no weights": "wandb_watch wandb_log_model",
    "quantization is chosen by `quantizer`": "gptq gptq_groupsize gptq_model_v1 bnb_4bit_quant_type "
    "bnb_4bit_compute_dtype bnb_4bit_use_double_quant bnb_config_kwargs double_quantization quantization_method "
    "quantization_type quantize_moe_experts quant_config model_quantization_config model_quantization_config_kwargs",
    "nothing is padded, stop tokens are those of the chat template, and new tokens belong to the model's tokenizer "
    "before training": "special_tokens tokens resize_token_embeddings_to_32x resize_vocab add_tokens "
    "new_special_tokens",
    "a folder of results is not uploaded unasked (see the verb push)": (
        "hub_model_id hub_strategy push_to_hub hub_token"
    ),
    "the hub's own login is used": "hf_use_auth_token",
}

VALUE: Final = "{value}"  # stands in a remedy for what was written
SHARDS: Final = "Write `distributed: fsdp`, which shards the model over the processes; without it, it is chosen."
HELD_OUT: Final = "held-out rows (data.validation) are evaluated every eval_steps, and at the end"
LEAVE: Final = "Leave it out."
RECOGNISED: Final = "Leave it out: that name is recognised."


def _tracker(name: str, option: str) -> str:
    return f"Write `callbacks: [{{name: {name}, {option}: {VALUE}}}]`, after `pip install luthier-{name}`."


def _stopping(option: str) -> str:
    return f"Write `callbacks: [{{name: early_stopping, {option}: {VALUE}}}]`."


def _loss(loss: str) -> str:
    return f"Write `loss: {loss}` in place of this and of stage."


INSTEAD: Final[dict[str, str]] = {  # another tool's option -> what to write here; {value} is what was written
    "wandb_project": _tracker("wandb", "project"),
    "wandb_entity": _tracker("wandb", "entity"),
    "wandb_name": _tracker("wandb", "run_name"),
    "wandb_run_id": _tracker("wandb", "run_name"),
    "wandb_mode": _tracker("wandb", "mode"),
    "mlflow_tracking_uri": _tracker("mlflow", "tracking_uri"),
    "mlflow_experiment_name": _tracker("mlflow", "experiment_name"),
    "project": _tracker("trackio", "project"),
    "trackio_project_name": _tracker("trackio", "project"),
    "trackio_run_name": _tracker("trackio", "run_name"),
    **dict.fromkeys(
        ("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), _tracker("trackio", "space_id")
    ),
    "use_trackio": "Write `callbacks: [trackio]`, after `pip install luthier-trackio`.",
    "use_wandb": "Write `callbacks: [wandb]`, after `pip install luthier-wandb`.",
    "use_mlflow": "Write `callbacks: [mlflow]`, after `pip install luthier-mlflow`.",
    "use_tensorboard": "Write `callbacks: [tensorboard]`, after `pip install luthier-tensorboard`.",
    "early_stopping_patience": _stopping("patience"),
    "early_stopping_threshold": _stopping("min_delta"),
    "evals_per_epoch": "Write `eval_steps: N`: the steps of an epoch, which `luthier plan` shows, divided by {value}.",
    "eval_strategy": "Write `eval_steps: N`, the steps of an epoch, which `luthier plan` shows.",
    "saves_per_epoch": "Write `save_strategy: epoch`, or `save_steps: N`.",
    "max_samples": "Write `data: [{path: FILE, max_rows: {value}}]`: each source has its own limit.",
    "max_eval_samples": "Write `max_rows: {value}` in each source of data.validation.",
    "dataset_exact_deduplication": "Leave it out: rows that repeat are told, and stay unless the file loses them.",
    "data_files": "Write `path: {value}`, its files, as the source's path.",
    "field_messages": "Write `columns: {messages: {value}}` in this source.",
    "field_chosen": "Write `columns: {chosen: {value}}` in this source.",
    "field_rejected": "Write `columns: {rejected: {value}}` in this source.",
    "field": "Write `columns: {text: {value}}` in this source.",
    "deepspeed": SHARDS,
    "fsdp": SHARDS,
    "eta_min": "Write `lr_scheduler_kwargs: {min_lr: {value}}`.",
    "cosine_min_lr_ratio": "Write `lr_scheduler_kwargs: {min_lr_ratio: {value}}`.",
    "rl_beta": "Write `loss: {name: LOSS, beta: {value}}` in place of this and of rl.",
    "unfrozen_parameters": "Write `adapter: {name: modules, target_modules: {value}}` in place of adapter, after `pip "
    "install luthier-selective`.",
    "template": "Leave it out: the tokenizer's own chat template is used; data.chat_template is another, as Jinja text "
    "or a file of it.",
}
INSTEAD["evaluation_strategy"] = INSTEAD["eval_strategy"]
CASES: Final[dict[str, dict[Any, str]]] = {  # values, or types of values, that need another answer than their option
    **dict.fromkeys(
        ("eval_strategy", "evaluation_strategy"),
        {word: f"Leave it out: {HELD_OUT}." for word in ("steps", "no", False)},
    ),
    "pref_loss": {
        "sigmoid": "Leave it out: the loss dpo is sigmoid.",
        **{name: _loss(name) for name in ("orpo", "simpo", "kto")},
        **{name: _loss(f"{{name: dpo, loss_type: {name}}}") for name in ("hinge", "ipo")},
    },
    "type": {dict: "Write `columns: {prompt: COLUMN, completion: COLUMN}` in this source."},
    "field_messages": dict.fromkeys(("messages", "conversations"), RECOGNISED),
    "field_chosen": {"chosen": RECOGNISED},
    "field_rejected": {"rejected": RECOGNISED},
    "field": {"text": RECOGNISED},
    **dict.fromkeys(("use_wandb", "use_mlflow", "use_tensorboard", "use_trackio"), {False: LEAVE}),
}  # fmt: skip
NO_ROWS: Final = "Leave it out, or hold rows out with data.validation, which are evaluated every eval_steps."
# options without effect where our option is not given, that option, the reason, and the remedy
UNREAD: Final[dict[str, tuple[str, str, str]]] = dict.fromkeys(
    ("evals_per_epoch", "eval_strategy", "evaluation_strategy"),
    ("data.validation", "is not needed here, because there are no validation rows", NO_ROWS),
)
MISREAD: Final[dict[str, tuple[Callable[[Any], bool], str]]] = {  # our option -> a value of others, and what to write
    "warmup_steps": (
        lambda value: isinstance(value, float) and 0 < value < 1,
        "Write `warmup_ratio: {value}`, a share of all steps, in place of warmup_steps.",
    ),
}


@attrs.frozen(kw_only=True)
class ForeignValue:
    """A value of the right type that only another tool understands, where `key` is written as that tool calls it.

    One of the keys `beside` in the same recipe shows which tool that is; none are needed if it is empty.
    """

    key: str
    fits: Callable[[Any], bool]
    problem: str
    remedy: str
    beside: frozenset[str] = frozenset()


WORDS: Final = re.compile(r"\w[\w-]*(\s*,\s*\w[\w-]*)*")


def _is_registered(value: Any) -> bool:
    """Return True if one source is given as a plain word, or as several with commas between."""
    paths = [source.get("path") for source in value if isinstance(source, dict)] if isinstance(value, list) else []
    return len(paths) == 1 and isinstance(paths[0], str) and WORDS.fullmatch(paths[0]) is not None


REGISTERED: Final = "this is no file, but a name in another tool's dataset_info.json, which is not read here"
BESIDE: Final = frozenset({"stage", "template", "finetuning_type", "cutoff_len", "dataset_dir"})
TEMPLATES: Final = (
    "tokenizer_default alpaca chatml llama2 llama3 llama3_2_vision llama4 mistral mistral_v1 mistral_v2v3 "
    "mistral_v3_tekken gemma gemma3 phi_3 phi_35 phi_4 qwen qwen_25 qwen2_vl qwen3 cohere command_a deepseek_v2 "
    "deepseek_v3 jamba metharme exaone falcon_h1 llava pixtral aya jinja"
)
VALUES: Final = (
    ForeignValue(
        key="adapter",
        fits=lambda value: value is None,
        problem="is empty, which means that every weight trains",
        remedy="Leave it out, or write adapter: full.",
    ),
    ForeignValue(
        key="dataset",
        fits=_is_registered,
        beside=BESIDE,
        problem=REGISTERED,
        remedy="Write `data: [{path: FILE}]` with the file, or the hub's name, of each.",
    ),
    ForeignValue(
        key="eval_dataset",
        fits=_is_registered,
        beside=BESIDE,
        problem=REGISTERED,
        remedy="Write `data: {train: [{path: FILE}], validation: [{path: FILE}]}`.",
    ),
    ForeignValue(
        key="chat_template",
        fits=lambda value: isinstance(value, str) and value in TEMPLATES.split(),
        problem="this is no template, but another tool's name for one",
        remedy="Leave it out: the tokenizer's own chat template is used; data.chat_template is another, as Jinja text "
        "or a file of it.",
    ),
)
