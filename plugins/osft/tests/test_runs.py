"""Runs on a tiny model: ratios, targets, files, resume, and two ranks."""

import json

import attrs
import luthier
import pytest
import torch
from luthier import LuthierError
from luthier.testing import contexts, expect_error
from luthier.testing.contexts import Attached
from luthier.testing.ranks import in_ranks
from luthier.testing.worlds import tiny_model
from luthier_osft import Osft
from luthier_osft.adapter import OsftAdapter
from luthier_osft.layers import OsftLayer
from luthier_osft.targets import find_layers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

FORMS = ("core", "factored")
SAMPLE = ("core", pytest.param("factored", marks=pytest.mark.slow))
TOKENS = torch.arange(3, 15)[None]


def loss_history(settings):
    return luthier.train(**settings).loss_history


def weights_of(run):
    return load_file(run.artifact / "osft.safetensors")


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize("form", SAMPLE)
def test_the_merged_checkpoint_has_the_original_keys_and_is_read_by_plain_transformers(train, model_folder, form):
    run = train(adapter=Osft(form=form), merge=True)
    merged, base = (AutoModelForCausalLM.from_pretrained(f) for f in (run.merged, model_folder))
    assert torch.allclose(logits(merged), logits(run.model), atol=1e-5)
    assert load_file(run.merged / "model.safetensors").keys() == load_file(model_folder / "model.safetensors").keys()
    moved = [n for n, p in merged.named_parameters() if not torch.equal(p, base.get_parameter(n))]
    assert len(moved) == 14 and all(name.endswith("proj.weight") for name in moved)


@pytest.mark.parametrize(
    ("form", "strategy"),
    [
        ("core", "fsdp"),
        ("factored", "fsdp"),
        pytest.param("core", "ddp", marks=pytest.mark.slow),
        pytest.param("factored", "ddp", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_train_as_one_does(train, model_folder, tmp_path, form, strategy):
    exact = {"model": {"name_or_path": str(model_folder), "dtype": "float64"}, "adapter": Osft(form=form)}
    settings = {**train.settings, **exact, "optimizer": {"name": "sgd", "momentum": 0.9}}  # AdamW would hide a factor
    alone = luthier.train(**{**settings, "output_dir": str(tmp_path / "alone")})
    for found in in_ranks(2, loss_history, {**settings, "distributed": strategy}):
        assert found == pytest.approx(alone.loss_history, rel=1e-9)
    one, other = weights_of(alone), load_file(tmp_path / "run/adapter/osft.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name], atol=1e-9) for name in one)


def test_ratio_one_is_the_trajectory_of_full_tuning_bit_for_bit(train, tmp_path):
    ours = train(adapter=Osft(unfreeze_rank_ratio=1.0))
    full = train(adapter="full", output_dir=str(tmp_path / "full"))
    assert ours.loss_history == full.loss_history
    pairs = zip(ours.model.parameters(), full.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_ratio_zero_trains_nothing_non_targets_included(train):
    with pytest.raises(LuthierError) as caught:
        train(adapter=Osft(unfreeze_rank_ratio=0.0, train_non_targets=True))
    assert caught.value.code == "train-nothing"


def attached(options, model=None, **changes):
    model = model or contexts.base_model()
    part = OsftAdapter(options)
    part.attach(model, attrs.evolve(contexts.context(model), **changes))
    return part


def test_each_matrix_keeps_the_floor_of_its_smaller_side():
    part = attached(Osft(unfreeze_rank_ratio=0.3))
    for layer in part.layers.values():
        assert layer.rank == min(layer.in_features, layer.out_features) * 7 // 10
        assert layer.core.shape == (layer.out_features - layer.rank, layer.in_features - layer.rank)


def test_non_targets_train_only_where_they_are_asked_for():
    without, with_them = (attached(Osft(train_non_targets=t)) for t in (False, True))
    assert {group.role for group in without.groups()} == {"adapter"}
    names = {name for group in with_them.groups() for name in group.names}
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= names
    assert not any(name.endswith("proj.base_layer.weight") for name in names)


@pytest.mark.parametrize(
    ("match", "pattern", "count"), [("substring", "self_attn", 8), ("regex", r"layers\.1\..*(q|k)_proj$", 2)]
)
def test_patterns_are_substrings_or_regular_expressions(match, pattern, count):
    assert len(find_layers(tiny_model(), Osft(target_patterns=[pattern], match=match))) == count


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (Osft(target_patterns=["q_porj"]), "model-target", ("q_proj",)),
        (Osft(target_patterns=["lm_head"]), "model-target", ("target_patterns",)),
        (Osft(target_patterns=[]), "model-target", ("target_patterns",)),
        (Osft(target_patterns=["(q|k)_proj"]), "model-target", ("match: regex",)),
        (Osft(target_patterns=["(q"], match="regex"), "recipe-wrong-type", ("target_patterns",)),
    ],
)  # fmt: skip
def test_a_pattern_that_finds_no_layer_is_refused(options, code, words):
    with pytest.raises(LuthierError) as caught:
        find_layers(tiny_model(), options)
    assert (caught.value.code, caught.value.where) == (code, "target_patterns") and all(
        fact in str(caught.value) for fact in words
    )


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"rank_rule": "schedule", "unfreeze_rank_ratio": 0.5}, "unfreeze_rank_ratio"),
        ({"rank_rule": "schedule", "form": "factored"}, "form"),
        ({"min_preserved_ratio": 0.1}, "min_preserved_ratio"),
        ({"calibration_batches": 2}, "calibration_batches"),
        ({"rank_rule": "importance", "unfreeze_rank_ratio": 0.5, "min_preserved_ratio": 0.6}, "min_preserved_ratio"),
        ({"unfreeze_rank_ratio": 1.5}, "Osft.unfreeze_rank_ratio"),
        ({"unfreeze_rank_ratio": -0.1}, "Osft.unfreeze_rank_ratio"),
    ],
)
def test_options_that_say_nothing_together_are_refused(options, field):
    with pytest.raises(LuthierError) as caught:
        Osft(**options)
    assert caught.value.where == field


