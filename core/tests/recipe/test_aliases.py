"""Other tools' spellings: each means one option of ours, says so once, and contradicts nothing silently."""

import attrs
import jsonschema
import luthier.builtin
import pytest
from luthier import LuthierError, Recipe
from luthier.plugins.fields.hints import field_hints
from luthier.plugins.registry import Plugins, Source
from luthier.recipe import Data, Model, from_mapping
from luthier.recipe.editor_schema.whole_recipe import make_schema
from luthier.recipe.reading.aliases import ALIASES, READINGS, SPELLINGS
from luthier.testing import expect_error


@pytest.fixture
def understand(plugins, least):
    """`understand(lora_r=4)`: the reading of the least recipe and these, by any tool's names."""

    def given(mapping=None, **settings):
        own = {"base_model", "dataset"} & set(settings)
        return from_mapping((settings if own else least | settings) | (mapping or {}), plugins=plugins)

    return given


EXAMPLES = [
    # Axolotl
    ({"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.1}, {"adapter": {"name": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1}}),
    ({"adapter": "lora", "lora_target_linear": True}, {"adapter": {"name": "lora", "target_modules": "all-linear"}}),
    ({"adapter": "lora", "lora_target_modules": ["q_proj"]}, {"adapter": {"name": "lora", "target_modules": ["q_proj"]}}),
    ({"sequence_len": 512, "sample_packing": False, "val_set_size": 0.05}, {"data": {"train": "rows.jsonl", "max_length": 512, "validation": 0.05}, "packing": False}),
    ({"micro_batch_size": 2, "gradient_accumulation_steps": 4, "num_epochs": 3}, {"global_batch_size": 8, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_train_epochs": 3}),
    ({"optimizer": "adamw_torch", "lr_scheduler": "cosine", "train_on_inputs": True}, {"lr_scheduler_type": "cosine", "data": {"train": "rows.jsonl", "train_on": "all"}}),
    ({"load_in_4bit": True}, {"quantizer": "nf4"}),
    # LLaMA-Factory
    ({"finetuning_type": "lora", "lora_rank": 4, "lora_target": "q_proj, v_proj"}, {"adapter": {"name": "lora", "r": 4, "target_modules": ["q_proj", "v_proj"]}}),
    ({"finetuning_type": "full", "stage": "sft", "cutoff_len": 99}, {"data": {"train": "rows.jsonl", "max_length": 99}}),
    ({"lora_target": "all", "quantization_bit": 4}, {"adapter": {"name": "lora", "target_modules": "all-linear"}, "quantizer": "nf4"}),
    # TRL and transformers
    ({"optim": "sgd", "momentum": 0.5, "torch_dtype": "bf16"}, {"optimizer": {"name": "sgd", "momentum": 0.5}, "model": {"name_or_path": "demo", "dtype": "bfloat16"}}),
    ({"adam_beta1": 0.8, "adam_epsilon": 1e-6, "weight_decay": 0.1}, {"optimizer": {"name": "adamw", "betas": [0.8, 0.999], "eps": 1e-6, "weight_decay": 0.1}}),
    ({"use_peft": True, "lora_r": 2, "max_seq_length": 64}, {"adapter": {"name": "lora", "r": 2}, "data": {"train": "rows.jsonl", "max_length": 64}}),
    ({"assistant_only_loss": True}, {}),
    ({"completion_only_loss": False}, {"data": {"train": "rows.jsonl", "train_on": "all"}}),
    ({"label_smoothing_factor": 0.1}, {"loss": {"name": "sft", "label_smoothing": 0.1}}),
    ({"use_dft_loss": True}, {"loss": {"name": "sft", "dft": True}}),
    # torchtune
    ({"epochs": 2, "optimizer": {"name": "sgd"}, "clip_grad_norm": 0.5, "dtype": "fp32"}, {"num_train_epochs": 2, "optimizer": "sgd", "max_grad_norm": 0.5}),
    # mini_trainer and training_hub
    ({"osft": True, "osft_unfreeze_rank_ratio": 0.25, "beta1": 0.9, "beta2": 0.95}, {"adapter": {"name": "osft", "unfreeze_rank_ratio": 0.25}, "optimizer": {"name": "adamw", "betas": [0.9, 0.95]}}),
    ({"unfreeze_rank_ratio": 0.25}, {"adapter": {"name": "osft", "unfreeze_rank_ratio": 0.25}}),
    ({"effective_batch_size": 32, "max_tokens_per_gpu": 900, "ckpt_output_dir": "out", "max_epochs": 2}, {"global_batch_size": 32, "max_tokens_per_device": 900, "output_dir": "out", "num_train_epochs": 2}),
    ({"num_warmup_steps": 5, "lr_scheduler": "constant"}, {"warmup_steps": 5, "lr_scheduler_type": "constant"}),
    ({"validation_split": 0.1, "validation_frequency": 10}, {"data": {"train": "rows.jsonl", "validation": 0.1}, "eval_steps": 10}),
    ({"validation_data_path": "v.jsonl"}, {"data": {"train": "rows.jsonl", "validation": ["v.jsonl"]}}),
    ({"unmask_messages": False}, {}),
    # backpropagate
    ({"lr": 1e-3, "steps": 7, "use_dora": True, "lora_r": 2}, {"learning_rate": 1e-3, "max_steps": 7, "adapter": {"name": "dora", "r": 2}}),
    ({"mode": "full", "method": "sft", "train_on_responses": True, "output": "o"}, {"output_dir": "o"}),
    # brainwires
    ({"warmup": 0.1, "gradient_accumulation": 2, "per_device_batch_size": 3}, {"warmup_ratio": 0.1, "global_batch_size": 6, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}),
    ({"warmup": 100, "gradient_clipping": 2.0}, {"warmup_steps": 100, "max_grad_norm": 2.0}),
]  # fmt: skip


@pytest.mark.parametrize(("theirs", "ours"), EXAMPLES, ids=[" ".join(t) for t, _ in EXAMPLES])
def test_other_tools_configurations_mean_what_they_meant(understand, theirs, ours):
    assert understand(theirs).recipe == understand(ours).recipe


@pytest.mark.parametrize(("theirs", "ours"), EXAMPLES, ids=[" ".join(t) for t, _ in EXAMPLES])
def test_each_alias_is_told_once_and_canonical_names_never(understand, theirs, ours):
    notes = understand(theirs).notes
    for name in set(theirs) & (set(ALIASES) | set(READINGS)):
        assert sum(note.startswith((f"{name} is called", f"{name}: ", f"{name} changes")) for note in notes) == 1, notes
    assert len(notes) == len(set(notes))
    assert understand(ours).notes == ()


def test_the_schema_for_editors_accepts_every_spelling(plugins, least):
    validator = jsonschema.Draft202012Validator(make_schema(plugins))
    for theirs, ours in EXAMPLES:
        assert [error.message for error in validator.iter_errors(least | theirs)] == [], theirs
        assert validator.is_valid(least | ours)


def test_models_and_data_have_many_names(plugins):
    reading = from_mapping({"base_model": "demo", "datasets": [{"path": "a.jsonl"}]}, plugins=plugins)
    assert reading.recipe == Recipe.from_dict({"model": "demo", "data": "a.jsonl"}, plugins=plugins)
    assert reading.notes == ("base_model is called model.name_or_path here", "datasets is called data.train here")
    for name in SPELLINGS["model.name_or_path"].split():
        assert from_mapping({name: "demo", "data": "a.jsonl"}, plugins=plugins).recipe == reading.recipe


def test_a_note_names_the_line_the_flag_or_the_variable(file, read):
    path = file("r.yaml", "model: demo\ndata: d.jsonl\nlora_r: 4\n")
    notes = read(path, "--lr 1e-3", {"LUTHIER_EPOCHS": "2"}).notes
    assert notes == (
        f"{path}:3: lora_r is called adapter.r here",
        "LUTHIER_EPOCHS: epochs is called num_train_epochs here",
        "--lr: lr is called learning_rate here",
    )


def test_aliases_work_as_flags_over_a_file(file, read):
    path = file("r.yaml", "model: demo\ndata: d.jsonl\nadapter: {name: lora, r: 2}\n")
    recipe = read(path, "--lora-rank 9 --lora-target q_proj,v_proj --load-in-4bit").recipe
    assert (recipe.adapter.r, recipe.adapter.target_modules) == (9, ["q_proj", "v_proj"])
    assert type(recipe.quantizer).__name__ == "Nf4"


@pytest.mark.parametrize("name", ["batch_size", "train_batch_size"])
def test_batch_size_alone_is_refused_with_both_readings(wrong, name):
    error = wrong(**{name: 8})
    assert error.where == name
    assert "global_batch_size" in str(error)
    assert "per_device_train_batch_size" in str(error)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"learning_rate": 1e-3, "lr": 1e-4}, ("learning_rate", "0.001", "0.0001")),
        ({"adapter": {"name": "lora", "r": 8}, "lora_r": 16}, ("adapter.r", "8", "16", "lora_r")),
        ({"adapter": "lora", "use_dora": True}, ("adapter", "'lora'", "'dora'", "use_dora")),
        ({"val_size": 0.1, "validation_data_path": "v.jsonl"}, ("data.validation",)),
        ({"load_in_4bit": True, "load_in_8bit": True}, ("quantizer",)),
    ],
)  # fmt: skip
def test_two_spellings_that_disagree_are_a_conflict(wrong, settings, says):
    error = wrong(**settings)
    assert error.code == "recipe-conflict"
    assert all(fact in str(error) for fact in says)


