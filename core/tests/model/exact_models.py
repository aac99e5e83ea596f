"""Tiny models of many architectures in float64 that round nothing to float32, and a stand-in for a GPU's kernel."""

from __future__ import annotations

import torch
import transformers
from luthier.model.attention import install_attention
from luthier.testing.worlds import ARCHITECTURES, SHAPE

SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
MOE = {**SHAPE, **EXPERTS, "moe_intermediate_size": 16, "output_router_logits": True}
GPT = {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "rotary_dim": 4,
       "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
OPT = {**SHAPE, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}
MODELS = {
    **ARCHITECTURES,
    "qwen2_sliding": (
        "Qwen2Config",
        {**SHAPE, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "gemma": ("GemmaConfig", {**SHAPE, "head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", {**SHAPE, **SLIDING, "query_pre_attn_scalar": 8}),
    "phi": ("PhiConfig", SHAPE),
    "gptj": ("GPTJConfig", GPT),
    "opt": ("OPTConfig", OPT),
    "qwen2_moe": ("Qwen2MoeConfig", {**MOE, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": ("Qwen3MoeConfig", {**MOE, "head_dim": 8}),
    "olmo3": ("Olmo3Config", {**SHAPE, **SLIDING}),
    "cohere2": ("Cohere2Config", {**SHAPE, **SLIDING}),
    "starcoder2": (
        "Starcoder2Config",
        {**SHAPE, "sliding_window": 5, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    ),
    "stablelm": ("StableLmConfig", SHAPE),
    "smollm3": ("SmolLM3Config", SHAPE),
    "exaone4": ("Exaone4Config", {**SHAPE, "sliding_window": 5, "sliding_window_pattern": 2}),
    "nemotron": ("NemotronConfig", {**SHAPE, "head_dim": 8}),
    "glm4": ("Glm4Config", {**SHAPE, "head_dim": 8}),
}
APART = {  # which compute attention by themselves, document by document
    "falcon": ("FalconConfig", {**SHAPE, "hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "bloom": ("BloomConfig", {"vocab_size": 320, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": ("MptConfig", {"vocab_size": 320, "d_model": 32, "n_layers": 2, "n_heads": 4}),
    "mamba": ("MambaConfig", {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
}


def exact_model(name, **changes):
    kind, arguments = {**MODELS, **APART}[name]
    config = getattr(transformers, kind)(**{**arguments, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products know no float64
    install_attention(model.eval())
    return model


def stand_in_kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
             causal=False, window_size=(-1, -1), softcap=0.0):  # fmt: skip
    """[T, heads, d]: what flash kernels define, by one masked softmax for each sequence, aligned at its end."""
    assert causal and max_seqlen_q == int(cu_seqlens_q.diff().max()) and max_seqlen_k == int(cu_seqlens_k.diff().max())
    starts_q, starts_k, pieces = cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), []
    for i in range(len(starts_q) - 1):
        own, seen = slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1])
        groups = q.shape[1] // k.shape[1]
        keys, values = (t[seen].transpose(0, 1).repeat_interleave(groups, 0) for t in (k, v))
        scores = q[own].transpose(0, 1) @ keys.transpose(1, 2) * softmax_scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        count, total = scores.shape[1:]
        here, there = torch.arange(total - count, total)[:, None], torch.arange(total)[None]
        hidden = (there > here) | ((there < here - window_size[0]) if window_size[0] >= 0 else there > total)
        pieces.append((scores.masked_fill(hidden, float("-inf")).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(pieces)