def test_the_model_is_the_base_bit_for_bit_at_the_start_and_when_switched_off():
    class Subject:
        build = staticmethod(OsftAdapter)

    for form in FORMS:
        world = Attached(Subject(), Osft(form=form))
        base = contexts.batch_logits(world.base, contexts.probe_batch())
        assert torch.equal(world.outputs(), base)
        world.train(2)
        assert not torch.equal(world.outputs(), base)
        with world.part.disabled():
            assert torch.equal(world.outputs(), base)


def test_what_trains_in_place_cannot_be_switched_off():
    part = attached(Osft(train_non_targets=True))
    with expect_error("part-unsupported", "adapter"), part.disabled():
        pass


def test_another_attach_or_merge_is_refused():
    model = contexts.base_model()
    part = attached(Osft(), model)
    with expect_error("part-unsupported"):
        attached(Osft(), model)
    part.merge(contexts.context(model))
    with expect_error("artifact-unmergeable"):
        part.merge(contexts.context(model))


def test_a_core_that_holds_nan_is_neither_merged_nor_loaded(tmp_path):
    model = contexts.base_model()
    part = attached(Osft(), model)
    layer = next(iter(part.layers.values()))
    with torch.no_grad():
        layer.core[0, 0] = float("nan")
    with pytest.raises(LuthierError) as caught:
        part.merge(contexts.context(model))
    assert caught.value.code == "artifact-unmergeable"
    part.save(tmp_path)
    with pytest.raises(LuthierError, match="NaN"):
        attached(Osft()).load(tmp_path)


@pytest.fixture
def saved(tmp_path):
    attached(Osft()).save(tmp_path)
    return tmp_path


def damaged(folder, change):
    tensors = load_file(folder / "osft.safetensors")
    change(tensors)
    save_file(tensors, folder / "osft.safetensors")


CHANGES = {
    "lacks": lambda t: t.pop("model.layers.0.self_attn.q_proj.core"),
    "unknown": lambda t: t.update({"other.core": torch.zeros(2)}),
    "shape": lambda t: t.update({"model.layers.0.self_attn.q_proj.core": torch.zeros(2, 2)}),
    "lacks tensors of": lambda t: t.pop("frozen.model.layers.0.self_attn.q_proj.in.basis"),
    "keep 0 directions": lambda t: [
        t.pop(n) for n in list(t) if n.startswith("frozen.model.layers.0.self_attn.q_proj")
    ],
    "has unknown tensors of": lambda t: t.update({"frozen.model.layers.0.self_attn.q_proj.in.more": torch.zeros(2)}),
    "in.basis has shape [32, 1]": lambda t: t.update(
        {n: t[n][:, :1].contiguous() for n in ["frozen.model.layers.0.self_attn.q_proj.in.basis"]}
    ),
    "keep 31 directions": lambda t: t.update(
        {n: t[n][:, :1].contiguous() for n in ["frozen.model.layers.0.self_attn.q_proj.out.basis"]}
    ),
    "features": lambda t: t.update({"frozen.model.layers.0.self_attn.q_proj.out.basis": torch.zeros(5, 8)}),
}


