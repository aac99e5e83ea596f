"""Recipes as other tools ship them are answered in one round: every key that is unknown is told with what to do."""

from __future__ import annotations

import re

import pytest
from luthier.errors import LuthierError
from luthier.recipe import Recipe, load_recipe, parse_flags, resolve_parts
from luthier.recipe.checks.soundness import check_parts
from luthier.recipe.reading.foreign_keys import FOREIGN, INSTEAD
from luthier.recipe.reading.overrides import _is_known, parse_sets

AXOLOTL = """
base_model: NousResearch/Llama-3.2-1B
model_type: LlamaForCausalLM
load_in_8bit: false
strict: false
datasets:
  - path: rows.jsonl
    type: alpaca
val_set_size: 0.1
adapter: lora
lora_r: 16
lora_fan_in_fan_out:
wandb_project:
micro_batch_size: two
num_epochs: 1
learning_rate: 0.0002
bf16: auto
fp16:
flash_attention: true
evals_per_epoch: 4
warmup_stps: 10
fsdp_config:
"""


def errors_of(text, tmp_path, **given):
    """Place, code and remedy of every error that one reading tells."""
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(LuthierError) as caught:
        load_recipe(tmp_path / "recipe.yaml", given, environ={})
    return [(e.where.rpartition("recipe.yaml:")[2], e.code, e.remedy) for e in (caught.value, *caught.value.also)]


def test_all_errors_of_a_recipe_are_told_at_once(tmp_path):
    remedies = {place: remedy for place, _, remedy in errors_of(AXOLOTL, tmp_path)}
    assert {place.partition(":")[0] for place in remedies} == {"3", "5", "8", "12", "13", "14", "19", "20", "21", "22"}
    assert remedies["21: warmup_stps"].startswith("Did you mean 'warmup_st")
    assert (
        remedies["20: evals_per_epoch"].startswith("Write `eval_steps: N`")
        and "by 4" in remedies["20: evals_per_epoch"]
    )
    assert remedies["8: data.train.0.type"] == "Leave it out."


STOCK = {  # the options of recipes that the tools ship, with values of ours
    "axolotl_lora": """
base_model: demo
load_in_8bit: false
load_in_4bit: false
strict: false
datasets:
  - path: rows.jsonl
    type: alpaca
dataset_prepared_path: prepared
val_set_size: 0.2
output_dir: ./out
adapter: lora
lora_model_dir:
sequence_len: 512
sample_packing: true
eval_sample_packing: true
pad_to_sequence_len: true
lora_r: 8
lora_alpha: 16
lora_dropout: 0.1
lora_fan_in_fan_out:
lora_target_modules:
  - q_proj
  - v_proj
wandb_project:
wandb_entity:
wandb_watch:
wandb_name:
wandb_log_model:
gradient_accumulation_steps: 4
micro_batch_size: 1
num_epochs: 2
optimizer: adamw_8bit
lr_scheduler: cosine
learning_rate: 0.0001
train_on_inputs: false
group_by_length: false
bf16: auto
fp16:
tf32: false
gradient_checkpointing: true
early_stopping_patience:
resume_from_checkpoint:
local_rank:
logging_steps: 5
xformers_attention:
flash_attention: true
loss_watchdog_threshold: 4.0
loss_watchdog_patience: 2
warmup_steps: 0.1
evals_per_epoch: 2
saves_per_epoch: 1
debug:
deepspeed:
weight_decay: 0.0
fsdp:
fsdp_config:
special_tokens:
  pad_token: "<pad>"
""",
    "axolotl_qlora": """
base_model: demo
model_type: AutoModelForCausalLM
tokenizer_type: AutoTokenizer
plugins:
  - liger.LigerPlugin
load_in_4bit: true
chat_template: llama3
datasets:
  - path: rows.jsonl
    type: chat_template
    field_messages: talk
    message_property_mappings:
      role: from
      content: value
    roles_to_train: [assistant]
    train_on_eos: turn
  - path: more.jsonl
    type: {field_instruction: q, field_output: a}
    field: text
val_set_size: 0
adapter: qlora
lora_target_linear: true
sequence_len: 512
micro_batch_size: 1
gradient_accumulation_steps: 4
optimizer: adamw_torch_fused
attn_implementation: flash_attention_2
evals_per_epoch: 4
wandb_project: mine
fsdp:
  - full_shard
  - auto_wrap
""",
    "axolotl_full": """
base_model: demo
datasets:
  - path: rows.jsonl
    type: alpaca
adapter:
lora_r:
lora_alpha:
lora_dropout:
lora_target_modules:
lora_target_linear:
early_stopping_patience: 3
val_set_size: 0.1
micro_batch_size: 1
gradient_accumulation_steps: 1
""",
    "llama_factory_sft": """
### model
model_name_or_path: demo
trust_remote_code: true

### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 4
lora_target: all
deepspeed: zero3.json

### dataset
dataset: ours,theirs_v2
template: llama3
cutoff_len: 512
max_samples: 30
overwrite_cache: true
preprocessing_num_workers: 1
dataloader_num_workers: 2

### output
output_dir: saves/ours
logging_steps: 5
save_steps: 50
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 2
learning_rate: 2.0e-4
num_train_epochs: 2.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 1800
resume_from_checkpoint: null

### eval
val_size: 0.2
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 50
""",
    "llama_factory_dpo": """
model_name_or_path: demo
stage: dpo
finetuning_type: lora
lora_target: all
pref_beta: 0.2
pref_loss: sigmoid
dataset: one_name
template: llama3
cutoff_len: 512
per_device_train_batch_size: 1
gradient_accumulation_steps: 2
eval_strategy: epoch
""",
}
WRITE = re.compile(r"Write `(.+?)`")
STANDING_FOR = {"FILE": "rows.jsonl", ": N": ": 10", "COLUMN": "a"}


