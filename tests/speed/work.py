"""The work that both sides do: a Llama from a seed, and rows of gsm8k, or of its lengths where it is absent."""

from __future__ import annotations

import functools
import gzip
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

SYNTHETIC = 2000  # rows
SIZES: dict[str, dict[str, Any]] = {
    "3m": {"hidden": 256, "inner": 640, "layers": 4},
    "24m": {},
    "1b": {"hidden": 2048, "inner": 8192, "layers": 16, "kv_heads": 8, "dtype": "bfloat16"},  # as Llama 3.2
    "8b": {"hidden": 4096, "inner": 14336, "layers": 32, "kv_heads": 8, "head": 128, "dtype": "bfloat16"},  # as 3.1
}


def llama(
    vocabulary: int, *, hidden: int = 512, layers: int = 8, inner: int = 1280, head: int = 64, kv_heads: int = 0,
    dtype: str = "float32", device: str = "cpu", seed: int = 0,
) -> Any:  # fmt: skip
    """A Llama, made where it will train; as it stands 24M parameters without its embeddings."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{"vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers},
        **{"num_attention_heads": hidden // head, "num_key_value_heads": kv_heads or hidden // head},
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "use_cache": False, "tie_word_embeddings": False},
        **{"max_position_embeddings": 4096, "dtype": dtype},
    )
    torch.manual_seed(seed)
    with torch.device(device):
        return LlamaForCausalLM._from_config(config)


def tokenizer() -> Any:
    """The embedded model's: every vocabulary here holds its ids."""
    from luthier.demo import MODEL
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


@functools.cache
def token_rows(count: int) -> tuple[dict[str, list[int]], ...]:
    """{input_ids, labels} of question and supervised answer, in file order."""
    folder = Path(os.environ.get("LUTHIER_DATA", "")) / "gsm8k"
    file = folder / "train.jsonl.gz"
    if not (os.environ.get("LUTHIER_DATA") and file.is_file()):
        return _synthetic(count)
    encode = tokenizer()
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        read = [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]
    made = []
    for row in read:
        prompt, answer = (encode(row[k], add_special_tokens=False)["input_ids"] for k in ("question", "answer"))
        made.append({"input_ids": [*prompt, *answer, 2], "labels": [*[-100] * len(prompt), *answer, 2]})
    return tuple(made)


def _synthetic(count: int) -> tuple[dict[str, list[int]], ...]:
    """Random tokens in lengths like gsm8k's: log-normal questions and answers."""
    random = np.random.default_rng(0)
    made = []
    for _ in range(min(count, SYNTHETIC)):
        prompt, answer = (int(np.clip(random.lognormal(mean, 0.45), 8, 400)) for mean in (4.5, 4.8))
        ids = random.integers(3, 3072, prompt + answer).tolist()
        made.append({"input_ids": [*ids, 2], "labels": [*[-100] * prompt, *ids[prompt:], 2]})
    return tuple(made)


def pair_rows(count: int, source: str = "pandalm") -> tuple[dict[str, str], ...]:
    """{prompt, chosen, rejected} of a source in PAIRS; without its file random words in lengths like PandaLM's."""
    file = Path(os.environ.get("LUTHIER_DATA", "")) / PAIRS[source].file
    if not (os.environ.get("LUTHIER_DATA") and file.is_file()):
        return _synthetic_pairs(count)
    made = [
        {**row, "prompt": row["prompt"] + "\n"} for row in PAIRS[source].read(file) if row["chosen"] != row["rejected"]
    ]
    return tuple(row for row in made if all(row.values()))[:count]


def _judged_alike(file: Path) -> Iterator[dict[str, str]]:
    """Yield PandaLM's pairs that people judged alike: short prompts, and answers of 65 tokens in the middle."""
    for line in file.read_text("utf-8").splitlines():
        row = json.loads(line)
        yield {name: str(row[name]).strip() for name in ("prompt", "chosen", "rejected")}


def _long_thoughts(file: Path) -> Iterator[dict[str, str]]:
    """Yield the pairs of conversations, answers with long thoughts, that the model has positions for."""
    tokens = tokenizer()
    for line in gzip.decompress(file.read_bytes()).decode("utf-8").splitlines():
        row = json.loads(line)
        prompt, chosen = (message["content"].strip() for message in row["chosen"]["messages"])
        rejected = row["rejected"]["messages"][-1]["content"].strip()
        if max(len(tokens(f"{prompt}\n{answer}")["input_ids"]) for answer in (chosen, rejected)) < 4096:
            yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}


