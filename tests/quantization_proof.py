"""`python -m tests.quantization_proof`: one float model, trained on by every way to fewer bits with equally many tokens.

A Llama of about 3M parameters is pretrained on the texts below LUTHIER_DATA, then continued by each way with each seed,
in a process of its own. A line for each is JSON; the last lines are the table of `docs/quantization.md`, and `--plot`
draws its picture.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import attrs
import luthier

ROOT: Final = Path(__file__).resolve().parents[1]
RANK: Final = {"name": "lora", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
GRADUAL: Final = {"name": "ternary", "method": "twn", "schedule": {"end_step": 45, "schedule_type": "cosine"}}
DISTILL: Final = {"name": "distill", "divergence": "forward_kl", "temperature": 1.0, "ce_weight": 0.5}


@attrs.frozen(kw_only=True)
class Way:
    """A row of the table: what is set beside the shared recipe, and in what form the result is exported."""

    settings: dict[str, Any]
    learning_rate: float = 2e-3
    teacher: bool = False  # the pretrained float model
    export: str | None = "tq2_0"  # the GGUF type whose bytes are the size on disk


WAYS: Final = {
    "float, continued": Way(settings={"adapter": "full"}, export="f16"),
    "rounded afterwards, absmean": Way(settings={"adapter": "full", "quantizer": {"name": "ternary", "method": "absmean"}}),
    "rounded afterwards, twn": Way(settings={"adapter": "full", "quantizer": {"name": "ternary", "method": "twn"}}),
    "ternary, absmean": Way(settings={"adapter": "full", "quantizer": {"name": "ternary", "method": "absmean"}}),
    "ternary, twn": Way(settings={"adapter": "full", "quantizer": {"name": "ternary", "method": "twn"}}),
    "ternary, twn, gradual": Way(settings={"adapter": "full", "quantizer": GRADUAL}),
    "ternary, twn, distilled": Way(
        settings={"adapter": "full", "quantizer": {"name": "ternary", "method": "twn"}, "loss": DISTILL}, teacher=True
    ),
    "ternary, twn, gradual, distilled": Way(
        settings={"adapter": "full", "quantizer": GRADUAL, "loss": DISTILL}, teacher=True
    ),
    "nf4 below lora": Way(settings={"adapter": RANK, "quantizer": "nf4"}, export=None),
    "ternary below lora": Way(settings={"adapter": RANK, "quantizer": {"name": "ternary", "method": "twn"}}, export=None),
}  # fmt: skip
FLOAT, PLAIN = "float, continued", "ternary, absmean"


def main() -> None:
    """Pretrain with each seed, train each way, print a line for each, and then the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ways", nargs="*", default=list(WAYS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pretrain-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rate", type=float, help="another learning rate than each way's own")
    parser.add_argument("--folder", type=Path, help="where models are kept; without it they are not")
    parser.add_argument("--plot", type=Path, help="draw the table to this file")
    parser.add_argument("--lines", type=Path, help="draw and print the lines of this file; nothing is trained")
    parser.add_argument("--one", choices=("pretrain", *WAYS), help="one piece of work, in this process")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(work(given.one, given.seeds[0], given)))
        return
    lines = read_lines(given.lines) if given.lines else list(train_all(given))
    print("\n".join(format_table(lines)))
    if given.plot:
        draw_plot(lines, given.plot)