def followed(text, errors):
    """The recipe with every remedy done: an option left out, or what it says written in its place."""
    lines, added = text.splitlines(), {}
    for place, _, remedy in errors:
        number = int(place.partition(":")[0]) - 1
        told = WRITE.match(remedy)
        assert told or remedy.startswith("Leave it out"), (place, remedy)
        depth = len(lines[number]) - len(lines[number].lstrip())
        source = told is not None and "in this source" in remedy
        lines[number] = f"{' ' * depth}{filled(told[1])}" if source else ""
        for below in range(number + 1, len(lines)):
            if not lines[below].startswith(" " * (depth + 1)):
                break
            lines[below] = ""
        if told and not source:
            added[told[1].partition(":")[0]] = filled(told[1])
    return "\n".join([*lines, *added.values()])


def filled(told):
    for word, value in STANDING_FOR.items():
        told = told.replace(word, value)
    return told


@pytest.mark.parametrize("name", STOCK)
def test_a_stock_recipe_is_valid_after_its_one_round_of_answers(name, tmp_path):
    text = STOCK[name].lstrip("\n")
    mended = followed(text, errors_of(text, tmp_path))
    (tmp_path / "recipe.yaml").write_text(mended)
    recipe = load_recipe(tmp_path / "recipe.yaml", environ={}).recipe
    assert (recipe.model.name_or_path, recipe.data.train[0].path) == ("demo", str(tmp_path / "rows.jsonl"))
    check_parts(recipe, resolve_parts(recipe), "cpu")


def test_a_value_of_another_tool_is_answered_by_what_it_means_there(tmp_path):
    remedies = {place.partition(": ")[2]: remedy for place, _, remedy in errors_of(STOCK["axolotl_qlora"], tmp_path)}
    assert remedies["data.train.0.field_messages"].startswith("Write `columns: {messages: talk}`")
    assert remedies["data.train.1.type"].startswith("Write `columns: {prompt: COLUMN")
    assert remedies["wandb_project"].startswith("Write `callbacks: [{name: wandb, project: mine}]`")
    assert remedies["fsdp"].startswith("Write `distributed: fsdp`")


