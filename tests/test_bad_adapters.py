"""Adapters that do not fit: refused before the first step, by an error that names the option, the file or the base."""

import shutil

import luthier
import pytest
import torch
from luthier.testing import expect_error
from luthier.testing.worlds import save_tiny_model, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file

ROWS = [{"prompt": "a", "completion": "b"}]
RANKS = {
    "lora": "r",
    "dora": "r",
    "adalora": "init_r",
    "slao": "r",
    "peft.lora": "adapter peft.lora.r",
    "peft.adalora": "adapter peft.adalora.init_r",
    "peft.osf": "adapter peft.osf.effective_rank",
}


@pytest.mark.parametrize("name", RANKS)
def test_a_rank_above_the_layer_s_is_refused_in_the_plan(name):
    option = RANKS[name].rpartition(".")[2]
    with expect_error("recipe-out-of-range", RANKS[name], "32"):
        luthier.plan(model=tiny_model(), tokenizer=tiny_tokenizer(), data=[{"prompt": "a", "completion": "b"}],
                     adapter={"name": name, option: 33, "target_modules": ["q_proj"]})  # fmt: skip


def test_a_share_of_osf_above_one_is_refused():
    with expect_error("recipe-out-of-range", "adapter peft.osf.effective_rank", "1.5"):
        luthier.plan(model=tiny_model(), tokenizer=tiny_tokenizer(), data=[{"prompt": "a", "completion": "b"}],
                     adapter={"name": "peft.osf", "effective_rank": 1.5})  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory, rows):
    """A run of SLAO whose base lies in a folder that the tests may change a copy of."""
    folder = tmp_path_factory.mktemp("trained")
    model = save_tiny_model(folder / "model")
    run = luthier.train(model=str(model), data=rows, adapter={"name": "slao", "r": 4}, max_steps=1,
                        output_dir=folder / "run", exact_callbacks=[], memory_check=False)  # fmt: skip
    return model, run.artifact


def test_an_adapter_of_another_base_is_refused_with_both_hashes_and_sizes(trained, tmp_path):
    _, adapter = trained
    wider = save_tiny_model(tmp_path / "wider", hidden_size=48)
    with expect_error("artifact-mismatch", "adapter_model.safetensors", "[4, 32]", "[4, 48]"):
        luthier.merge(adapter, tmp_path / "m", base=str(wider))
    with expect_error("artifact-mismatch", f"adapter_from: {adapter}", "hash", "hidden_size", "32", "48"):
        luthier.train(model=str(wider), data=[{"prompt": "a", "completion": "b"}], adapter={"name": "slao", "r": 4},
                      adapter_from=str(adapter), output_dir=tmp_path / "run")  # fmt: skip
    assert not (tmp_path / "m").exists() and not (tmp_path / "run").exists()


def test_a_base_whose_weights_were_replaced_is_refused_unless_it_is_named_which_warns(trained, tmp_path, capsys):
    model, adapter = trained
    kept = shutil.copytree(model, tmp_path / "kept")
    luthier.merge(adapter, tmp_path / "merged", base=str(kept))
    assert "hash" not in capsys.readouterr().err
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    try:
        with expect_error("artifact-mismatch", str(adapter), "hash"):
            luthier.merge(adapter, tmp_path / "again")
        luthier.merge(adapter, tmp_path / "again", base=str(model))
        assert "hash" in capsys.readouterr().err
    finally:
        shutil.copy(kept / "model.safetensors", model)


def lacking(tensors, name):
    del tensors[name]


def unknown(tensors, name):
    tensors[f"{name}.other"] = torch.zeros(2)


def narrow(tensors, name):
    tensors[name] = tensors[name][..., :1].contiguous()


@pytest.mark.parametrize("change", [lacking, unknown, narrow])
def test_a_file_of_slao_that_does_not_fit_is_named_with_its_tensor(trained, tmp_path, change):
    folder = shutil.copytree(trained[1], tmp_path / "adapter")
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = sorted(tensors)[0]
    change(tensors, name)
    save_file(tensors, weights, metadata={"format": "pt"})
    with expect_error("artifact-mismatch", "adapter_model.safetensors", name.removeprefix("base_model.model.")):
        luthier.merge(folder, tmp_path / "merged")


