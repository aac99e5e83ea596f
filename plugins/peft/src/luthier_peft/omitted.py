"""Options of PEFT that are not offered, with the reasons. `tests/test_options.py` compares them with PEFT."""

from __future__ import annotations

from typing import Final

LUTHIER: Final = "set by Luthier"
NESTED: Final = "a nested configuration of PEFT's own"
UNWRITABLE: Final = "its type cannot be written in a recipe"
LAYOUT: Final = "PEFT reads it from each layer"
MEGATRON: Final = "Megatron's layers are not used here"
GPTQ: Final = "for GPTQ layers; these parts need dense weights"
DATA: Final = "needs a pass over data, or a quantizer, before PEFT starts"
BASE: Final = "changes the base weights, so that disabling could not restore the base"
UNREAD: Final = "this method never reads it"

BOOKKEEPING: Final = ("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
                      "inference_mode")  # fmt: skip

# options left out of every method that has them
EVERYWHERE: Final[dict[str, str]] = {
    **dict.fromkeys(BOOKKEEPING, LUTHIER),
    "fan_in_fan_out": LAYOUT,
    "megatron_config": MEGATRON,
    "megatron_core": MEGATRON,
    "use_qalora": GPTQ,
    "qalora_group_size": GPTQ,
    "layer_replication": "adds layers, but the model's module paths must stay",
    "alora_invocation_tokens": "needs a hook around PEFT's own forward",
    "use_effective_conv2d": "for two-dimensional convolutions, which language models do not have",
    "runtime_offload_base_weight": "moves base weights off the device, where checkpoints and merges expect them",
}

# options left out of one method
OF_METHOD: Final[dict[str, dict[str, str]]] = {
    "adalora": {
        "r": f"{UNREAD}; init_r and target_r are its ranks",
        "use_rslora": UNREAD,
        "use_dora": "PEFT's AdaLoRA refuses it",
        "lora_bias": UNREAD,
        "alpha_pattern": UNREAD,
        "rank_pattern": "its result, not a setting",
        "target_parameters": "PEFT's AdaLoRA cannot target parameters",
        "ensure_weight_tying": "PEFT's AdaLoRA has no embeddings to tie",
    },
    "boft": {"boft_n_butterfly_factor": "needs a CUDA extension that PEFT would compile; without it only 1 works"},
    "osf": {"target_svd_config": UNREAD},
    "pvera": {
        "generator_seed": "seeds a generator that no checkpoint holds; use the run's seed",
        "sample_at_inference": "evaluation must be deterministic",
    },
}

# (method, option) -> choice -> why it is not among the choices
CHOICES: Final[dict[tuple[str, str], dict[str, str]]] = {
    ("lora", "init_lora_weights"): {
        "eva": DATA,
        "corda": DATA,
        "loftq": DATA,
        "olora": BASE,
        "pissa": BASE,
        "pissa_niter_[number of iters]": BASE,
    },
    ("adalora", "init_lora_weights"): {
        **dict.fromkeys(("gaussian", "orthogonal", "mica", "olora", "eva", "corda", "loftq"), UNREAD),
        **dict.fromkeys(("pissa", "pissa_niter_[number of iters]"), UNREAD),
    },
}