class Pairs(NamedTuple):
    """A file of preference pairs in the folder of data, and how it is read."""

    file: str
    read: Callable[[Path], Iterator[dict[str, str]]]
    most_at_once: int | None = None  # pairs in a micro-batch of a peer, which holds the logits of all, padded


PAIRS: Final[Mapping[str, Pairs]] = {
    "pandalm": Pairs("pandalm/derived_pairs.jsonl", _judged_alike),
    "fireworks_orpo_ifeval": Pairs("fireworks_orpo_ifeval/orpo_ifeval.jsonl.gz", _long_thoughts, most_at_once=2),
}


def _synthetic_pairs(count: int) -> tuple[dict[str, str], ...]:
    random = np.random.default_rng(0)

    def words(mean: float) -> str:
        return " ".join(random.choice(("a", "cat", "sat", "on", "the", "mat"), int(random.lognormal(mean, 0.5)) + 1))

    return tuple({"prompt": words(4.0) + "\n", "chosen": words(3.5), "rejected": words(3.5)} for _ in range(count))


def blocks(count: int, length: int) -> tuple[dict[str, list[int]], ...]:
    """Rows of random tokens, all supervised and all of one length."""
    random = np.random.default_rng(0)
    ids = [random.integers(3, 3072, length).tolist() for _ in range(count)]
    return tuple({"input_ids": row, "labels": row} for row in ids)


def same_updates(model: Any) -> None:
    """Draw each LoRA A from its layer's name, so that two libraries start with the same ones."""
    import torch

    for name, parameter in model.named_parameters():
        found = re.search(r"(layers\.\d+\.\w+\.\w+)\.lora_A", name)
        if found:
            random = torch.Generator().manual_seed(int.from_bytes(found[1].encode()[-7:], "little"))
            bound = parameter.shape[1] ** -0.5
            drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=random)
            parameter.data.copy_(drawn)


def held_out_loss(model: Any, rows: Any) -> float:
    """The mean loss of each supervised token, row by row through the model's plain forward in float32."""
    import torch

    model = model.float().eval()
    total, count, device = 0.0, 0, next(model.parameters()).device
    with torch.no_grad():
        for row in rows:
            ids, labels = (
                torch.tensor([row["input_ids"]], device=device),
                torch.tensor(row["labels"], device=device)[1:],
            )
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            kept = labels != -100
            total += float(torch.nn.functional.cross_entropy(logits[kept], labels[kept], reduction="sum"))
            count += int(kept.sum())
    return total / count


def step_flops(model: Any, *, trained: bool, supervised: float, length: float) -> float:
    """Floating-point operations of one token's share of a step that no implementation can do without.

    Each matrix forward and for the gradient of its input, and, where it is `trained`, for its own; the head for the
    `supervised` share of tokens; causal attention forward and backward in documents of mean `length`.
    """
    config = model.config
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n and "lora" not in n)
    updates = sum(p.numel() for n, p in model.named_parameters() if "lora" in n)
    each = 6 if trained else 4
    head = config.hidden_size * config.vocab_size * supervised
    attention = config.num_hidden_layers * config.hidden_size * length * 7
    return each * (matrices + head) + 6 * updates + attention


def has_bf16(device: Any = "cpu") -> bool:
    """Whether a device computes in bfloat16 by itself, as our own default has it."""
    import torch
    from luthier.hardware.low_precision import bf16_feature

    return bf16_feature(torch.device(device)) is not None


def matmul_rate(model: Any) -> float:
    """Floating-point operations a second of one matrix product of the model's own shape, at its best of fifty.

    In bfloat16, or in float32 where the device only imitates that.
    """
    import time

    import torch

    device, config = next(model.parameters()).device, model.config
    rows, inputs, outputs = 2048 if device.type == "cpu" else 8192, config.hidden_size, config.intermediate_size
    dtype = torch.bfloat16 if has_bf16(device) else torch.float32
    x, weight = (torch.randn(n, inputs, dtype=dtype, device=device) for n in (rows, outputs))
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    seconds = []
    for _ in range(50):
        finished(device)
        began = clock()
        torch.nn.functional.linear(x, weight)
        finished(device)
        seconds.append(clock() - began)
    return 2 * rows * inputs * outputs / min(seconds)


def finished(device: Any) -> None:
    """Wait for what a device was given to do."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
