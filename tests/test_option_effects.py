"""Every option of a recipe, set alone, changes what a run does or is refused by its name.

A short run with the option and one without are compared: numbers, files, decisions, what the log says. An option that
makes a run quicker or safer and nothing else is listed with the test that shows its effect.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import attrs
import luthier
import pytest
from luthier import LuthierError
from luthier.recipe.schema import Data, Distributed, Model, Settings, Source

ROOT = Path(__file__).parents[1]
VALIDATED = {"data.validation": 0.25, "eval_steps": 1}
TEMPLATE = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
TWO_EPOCHS = {"num_train_epochs": 2.0}
# A value for each option, and what must stand beside it in both runs
SETTINGS = {
    "adapter": ("full", {}),
    "loss": ({"name": "sft", "label_smoothing": 0.1}, {}),
    "optimizer": ({"name": "adamw", "weight_decay": 0.5}, {}),
    "quantizer": ("nf4", {}),
    "callbacks": (["plot"], {}),
    "provider": ("slurm", {}),
    "penalties": (["l2"], {}),
    "trainer": ("grpo", {}),
    "adapter_from": ("ARTIFACT", {}),
    "reference": ("base", {}),
    "reference_cache": (True, {}),
    "teacher": ("MODEL", {}),
    "teacher_cache": (True, {}),
    "learning_rate": (1e-3, {}),
    "lr_scheduler_type": ("cosine", {}),
    "lr_scheduler_kwargs": ({"min_lr_ratio": 0.5}, {"lr_scheduler_type": "cosine"}),
    "warmup_steps": (2, {}),
    "warmup_ratio": (0.5, {}),
    "num_train_epochs": (2.0, {}),
    "max_steps": (2, {}),
    "max_tokens": (60, {}),
    "global_batch_size": (4, {}),
    "per_device_train_batch_size": (4, {"global_batch_size": 16}),
    "gradient_accumulation_steps": (2, {"global_batch_size": 16}),
    "packing": (False, {}),
    "max_grad_norm": (1e-3, {}),
    "router_aux_loss_coef": (0.1, {}),
    "precision": ("bf16", {}),
    "pure_bf16_update": ("float32_masters", {"precision": "pure_bf16"}),
    "num_threads": (1, {}),
    "torch_compile": (False, {}),
    "kernels": ("none", {}),
    "layerwise_lr_decay": (0.5, {}),
    "lr_multipliers": ({"lora_A": 0.1}, {}),
    "eval_steps": (1, {"data.validation": 0.25}),
    "eval_on_start": (True, VALIDATED),
    "metrics": (["exact_match"], VALIDATED),
    "max_eval_batches": (1, {**VALIDATED, "max_tokens_per_device": 32}),
    "save_strategy": ("epoch", TWO_EPOCHS),
    "save_steps": (1, {}),
    "save_samples": (8, {}),
    "save_final": (False, {}),
    "save_dtype": ("bfloat16", {}),
    "max_shard_size": ("20KB", {"merge": True}),
    "save_total_limit": (1, {"save_steps": 1}),
    "metric_for_best_model": ("eval_accuracy", {**VALIDATED, "load_best_model_at_end": True}),
    "greater_is_better": (True, {**VALIDATED, "load_best_model_at_end": True}),
    "load_best_model_at_end": (True, {**VALIDATED, "greater_is_better": True}),
    "logging_steps": (3, {}),
    "gradient_flow_steps": (1, {}),
    "output_dir": ("elsewhere", {}),
    "merge": (True, {}),
    "seed": (1, {}),
    "model.revision": ("abc", {}),
    "model.tokenizer": ("demo", {}),
    "model.dtype": ("bfloat16", {}),
    "model.dropout": (0.5, {}),
    "data.validation": (0.25, {}),
    "data.format": ("text", {}),
    "data.text_unit": ("line", {}),
    "data.max_length": (16, {"data.overlong": "drop"}),
    "data.overlong": ("truncate", {"data.max_length": 16}),
    "data.chat_template": (TEMPLATE, {}),
    "data.chat_template_kwargs": ({"greeting": "Good day. "}, {"data.chat_template": "{{ greeting }}" + TEMPLATE}),
    "data.train_on": ("all", {}),
    "data.bad_rows": ("drop", {"data.train.0.path": "BROKEN"}),
    "data.max_bad_rows": (1, {}),
    "data.unrendered": ("warn", {"data.chat_template": "{% for m in messages %}{% if m.role == 'assistant' %}"
                                 "{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"}),
    "data.block_size": (5, {"data.format": "text"}),
    "data.streaming": (True, {"lr_scheduler_type": "constant"}),
    "data.shuffle_buffer": (2, {"data.streaming": True, "lr_scheduler_type": "constant"}),
    "data.train.0.split": ("test", {}),
    "data.train.0.name": ("main", {}),
    "data.train.0.revision": ("abc", {}),
    "data.train.0.columns": ({"weight": "count"}, {}),
    "data.train.0.template": ({"text": "about {count}"}, {"data.format": "text"}),
    "data.train.0.max_rows": (10, {}),
    "data.train.0.share": (0.5, {}),
    "data.train.0.repeat": (2, {}),
    "data.train.0.weight": (2.0, {}),
    "distributed.strategy": ("fsdp", {}),
    "distributed.backend": ("nccl", {}),
}  # fmt: skip
ELSEWHERE = {  # what changes neither numbers nor files of a sound run, and the tests that show what it does
    "max_tokens_per_device": "core/tests/training/test_invariance.py",
    "memory_check": "core/tests/memory/test_memory_fit.py",
    "oom_recovery": "core/tests/step/test_memory_recovery.py",
    "on_nonfinite": "core/tests/health/test_health_policy.py",
    "gradient_checkpointing": "core/tests/model/test_recompute.py",
    "training_mode": "core/tests/training/test_modes.py",
    "max_eval_answers": "tests/test_metrics.py",
    "async_save": "core/tests/checkpoint/test_saving.py",
    "data.num_proc": "core/tests/data/test_workers.py",
    "data.cache": "core/tests/data/test_cache.py",
    "data.unsupervised": "core/tests/data/test_bad_rows.py",
    "distributed.timeout": "core/tests/distributed/test_parallel_world.py",
    "device": "core/tests/hardware/test_devices.py",
    "run_name": "core/tests/training/test_settings.py",
}
CLOCKS = {"tokens_per_second", "elapsed", "peak_memory", "run_id", "duration_seconds", "output_path", "artifact",
          "merged", "best_checkpoint", "parts"}  # fmt: skip
NAMED = {"model": Model, "data": Data, "data.train.0": Source, "distributed": Distributed}
SAMPLE = ("learning_rate", "reference_cache", "save_steps", "data.train.0.repeat")


def all_options():
    own = {field.name for field in attrs.fields(Settings)} - {"model", "data", "distributed"}
    inner = {f"{above}.{field.name}" for above, cls in NAMED.items() for field in attrs.fields(cls)}
    return own | inner - {"model.name_or_path", "data.train", "data.train.0.path"}


def test_every_option_has_a_value_that_is_tried_or_a_test_of_its_own():
    assert all_options() == SETTINGS.keys() | ELSEWHERE.keys()
    for name, place in ELSEWHERE.items():
        assert name.rpartition(".")[2] in (ROOT / place).read_text("utf-8"), (name, place)


@pytest.fixture(scope="module")
def observe(tmp_path_factory, model_folder, rows):
    """`observe(settings)`: what a short run did, or the error that refused it; each is run once."""
    folder = tmp_path_factory.mktemp("effects")
    data = folder / "rows.jsonl"
    data.write_text(
        "".join(f"{json.dumps({**row, 'text': f'line {i}', 'count': 1 + i % 3})}\n" for i, row in enumerate(rows))
    )
    (folder / "broken.jsonl").write_text(data.read_text() + "{")
    known = {}

    def run(settings):
        key = json.dumps(settings, sort_keys=True)
        if key not in known:
            known[key] = outcome_of(settings, folder / str(len(known)), model_folder, data, run)
        return known[key]

    return run


def outcome_of(settings, folder, model_folder, data, run):
    base = {"model": str(model_folder), "data.train": [{"path": str(data)}], "adapter": {"name": "lora", "r": 2},
            "global_batch_size": 8, "exact_callbacks": ["jsonl"], "output_dir": str(folder), "data.format": "messages"}  # fmt: skip
    given = {name: model_folder if value == "MODEL" else value for name, value in settings.items()}
    if given.get("adapter_from") == "ARTIFACT":
        given["adapter_from"] = run({"learning_rate": 1e-2})["folder"] / "adapter"
    if "output_dir" in given:
        given["output_dir"] = str(folder / given["output_dir"])
    if "callbacks" in given:
        base.pop("exact_callbacks")
    source = {name.rpartition(".")[2]: given.pop(name) for name in list(given) if name.startswith("data.train.0.")}
    if source.get("path") == "BROKEN":
        source["path"] = str(data.with_name("broken.jsonl"))
    base["data.train"] = [{**base["data.train"][0], **source}]
    try:
        luthier.train(**{**base, **given})
    except LuthierError as error:
        return {"refused": f"{error.where} {error.problem} {error.remedy}", "code": error.code}
    return {"folder": folder, **digest_run(folder)}


def digest_run(folder):
    """What can be seen of a run but for its clocks and for the recipe that it was given."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    tensors = {name: hashlib.sha256(path.read_bytes()).hexdigest()
               for name, path in files.items() if path.suffix == ".safetensors"}  # fmt: skip
    numbers = [strip_clocks(json.loads(line)) for name, path in files.items() if name.endswith("metrics.jsonl")
               for line in path.read_text("utf-8").splitlines()]  # fmt: skip
    record = next(
        (json.loads(path.read_text("utf-8")) for name, path in files.items() if name.endswith("run.json")), {}
    )
    return {"files": sorted(files), "tensors": tensors, "numbers": numbers,
            "decisions": record.get("decisions"), "result": strip_clocks(record.get("result", {}))}  # fmt: skip


def strip_clocks(numbers):
    return {name: value for name, value in numbers.items() if name not in CLOCKS}


def check_effect(name, observe):
    value, beside = SETTINGS[name]
    without, found = observe(beside), observe({**beside, name: value})
    if "refused" in found and "refused" not in without:
        option = name.rpartition(".")[2]
        assert option in found["refused"] or str(value) in found["refused"], found
        assert found["code"] != "internal"
        return
    seen = {key for key in found.keys() | without.keys() if key != "folder" and found.get(key) != without.get(key)}
    assert seen, f"{name}: {value} does nothing"


@pytest.mark.parametrize("name", SAMPLE)
def test_an_option_changes_the_run_or_is_refused_by_name(name, observe):
    check_effect(name, observe)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SETTINGS.keys() - set(SAMPLE)))
def test_each_option_changes_the_run_or_is_refused_by_name(name, observe):
    check_effect(name, observe)
