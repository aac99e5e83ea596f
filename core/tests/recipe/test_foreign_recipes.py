"""Recipes as other tools ship them are answered in one round: every key that is unknown is told with what to do."""

from __future__ import annotations

import pytest
from luthier.errors import LuthierError
from luthier.recipe import Recipe, load_recipe, parse_flags
from luthier.recipe.reading.foreign_keys import FOREIGN, INSTEAD
from luthier.recipe.reading.overrides import _is_known

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
    assert remedies["20: evals_per_epoch"] == "Write eval_steps: N."
    assert remedies["8: data.train.0.type"] == "Leave it out."


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