def train_all(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a line for each way and seed."""
    lines = []
    with tempfile.TemporaryDirectory() as temporary:
        given.folder = (given.folder or Path(temporary)).absolute()
        for seed in given.seeds:
            for way in ("pretrain", *given.ways):
                lines.append(in_own_process(way, seed, given))
                print(json.dumps(lines[-1]), flush=True)
    return lines


def in_own_process(way: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Return what `work` finds in a process of its own."""
    words = [sys.executable, "-m", "tests.quantization_proof", "--one", way, "--seeds", str(seed),
             "--folder", str(given.folder), "--steps", str(given.steps), "--pretrain-steps", str(given.pretrain_steps),
             *([] if given.rate is None else ["--rate", str(given.rate)])]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def work(name: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Pretrain, or train one way, and return its numbers."""
    import torch

    torch.set_num_threads(1)
    home = given.folder / f"seed-{seed}"
    began = time.process_time()
    if name == "pretrain":
        found = pretrain(home, seed, given.pretrain_steps)
    elif name.startswith("rounded"):
        found = {"loss": round_afterwards(home, name, seed)}
    else:
        found = train_way(home, name, seed, given)
    return {"way": name, "seed": seed, **found, "cpu_seconds": time.process_time() - began}


def shared_recipe(seed: int, output: Path) -> dict[str, Any]:
    """Return what every run here has in common: the texts, blocks of 256 tokens, 8 of them a step, a cosine."""
    data = Path(os.environ["LUTHIER_DATA"])
    train = [{"path": str(data / "wikitext2/valid.txt")}, {"path": str(data / "web_text/wikipedia.txt")}]
    held = [{"path": str(data / "wikitext2/test_first30.txt"), "max_rows": 250}]
    return {
        "data": {"train": train, "validation": held, "text_unit": "paragraph", "block_size": 256},
        "lr_scheduler_type": "cosine", "warmup_ratio": 0.05, "global_batch_size": 8, "max_tokens_per_device": 2048,
        "optimizer": {"name": "adamw", "betas": [0.9, 0.95]}, "seed": seed, "output_dir": output,
        "callbacks": ["jsonl"],
    }  # fmt: skip


def pretrain(home: Path, seed: int, steps: int) -> dict[str, Any]:
    """Train a Llama of 3.4M parameters from random weights, and keep it as the base of all ways."""
    import torch
    from luthier.demo import MODEL
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    begin = home / "begin"
    shutil.rmtree(home, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    config = LlamaConfig(
        vocab_size=3072, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.save_pretrained(begin)
    tokenizer.save_pretrained(begin)
    run = luthier.train(
        **shared_recipe(seed, home / "base"), model=str(begin), adapter="full", learning_rate=2e-3, max_steps=steps
    )
    return {"loss": run.eval_loss, "tokens": run.tokens_seen, "parameters": model.num_parameters()}


def round_afterwards(home: Path, name: str, seed: int) -> float:
    """Return the loss of the continued float model with its weights rounded: that before the first step."""
    recipe = shared_recipe(seed, home / name.replace(", ", "-"))
    run = luthier.train(**recipe, **WAYS[name].settings, model=str(home / FLOAT.replace(", ", "-") / "model"),
                        learning_rate=1e-9, max_steps=1, eval_on_start=True)  # fmt: skip
    lines = [json.loads(line) for line in (run.output_path / "metrics.jsonl").read_text().splitlines()]
    return next(line["eval_loss"] for line in lines if "eval_loss" in line)


def train_way(home: Path, name: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Train one way from the pretrained model, and return its loss, the bytes of its file and its speed in generating."""
    way, base = WAYS[name], str(home / "base" / "model")
    more = {**way.settings, **({"teacher": base} if way.teacher else {})}
    run = luthier.train(**shared_recipe(seed, home / name.replace(", ", "-")), **more, model=base,
                        learning_rate=given.rate or way.learning_rate, max_steps=given.steps)  # fmt: skip
    loss = run.eval_metrics["eval_nll"] if way.teacher else run.eval_loss  # that of the labels, whatever was trained
    return {"loss": loss, "tokens": run.tokens_seen, "bytes": size_of(run, way), "decoded": decoding_rate(run)}


def size_of(run: luthier.Run, way: Way) -> int:
    """Return the bytes of the exported file, or of the quantized base and the adapter."""
    if way.export is not None:
        place = run.output_path / "exported"
        luthier.export(run.output_path, {"name": "gguf", "type": way.export}, place)
        return sum(path.stat().st_size for path in place.rglob("*.gguf"))
    return sum(path.stat().st_size for path in run.artifact.rglob("*.safetensors"))


def decoding_rate(run: luthier.Run, count: int = 96) -> float:
    """Return the tokens that the trained model generates in a second of processor time, one after the other."""
    run.generate("The history of", max_new_tokens=8)
    began = time.process_time()
    run.generate("The history of", max_new_tokens=count)
    return count / (time.process_time() - began)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of an earlier run that are JSON."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.startswith("{")]


def closed_share(losses: dict[str, float], name: str) -> float:
    """Return the share of the gap between plain ternary training and the continued float model that a way closes."""
    return (losses[PLAIN] - losses[name]) / (losses[PLAIN] - losses[FLOAT])


def format_table(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Return Markdown: the mean over the seeds and, behind ±, the standard deviation."""
    seeds = sorted({line["seed"] for line in lines})
    losses = {seed: {line["way"]: line["loss"] for line in lines if line["seed"] == seed} for seed in seeds}
    rows = ["| | held-out loss | gap closed | file, kB | tokens/s |", "|---|---|---|---|---|"]
    for name in [name for name in ("pretrain", *WAYS) if all(name in losses[seed] for seed in seeds)]:
        own = [line for line in lines if line["way"] == name]
        closed = [closed_share(losses[seed], name) for seed in seeds] if name != "pretrain" else []
        size = f"{own[0]['bytes'] / 1000:.0f}" if own[0].get("bytes") else ""
        rate = f"{statistics.fmean(line['decoded'] for line in own):.0f}" if own[0].get("decoded") else ""
        share = spread_of(closed, ".2f") if closed else ""
        rows.append(f"| {name} | {spread_of([line['loss'] for line in own], '.3f')} | {share} | {size} | {rate} |")
    return rows


def spread_of(values: Sequence[float], form: str) -> str:
    """Return the mean and the standard deviation."""
    more = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{more}"


def draw_plot(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a point for each seed's loss, a row for each way."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    names = [name for name in WAYS if any(line["way"] == name for line in lines)]
    figure, axes = pyplot.subplots(figsize=(7, 3.4), layout="constrained")
    for row, name in enumerate(reversed(names)):
        losses = [line["loss"] for line in lines if line["way"] == name]
        axes.plot(losses, [row] * len(losses), "o", markersize=5, alpha=0.7)
        axes.plot(statistics.fmean(losses), row, "|", color="black", markersize=14)
    axes.set_yticks(range(len(names)), reversed(names))
    axes.set_xlabel("held-out loss of the weights that are saved")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
