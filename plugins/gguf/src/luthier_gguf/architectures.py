"""The supported architectures: what GGUF can express of their configuration, and under which keys."""

from __future__ import annotations

import math
from typing import Any, Final

import attrs
import gguf
from luthier import LuthierError

ROPES: Final = ("default", "linear", "llama3")


@attrs.frozen(kw_only=True)
class Architecture:
    """An architecture of llama.cpp. `rotated`: rows of q and k are stored in the order of its own rotation."""

    name: str
    number: gguf.MODEL_ARCH
    rotated: bool = False


LLAMA: Final = Architecture(name="llama", number=gguf.MODEL_ARCH.LLAMA, rotated=True)
ARCHITECTURES: Final = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": Architecture(name="qwen2", number=gguf.MODEL_ARCH.QWEN2),
    "qwen3": Architecture(name="qwen3", number=gguf.MODEL_ARCH.QWEN3),
}


def find_architecture(config: Any) -> Architecture:
    """Return the architecture of a config. Raises `part-unsupported` if llama.cpp would compute it differently."""
    if config.model_type not in ARCHITECTURES:
        problem = f"exporter 'gguf' does not know the architecture '{config.model_type}'"
        raise _unsupported(problem, "model_type", config.model_type, f"It writes {', '.join(ARCHITECTURES)}.")
    window = getattr(config, "sliding_window", None)
    rope = rope_of(config)["rope_type"]
    problems = [
        ("hidden_act", config.hidden_act, config.hidden_act != "silu", "llama.cpp computes only silu"),
        ("rope_parameters", rope, rope not in ROPES, f"llama.cpp scales positions by one of {', '.join(ROPES)}"),
        ("attention_bias", True, getattr(config, "attention_bias", False), "llama.cpp computes no bias there"),
        ("mlp_bias", True, getattr(config, "mlp_bias", False), "llama.cpp computes no bias there"),
        ("sliding_window", window, window is not None and window < config.max_position_embeddings,
         "llama.cpp computes no attention window for it"),
    ]  # fmt: skip
    for where, setting, wrong, reason in problems:
        if wrong:
            raise _unsupported(f"no GGUF of this {config.model_type}: {reason}", where, setting, "Merge it instead.")
    return ARCHITECTURES[config.model_type]


def rope_of(config: Any) -> dict[str, Any]:
    """Return the parameters of rotary positions, always with type and base."""
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    return {"rope_type": "default", "rope_theta": 10000.0, **parameters}


def head_width(config: Any) -> int:
    """Return the width of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope_factors(config: Any) -> list[float] | None:
    """Return the divisor of each rotation by Llama 3's rule, one for each pair of columns, or None."""
    rope = rope_of(config)
    if rope["rope_type"] != "llama3":
        return None
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    original, width = rope["original_max_position_embeddings"], head_width(config)
    factors = []
    for pair in range(width // 2):
        length = 2 * math.pi * rope["rope_theta"] ** (2 * pair / width)  # tokens of one whole turn
        share = min(max((original / length - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - share) / factor + share))
    return factors


def add_shape(writer: gguf.GGUFWriter, config: Any) -> None:
    """Write the model's sizes and constants."""
    rope, width = rope_of(config), head_width(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _unsupported(problem: str, where: str, value: object, remedy: str) -> LuthierError:
    return LuthierError("part-unsupported", problem, where=where, found=value, remedy=remedy)