@pytest.mark.parametrize("word", CHANGES)
def test_files_that_do_not_fit_are_refused_by_name(saved, word):
    damaged(saved, CHANGES[word])
    with pytest.raises(LuthierError) as caught:
        attached(Osft()).load(saved)
    assert caught.value.code == "artifact-mismatch" and word in str(caught.value)


@pytest.mark.parametrize(
    ("options", "word"), [(Osft(form="factored"), "form"), (Osft(unfreeze_rank_ratio=0.5), "unfreeze_rank_ratio")]
)
def test_files_of_other_options_are_refused(saved, options, word):
    with pytest.raises(LuthierError, match=word) as caught:
        attached(options).load(saved)
    assert ("unfreeze_rank_ratio to 0.25" in caught.value.remedy) == (word == "unfreeze_rank_ratio")


def test_files_that_are_missing_or_cut_off_are_refused(saved):
    (saved / "osft.safetensors").write_bytes(b"abc")
    with expect_error("file-damaged", "osft.safetensors"):
        attached(Osft()).load(saved)
    (saved / "osft.json").write_text("{")
    with expect_error("file-damaged", "osft.json"):
        attached(Osft()).load(saved)
    (saved / "osft.json").unlink()
    with pytest.raises(LuthierError) as caught:
        attached(Osft()).load(saved)
    assert caught.value.code == "artifact-not-found"


def test_importance_has_mean_one_and_its_ranks_lie_within_the_bounds():
    from luthier_osft.ranks import find_ranks, measure_importance, preserved_shares

    model = contexts.base_model()
    options = Osft(rank_rule="importance", unfreeze_rank_ratio=0.2, min_preserved_ratio=0.1, calibration_batches=2)
    names = find_layers(model, options)
    context = contexts.context(model)
    importance = measure_importance(model, names, 2, context)
    assert sum(importance.values()) / len(names) == pytest.approx(1.0)
    shares = preserved_shares({"a": -3.0, "b": 0.5, "c": 1.0, "d": 9.0}, options)
    assert shares == pytest.approx({"a": 0.1, "b": 0.45, "c": 0.8, "d": 0.8})
    ranks = find_ranks(model, names, options, context)
    sizes = {name: min(model.get_submodule(name).weight.shape) for name in names}
    assert all(sizes[n] * 0.1 - 1 < rank <= sizes[n] * 0.8 for n, rank in ranks.items())
    assert len({rank / sizes[name] for name, rank in ranks.items()}) > 2


def test_importance_is_the_cosine_of_input_and_output(monkeypatch):
    from luthier_osft.ranks import _alike

    layer = torch.nn.Linear(4, 4)
    x = torch.randn(2, 3, 4)
    torch.nn.init.eye_(layer.weight)
    assert _alike(layer, (x,), layer(x)) == pytest.approx(6.0, rel=1e-5)
    torch.nn.init.eye_(layer.weight).data.neg_()
    assert _alike(layer, (x,), layer(x)) == pytest.approx(-6.0, rel=1e-5)


def test_the_batches_that_importance_looks_at_are_as_many_as_asked():
    from luthier_osft import ranks

    asked = []
    model = contexts.base_model()
    context = contexts.context(model, batches=lambda count: asked.append(count) or [])
    options = Osft(rank_rule="importance", calibration_batches=3)
    ranks.find_ranks(model, find_layers(model, options), options, context)
    assert asked == [3]


def test_the_second_attach_takes_the_decompositions_from_the_cache():
    kept, computed = {}, []

    def cache(key, compute):
        if key not in kept:
            computed.append(key)
            kept[key] = compute()
        return kept[key]

    for _ in range(2):
        part = attached(Osft(unfreeze_rank_ratio=0.31), cache=cache)
        assert all(isinstance(layer, OsftLayer) for layer in part.layers.values())
        assert len(computed) == len(part.layers)


def test_a_preference_loss_has_its_reference(train, tmp_path):
    rows = tmp_path / "pairs.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"{i}?", "chosen": "yes", "rejected": "no"}) + "\n" for i in range(8))
    )
    run = train(data=str(rows), loss="dpo", adapter=Osft())
    assert run.loss_history[0] == pytest.approx(0.6931, abs=1e-3) and run.loss_history[-1] < 0.69