def test_two_spellings_that_agree_are_none(understand):
    assert understand(lr=1e-3, learning_rate=1e-3).recipe.learning_rate == 1e-3


def test_qlora_and_qdora_are_lora_and_dora_on_nf4_and_say_so(understand):
    for name, plain in {"qlora": "lora", "qdora": "dora"}.items():
        reading = understand(adapter={"name": name, "r": 4})
        assert reading.recipe == understand(adapter={"name": plain, "r": 4}, quantizer="nf4").recipe
        assert reading.notes == (f"{name} means adapter {plain} with quantizer nf4",)
    assert understand(adapter="qlora", quantizer="nf4").recipe == understand(adapter="qlora").recipe


def test_qlora_without_a_plugin_for_nf4_says_what_it_means():
    bare = Plugins(autoload=False)
    bare.register(
        luthier.builtin, Source(plugin="builtin", module="luthier.builtin", distribution="luthier", version="1")
    )
    with expect_error("part-unknown", "adapter", "nf4") as caught:
        Recipe.from_dict({"model": "demo", "data": "d", "adapter": "qlora"}, plugins=bare)
    assert (caught.value.code, caught.value.where) == ("part-unknown", "adapter")
    assert "write adapter lora" in caught.value.remedy


@pytest.mark.parametrize("quantizer", ["none", {"name": "none"}])
def test_qlora_with_another_quantizer_is_a_conflict(wrong, quantizer):
    error = wrong(adapter="qlora", quantizer=quantizer)
    assert (error.code, error.where, error.found) == ("recipe-conflict", "quantizer", "none")


