"""How the embedded model was made: corpus, tokenizer, first weights and demo rows, from a folder of public datasets.

`python -m luthier.demo.making FOLDER` reads `${LUTHIER_DATA}` and fills FOLDER; then `luthier train` on the recipe that
`README.md` beside this file gives pretrains the model. Nothing here runs in `luthier demo`.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

Row = dict[str, Any]

VOCABULARY: Final = 3072
SPECIALS: Final = ("<|pad|>", "<|im_start|>", "<|im_end|>")
TEMPLATE: Final = """\
{%- if tools %}<|im_start|>system
Tools: {{ tools | tojson }}<|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] or '' }}
{%- for c in m['tool_calls'] or [] %}<tool_call>{{ (c['function'] or c) | tojson }}</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SHAPE: Final[dict[str, Any]] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 144,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}


def make(data: Path, folder: Path) -> None:
    """Fill `folder` with corpus and chats, held-out rows of each, the first model, and the demo's rows."""
    folder.mkdir(parents=True, exist_ok=True)
    documents, chats = list(plain_texts(data)), list(conversations(data))
    shuffle = random.Random(0)
    shuffle.shuffle(documents)
    shuffle.shuffle(chats)
    for name, samples, test_size in (("corpus", documents, 40), ("chats", chats, 200)):
        write(folder / f"{name}.jsonl", samples[test_size:])
        write(folder / f"{name}-held-out.jsonl", samples[:test_size])
    tokenizer = train_tokenizer([as_text(row) for row in (*documents, *chats)])
    first_weights(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    train, test = demo_rows(data)
    write(folder / "demo-train.jsonl", train)
    write(folder / "demo-eval.jsonl", test)


def plain_texts(data: Path) -> Iterator[Row]:
    """Documents: web pages rated for quality (DCLM, MIT) and Shakespeare (public domain)."""
    for row in rows(data / "dclm_quality" / "quality.jsonl.gz"):
        yield {"text": row["text"][:6000]}
    play = next((data / "tinyshakespeare").glob("*.txt")).read_text("utf-8")
    scenes = [play[i : i + 1500] for i in range(0, 300_000, 1500)]
    yield from ({"text": scene} for scene in scenes)


def conversations(data: Path) -> Iterator[Row]:
    """Questions and answers: MIT and Apache-2.0 sets only, named in README.md."""
    for row in rows(data / "gsm8k" / "train.jsonl.gz"):
        yield chat(row["question"], re.sub(r"<<.*?>>", "", row["answer"]))
    for row in rows(data / "yesno_reasoning" / "creak_train.jsonl.gz"):
        yield chat(f"True or false? {row['sentence']}", f"{str(row['label']).capitalize()}. {row['explanation']}")
    for row in rows(data / "svamp" / "svamp.jsonl"):
        yield chat(f"{row['Body']} {row['Question']}", f"{row['Equation']} = {row['Answer']}")
    for row in rows(data / "aqua_rat" / "dev.jsonl"):
        yield chat(row["question"], row["rationale"])
    for name in ("roleplay_alpaca.json.gz", "codegen_response_key.jsonl.gz"):
        for row in rows(data / "gpteacher" / name):
            yield chat(row["instruction"], row["output"] if "output" in row else row["response"], row.get("input", ""))
    for row in rows(data / "pandalm" / "testset_v1.jsonl.gz"):  # some answers in this file are not text
        yield chat(row["instruction"], str(row["response1"]), row.get("input", ""))
    for row in rows(data / "sharegpt" / "glaive_toolcall_en.json"):
        turns = [(t["from"], t["value"]) for t in row["conversations"]]
        if len(turns) > 1 and turns[0][0] == "human" and turns[1][0] == "gpt":
            yield chat(turns[0][1], turns[1][1])


def demo_rows(data: Path) -> tuple[list[Row], list[Row]]:
    """Instruction rows of GPTeacher's Toolformer (MIT), none of them in the corpus: to answer with a tool's call."""
    demo = []
    for row in rows(data / "gpteacher_toolformer_neardup" / "toolformer.jsonl.gz"):
        head, _, task = row["instruction"].rpartition("\n")
        if 0.8 in row["kept_at"] and len(row["tools"]) == 1 and head:
            request = f"{task} {row['input']}".strip()
            demo.append(chat(f"Use the tool {row['tools'][0]}. {request}", row["output"]))
    random.Random(1).shuffle(demo)
    return demo[160:1760], demo[:160]


def chat(question: str, answer: str, extra: str = "") -> Row:
    asked = f"{question}\n{extra}" if extra else question
    return {"messages": [{"role": "user", "content": asked.strip()}, {"role": "assistant", "content": answer.strip()}]}


def as_text(row: Row) -> str:
    if "text" in row:
        return row["text"]
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in row["messages"]).rstrip("\n")


def train_tokenizer(texts: Iterable[str]) -> Any:
    """Byte-level BPE of VOCABULARY entries with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIALS), initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator((re.sub(r"<\|im_(start|end)\|>", "", text) for text in texts), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", eos_token="<|im_end|>", model_max_length=1024
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def first_weights(folder: Path) -> None:
    """Write a Llama of SHAPE from seed 0, the recipe's base model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE, initializer_range=0.05)).save_pretrained(folder)


def rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a JSON array or of JSON Lines, gzipped or not."""
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text("utf-8")
    if text.lstrip().startswith("["):
        yield from json.loads(text)
        return
    yield from (json.loads(line) for line in text.split("\n") if line)


def write(path: Path, rows: Iterable[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


if __name__ == "__main__":
    make(Path(os.environ["LUTHIER_DATA"]), Path(sys.argv[1]))