def test_a_word_is_a_files_name_where_no_other_tool_shows(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: demo\ndataset: imdb\nchat_template: mine.jinja\n")
    assert load_recipe(tmp_path / "recipe.yaml", environ={}).recipe.data.train[0].path == "imdb"


def test_the_errors_of_every_item_of_a_list_are_told(tmp_path):
    text = "model: demo\ndata:\n  train:\n  - {path: a.jsonl, one: 1}\n  - {path: b.jsonl, two: 2}\n"
    assert [place.partition(": ")[2] for place, _, _ in errors_of(text, tmp_path)] == [
        "data.train.0.one",
        "data.train.1.two",
    ]


def test_an_empty_switch_of_another_tool_changes_nothing(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: demo\ndata: rows.jsonl\nfp16:\nload_in_4bit:\n")
    reading = load_recipe(tmp_path / "recipe.yaml", environ={})
    assert len([note for note in reading.notes if "changes nothing" in note]) == 2


def test_one_error_stands_alone(tmp_path):
    assert len(errors_of("model: demo\ndata: rows.jsonl\nseeed: 3\n", tmp_path)) == 1


def test_wrong_parts_and_wrong_settings_are_told_together(tmp_path):
    text = "model: demo\ndata: rows.jsonl\nseed: x\nadapter: {name: lora, rr: 3}\nloss: nowhere\n"
    assert [place for place, _, _ in errors_of(text, tmp_path)] == ["3: seed", "4: adapter.rr", "5: loss"]


def test_all_unknown_flags_are_told_at_once_and_a_commands_own_are_proposed():
    with pytest.raises(LuthierError) as caught:
        parse_flags(["--outputdir", "x", "--log-lvel", "debug", "--flash_attention"], ["--log-level"])
    remedies = [error.remedy for error in (caught.value, *caught.value.also)]
    assert remedies == ["Did you mean 'output_dir'?", "Did you mean '--log-level'?", "Leave it out."]


@pytest.mark.parametrize(
    ("read", "words", "meant"),
    [
        (parse_flags, ["--amsgrad", "true"], "optimizer.amsgrad"),
        (parse_sets, ["label_smoothing=0.1"], "loss.label_smoothing"),
        (load_recipe, {"model": "demo", "data": "rows.jsonl", "beta": 0.1}, "loss.beta"),
    ],
)
def test_an_option_of_a_part_without_its_kind_is_proposed_with_it(read, words, meant):
    with pytest.raises(LuthierError) as caught:
        read(words)
    assert f"'{meant}'" in caught.value.remedy


def test_other_tools_spellings_are_never_proposed():
    with pytest.raises(LuthierError) as caught:
        parse_flags(["--epoch", "3"])
    assert "'epochs'" not in caught.value.remedy


@pytest.mark.parametrize("key", sorted({*FOREIGN, *INSTEAD}))
def test_what_is_called_foreign_is_no_option_of_ours(key):
    assert key in ("type",) or not _is_known((key,))


def test_many_unknown_options_are_counted_beyond_the_first_hundred():
    tree = {"model": "demo", "data": "r.jsonl", **{f"key{i}": i for i in range(20_000)}}
    with pytest.raises(LuthierError) as caught:
        Recipe.from_dict(tree)
    assert (len(caught.value.also), caught.value.also[-1].problem) == (60, "and 19,940 more")


def test_variables_of_the_free_prefix_belong_to_others():
    recipe = load_recipe({"model": "demo", "data": "r.jsonl"}, environ={"LUTHIER_X_ANYTHING": "1"}).recipe
    assert recipe.seed == 0


@pytest.mark.parametrize(
    ("option", "value", "written"),
    [
        ("adapter.load_in_4bit", "true", "quantizer: nf4"),
        ("adapter.quantizer", "nf4", "quantizer: nf4"),
        ("adapter.learning_rate", "0.5", "learning_rate: 0.5"),
        ("optimizer.max_length", "64", "data.max_length: 64"),
    ],
)
def test_a_setting_of_the_run_within_a_part_is_told_where_it_stands(option, value, written):
    flags = parse_flags(["--model", "demo", "--data", "rows.jsonl", "--adapter", "lora", f"--{option}", value])
    with pytest.raises(LuthierError) as caught:
        load_recipe(None, flags)
    assert (caught.value.code, caught.value.where) == ("recipe-unknown-option", f"--{option}")
    assert caught.value.remedy.endswith(f"write {written}.")


def test_an_option_of_another_tool_within_a_part_is_still_told_the_parts_own_name():
    flags = parse_flags(["--model", "demo", "--data", "rows.jsonl", "--adapter", "lora", "--adapter.rank", "4"])
    with pytest.raises(LuthierError) as caught:
        load_recipe(None, flags)
    assert caught.value.remedy == "Did you mean 'r'?"