def test_qlora_with_an_unknown_quantizer_is_no_unknown_adapter(wrong):
    error = wrong(adapter="qlora", quantizer="nf5")
    assert {single.where for single in (error, *error.also)} == {"quantizer"}


def test_a_flag_that_names_qlora_keeps_the_files_lora_options(file, read):
    path = file("r.yaml", "model: demo\ndata: d.jsonl\nadapter: {name: lora, r: 2}\n")
    recipe = read(path, "--adapter qlora").recipe
    assert (recipe.adapter.r, type(recipe.quantizer).__name__) == (2, "Nf4")


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"quantization_bit": 3}, "quantization_bit"),
        ({"load_in_4bit": "yes"}, "load_in_4bit"),
        ({"use_dora": 1}, "use_dora"),
    ],
)
def test_a_wrong_value_of_an_alias_is_refused(wrong, settings, where):
    assert wrong(**settings).where == where


def test_a_wrong_value_of_an_alias_names_its_line(file, read):
    path = file("r.yaml", "model: demo\ndata: d.jsonl\nquantization_bit: 3\n")
    with pytest.raises(LuthierError) as caught:
        read(path)
    assert caught.value.where == f"{path}:3: quantization_bit"


def test_betas_apart_need_an_optimizer_that_has_betas(wrong):
    assert wrong(optimizer="sgd", beta1=0.9).where == "optimizer.beta1"


def canonical_names():
    own = {"": Recipe, "model.": Model, "data.": Data}
    return {f"{prefix}{f.name}" for prefix, cls in own.items() for f in attrs.fields(cls)}


def test_every_alias_leads_to_an_option_that_exists():
    parts = {"adapter", "loss", "optimizer"}
    for alias, name in ALIASES.items():
        assert name in canonical_names() or name.split(".")[0] in parts, alias


def test_no_alias_hides_an_option_of_ours():
    taken = set(field_hints(Recipe))
    assert not taken & (set(ALIASES) | set(READINGS))
    assert not set(ALIASES) & set(READINGS)


def test_no_alias_is_listed_twice():
    listed = [alias for others in SPELLINGS.values() for alias in others.split()]
    assert len(listed) == len(set(listed))
