"""Tiny real models and a byte-level tokenizer, built in code from a seed: no downloads, no GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from luthier.data.batches.batch import Batch

VOCABULARY: Final = 320
SPECIALS: Final = ("<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>")
TEMPLATE: Final = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHAPE: Final = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2: Final = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
SPECIAL_IDS: Final = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
QUIET: Final = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GEMMA: Final = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, "final_logit_softcapping": 5.0}
GRANITE: Final = {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5}

# name -> (configuration class of transformers, its arguments)
ARCHITECTURES: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "llama": ("LlamaConfig", SHAPE),
    "qwen2": ("Qwen2Config", SHAPE),
    "qwen3": ("Qwen3Config", {**SHAPE, "head_dim": 8}),
    "mistral": ("MistralConfig", {**SHAPE, "sliding_window": 8}),
    "gemma2": ("Gemma2Config", {**SHAPE, **GEMMA, "attn_logit_softcapping": 2.0}),
    "phi3": ("Phi3Config", SHAPE),
    "gpt2": ("GPT2Config", {**GPT2, **SPECIAL_IDS, **QUIET}),
    "gpt_neox": ("GPTNeoXConfig", {**SHAPE, "attention_dropout": 0.0, "hidden_dropout": 0.0}),
    "mixtral": ("MixtralConfig", {**SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granite": ("GraniteConfig", {**SHAPE, **GRANITE, "attention_multiplier": 0.3}),
}


_made_by: list[Callable[[], Any]] = []  # makes the author's own model, while checks run on it


@contextmanager
def models_made_by(make: Callable[[], Any] | None) -> Iterator[None]:
    """Let `tiny_model()` return the author's model within this context; None changes nothing."""
    if make is None:
        yield
        return
    _made_by.append(make)
    try:
        yield
    finally:
        _made_by.pop()


def tiny_model(architecture: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a causal LM of about 30k parameters in float32, in training mode; `changes` go to its configuration."""
    import torch
    import transformers

    name, arguments = ARCHITECTURES[architecture]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if _made_by and architecture == "llama":
            model = _made_by[-1]()
        else:
            config = getattr(transformers, name)(**(arguments | changes))
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():  # with the usual 0.02 all outputs would be alike
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
            elif parameter.abs().sum() == 0:
                torch.nn.init.normal_(parameter, std=0.05)  # biases large enough to have an effect
    return model.train()


def tiny_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte and seven special tokens. It puts a BOS before plain texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIALS))
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=512
    )
    tokenizer.chat_template = template
    return tokenizer


def save_tiny_model(folder: Path, architecture: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """Write a model folder with its tokenizer, as `from_pretrained` reads it, and return its path."""
    from luthier.model.load import quiet

    with quiet():
        tiny_model(architecture, seed, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def random_batch(lengths: Sequence[int] = (5, 9, 3), seed: int = 0, supervised: float = 0.7) -> Batch:
    """Return a packed batch of random tokens, of which about the share `supervised` has labels."""
    import numpy as np

    from luthier.data.batches.batch import collate_examples
    from luthier.data.examples import IGNORED, TokenExample

    random = np.random.default_rng(seed)
    examples = []
    for length in lengths:
        ids = random.integers(len(SPECIALS), len(SPECIALS) + 256, length).astype(np.int32)
        labels = np.where(random.random(length) < supervised, ids, IGNORED).astype(np.int32)
        labels[-1] = ids[-1]
        examples.append(TokenExample(input_ids=ids, labels=labels))
    return collate_examples(examples)
