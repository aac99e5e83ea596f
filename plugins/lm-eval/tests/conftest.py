"""Tasks of one's own beside their rows, a tiny model in a folder, and the benchmark as it is installed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from luthier.plugins.registry import Plugins
from luthier.testing.worlds import save_tiny_model

torch.set_num_threads(1)

CAPITALS = [
    ("France", "Paris", "Rome"),
    ("Italy", "Rome", "Paris"),
    ("Peru", "Lima", "Oslo"),
    ("Norway", "Oslo", "Lima"),
]
CHOICES = """
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}, cache_dir: {cache}}}
output_type: multiple_choice
test_split: test
fewshot_split: test
doc_to_text: "The capital of {{{{country}}}} is"
doc_to_choice: "{{{{cities}}}}"
doc_to_target: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
ANSWERS = """
task: capitals_answered
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}, cache_dir: {cache}}}
output_type: generate_until
test_split: test
doc_to_text: "The capital of {{{{country}}}} is"
doc_to_target: "{{{{cities[0]}}}}"
generation_kwargs: {{until: ["e", "."], max_gen_toks: 6, do_sample: false{more}}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
TEXTS = """
task: capitals_read
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}, cache_dir: {cache}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "The capital of {{{{country}}}} is {{{{cities[0]}}}}."
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
GROUP = """
group: all_capitals
task: [capitals]
aggregate_metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of tasks: choices, answers, texts to read, a group, and one that asks for a beam search."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = folder / "capitals.jsonl"
    lines = [json.dumps({"country": country, "cities": [right, wrong]}) for country, right, wrong in CAPITALS]
    rows.write_text("\n".join(lines))
    names: dict[str, Any] = {"rows": rows, "cache": folder / "cache", "more": ""}
    for file, text in (("choices", CHOICES), ("answers", ANSWERS), ("texts", TEXTS)):
        (folder / f"{file}.yaml").write_text(text.format(**names))
    beams = ANSWERS.replace("task: capitals_answered", "task: capitals_in_beams")
    (folder / "beams.yaml").write_text(beams.format(**{**names, "more": ", num_beams: 4"}))
    (folder / "group.yaml").write_text(GROUP)
    return str(folder)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def build() -> Callable[..., Any]:
    """The benchmark, built from the installed plugin."""
    plugins = Plugins()
    offer = plugins.get("benchmark", "lm_eval")
    return lambda **options: plugins.build(offer, offer.record.options(**options))