@pytest.mark.parametrize(("option", "value"), [("r", 8), ("target_modules", ["q_proj"])])
def test_a_task_whose_slao_has_another_rank_or_targets_is_refused_before_the_first_trains(tmp_path, option, value):
    slao = {"name": "slao", "r": 4}
    tasks = [{"name": "one", "data": "x.jsonl"}, {"name": "two", "data": "x.jsonl", "adapter": {**slao, option: value}}]
    with expect_error("recipe-conflict", f"tasks.1.adapter.{option}"):
        luthier.continual({"model": "demo", "adapter": slao, "tasks": tasks}, output_dir=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["lora", "dora", "adalora", "slao", "modules", "bitfit", "peft.lora", "peft.ia3"])
@pytest.mark.parametrize("targets", [["nope_proj"], []])
def test_targets_that_match_nothing_are_refused_by_their_field(name, targets):
    with pytest.raises(luthier.LuthierError) as caught:
        luthier.plan(model=tiny_model("qwen2"), tokenizer=tiny_tokenizer(), data=ROWS,
                     adapter={"name": name, "target_modules": targets})  # fmt: skip
    assert caught.value.code in ("model-target", "train-nothing")
    assert "target_modules" in caught.value.where and str(targets[0] if targets else "[]") in str(caught.value)


def test_a_plan_refuses_an_adapter_that_holds_nan_by_its_file_and_tensor(trained, tmp_path):
    model, _ = trained
    part = {"name": "lora", "r": 4}
    run = luthier.train(model=str(model), data=ROWS, adapter=part, max_steps=1, output_dir=tmp_path / "run",
                        exact_callbacks=[], memory_check=False)  # fmt: skip
    weights = run.artifact / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = sorted(tensors)[0]
    tensors[name][0, 0] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    with expect_error("model-weights", f"adapter_from: {weights}", name):
        luthier.plan(model=str(model), data=ROWS, adapter=part, adapter_from=str(run.artifact))


def test_an_adapter_is_not_merged_twice(trained, tmp_path):
    model, adapter = trained
    merged = luthier.merge(adapter, tmp_path / "merged")
    with expect_error("artifact-mismatch", str(adapter), str(model)):
        luthier.merge(adapter, tmp_path / "twice", base=str(merged))
    with expect_error("artifact-unmergeable", str(merged)):
        luthier.merge(merged, tmp_path / "twice")
    with expect_error("artifact-mismatch", f"adapter_from: {adapter}"):
        luthier.plan(model=str(merged), data=ROWS, adapter={"name": "slao", "r": 4}, adapter_from=str(adapter))
    assert not (tmp_path / "twice").exists()


def test_pefts_adapter_of_a_base_with_new_rows_begins_on_the_resized_base_and_is_refused_on_the_old_one(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = save_tiny_model(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(324, mean_resizing=False)
    model.save_pretrained(tmp_path / "resized")
    tiny_tokenizer().save_pretrained(tmp_path / "resized")
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    peft.get_peft_model(model, peft.LoraConfig(**options)).save_pretrained(tmp_path / "adapter")

    def plan(model, folder="adapter"):
        return luthier.plan(model=str(tmp_path / model), data=ROWS, adapter={"name": "lora", **options},
                            adapter_from=str(tmp_path / folder))  # fmt: skip

    assert plan("resized").parts
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    with expect_error("artifact-mismatch", f"adapter_from: {weights}", "324", "320"):
        plan("base")
    bare = shutil.copytree(tmp_path / "adapter", tmp_path / "bare")  # nothing shows that its base was resized
    tensors = load_file(bare / "adapter_model.safetensors")
    own = {name: tensor for name, tensor in tensors.items() if "lora_" in name}
    save_file(own, bare / "adapter_model.safetensors", metadata={"format": "pt"})
    with expect_error("artifact-mismatch", f"adapter_from: {bare}", "hash", "vocab_size", "324", "320"):
        plan("resized", "bare")


def test_a_run_stands_for_the_model_merged_in_it_and_without_one_the_merge_is_named(trained, tmp_path):
    model, adapter = trained
    run = shutil.copytree(adapter.parent, tmp_path / "run")
    with pytest.raises(luthier.LuthierError) as caught:
        luthier.unmerge(run, run, tmp_path / "base")
    assert (caught.value.code, caught.value.where) == ("artifact-not-found", str(run))
    assert str(run) in (caught.value.remedy or "")
    luthier.merge(run)
    back, base = (
        load_file(folder / "model.safetensors") for folder in (luthier.unmerge(run, run, tmp_path / "b"), model)
    )
    assert all(torch.equal(back[name], tensor) for name, tensor in base.items())
    with expect_error("artifact-not-found", str(run / "adapter")):  # the two in the wrong order
        luthier.unmerge(run / "adapter", run / "merged", tmp_path / "other")
