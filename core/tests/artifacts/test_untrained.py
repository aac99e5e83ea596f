"""The untrained artifact: what could not be saved and read back is refused before the first step, and costs no bit."""

from __future__ import annotations

import functools
from contextlib import contextmanager

import luthier
import pytest
import torch
from luthier.artifacts import untrained
from luthier.artifacts.note import Prompting, make_note
from luthier.builtin.none import Unquantized
from luthier.model.weights.dense_files import Files, save_model
from luthier.model.weights.sampled import sampled_state
from luthier.model.weights.sampled.sampled_files import check_sample
from luthier.plugins.contracts.values import Group
from luthier.plugins.records import NoOptions
from luthier.recipe import Recipe
from luthier.testing import expect_error
from luthier.testing.worlds import save_tiny_model, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

ROWS = [{"prompt": f"{i} and", "completion": f"{i}"} for i in range(8)]


class Norms(luthier.Adapter):
    """Trains the model's norms, and counts how often it is saved."""

    saved = 0
    mergeable = True

    def attach(self, model, context):
        self.model = model.requires_grad_(False)
        self.came = {name: weight.detach().clone() for name, weight in self.named()}
        for _, weight in self.named():
            weight.requires_grad_(True)
        return model

    def named(self):
        return [(name, weight) for name, weight in self.model.named_parameters() if "norm" in name]

    def groups(self):
        names, weights = zip(*self.named(), strict=True)
        return [Group(parameters=list(weights), names=list(names), role="adapter")]

    @contextmanager
    def disabled(self):
        trained = self.state()
        self.load_state(self.came)
        yield
        self.load_state(trained)

    def state(self):
        return {name: weight.detach().clone() for name, weight in self.named()}

    def load_state(self, state):
        with torch.no_grad():
            for name, weight in self.named():
                weight.copy_(state[name])

    def save(self, folder):
        type(self).saved += 1
        save_file(self.state(), folder / "norms.safetensors")

    def load(self, folder):
        self.load_state(load_file(folder / "norms.safetensors"))

    def merge(self, context):
        return self.model


class ForgetsOne(Norms):
    def load(self, folder):
        read = load_file(folder / "norms.safetensors")
        self.load_state(self.state() | {name: tensor for name, tensor in read.items() if "layers.0" not in name})


class CannotWrite(Norms):
    def save(self, folder):
        raise TypeError("Object of type Fraction is not JSON serializable")


class Rounds(Norms):
    def save(self, folder):
        save_file(
            {name: (8 * weight).round() / 8 for name, weight in self.state().items()}, folder / "norms.safetensors"
        )


class MergesOther(Norms):
    def merge(self, context):
        self.load_state(self.came)
        return self.model


@pytest.fixture
def train(tmp_path):
    settings = {"model": str(save_tiny_model(tmp_path / "base")), "data": ROWS, "max_steps": 2, "exact_callbacks": []}
    return functools.partial(luthier.train, output_dir=tmp_path / "run", **settings)


@pytest.fixture(params=["a small model", "a large model"])
def size(request, monkeypatch):
    """The model is as small as it is, or counts as one that is not read a second time."""
    if request.param == "a large model":
        monkeypatch.setattr(untrained, "SMALL", 0)
    return request.param


@pytest.mark.parametrize("adapter", [ForgetsOne, CannotWrite, Rounds])
def test_an_adapter_that_its_files_do_not_carry_is_refused_before_the_first_step(adapter, size, train, tmp_path):
    with expect_error("artifact-uncarried", "adapter") as caught:
        train(adapter=adapter())
    assert not (tmp_path / "run").exists()
    assert "Fraction" in caught.value.problem or adapter is not CannotWrite


@pytest.mark.parametrize("adapter", [ForgetsOne, CannotWrite])
@pytest.mark.parametrize("known", [True, False], ids=["a checkpoint", "no checkpoint"])
def test_an_adapter_on_a_model_from_python_is_tried_too(adapter, known, size, train, tmp_path):
    model = tiny_model() if not known else AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    came = {name: weight.clone() for name, weight in model.state_dict().items()}
    with expect_error("artifact-uncarried", "adapter"):
        train(model=model, tokenizer=tiny_tokenizer(), adapter=adapter())
    assert not (tmp_path / "run").exists()
    assert all(torch.equal(weight, came[name]) for name, weight in model.state_dict().items())
    assert train(model=model, tokenizer=tiny_tokenizer(), adapter=Norms()).model is model


def unlike_config(model):
    model.model.embed_tokens.weight = model.lm_head.weight = torch.nn.Parameter(torch.randn(321, 32))


def without_name(model):
    model.model.layers[0].self_attn.extra = torch.nn.Linear(4, 4)


def rounded_frequencies(model):
    frequencies = model.model.rotary_emb.original_inv_freq
    frequencies.data = frequencies.data.to(torch.bfloat16).float()


def unwritable_config(model):
    model.config.note = object()


@pytest.mark.parametrize("change", [unlike_config, without_name, rounded_frequencies, unwritable_config])
def test_a_large_whole_model_that_would_be_read_as_another_is_refused_before_the_first_step(
    change, train, tmp_path, monkeypatch
):
    monkeypatch.setattr(untrained, "SMALL", 0)
    model = tiny_model()
    change(model)
    with expect_error("artifact-uncarried", "adapter"):
        train(model=model, tokenizer=tiny_tokenizer(), adapter="full")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("room", [0, 10_000, 1 << 20])
def test_a_large_whole_model_is_tried_by_a_sample_of_its_weights(room, tied, monkeypatch, tmp_path):
    monkeypatch.setattr(sampled_state, "SAMPLE", room)
    config = tiny_model().config
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config)
    with sampled_state.sampled_state() as names:
        save_model(model, tmp_path / "sample", Files(dtype=torch.bfloat16))
    written = load_file(tmp_path / "sample/model.safetensors")
    assert names and sum(tensor.nbytes for tensor in written.values()) <= max(room / 2, 64)
    check_sample(model, tmp_path / "sample", names)
    written[next(iter(written))][3] += 1
    save_file(written, tmp_path / "sample/model.safetensors", {"format": "pt"})
    with expect_error("artifact-mismatch", "sample"):
        check_sample(model, tmp_path / "sample", names)
    save_model(model, tmp_path / "whole", Files())
    assert (tmp_path / "whole/model.safetensors").stat().st_size > sum(p.nbytes for p in model.parameters())


def test_a_merge_that_gives_another_model_is_refused_before_the_first_step(train, tmp_path):
    with expect_error("artifact-uncarried", "merge"):
        train(adapter=MergesOther(), merge=True, save_dtype="float32")
    assert not (tmp_path / "run").exists()
    assert train(adapter=Norms(), merge=True, save_dtype="float32").merged is not None


def test_the_check_changes_no_bit_of_the_run_and_is_done_once_in_a_process(train, tmp_path):
    untrained._checked.clear()
    checked, again = (train(adapter="full", output_dir=tmp_path / name).loss_history for name in ("one", "two"))
    assert len(untrained._checked) == 1 and checked == again


def test_a_model_of_the_same_class_with_another_config_is_checked_for_itself(train, tmp_path):
    untrained._checked.clear()
    train(adapter="full", output_dir=tmp_path / "one")
    tied = tiny_model()
    tied.config.tie_word_embeddings = not tied.config.tie_word_embeddings
    other = type(tied)(tied.config)
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    train(adapter="full", model=str(tmp_path / "other"), output_dir=tmp_path / "two")
    assert len(untrained._checked) == 2


def test_weights_and_randomness_are_as_they_were(size, tmp_path):
    adapter, tokenizer = Norms(), tiny_tokenizer()
    model = adapter.attach(tiny_model(), None)
    before, random = adapter.state(), torch.random.get_rng_state()
    recipe = Recipe.from_dict({"model": "python:tiny", "data": "rows.jsonl"})
    note = make_note(recipe.to_dict(), "untrained", [], Prompting(plain=True), Files())
    note = {**note, "adapter": {"object": "Norms"}, "quantizer": {"name": "none"}}
    untrained.check_untrained(model, adapter, Unquantized(NoOptions()), tokenizer, note, merges=True)
    assert all(torch.equal(weight, before[name]) for name, weight in adapter.state().items())
    assert torch.equal(torch.random.get_rng_state(), random)


def test_a_run_that_goes_on_is_not_checked_again(train):
    Norms.saved, steps = 0, []

    def fail(step):
        steps.append(step)
        if step == 2 and steps.count(2) == 1:
            raise RuntimeError("a defect")

    failing = luthier.on(step_ended=fail)
    with pytest.raises(RuntimeError, match="a defect"):
        train(adapter=Norms(), max_steps=3, exact_callbacks=[failing], save_steps=1)
    first, Norms.saved = Norms.saved, 0
    train(adapter=Norms(), max_steps=3, exact_callbacks=[luthier.on(step_ended=fail)], save_steps=1)
    assert (first, Norms.saved) == (1, 1)  # the check, then the artifact alone
    assert steps[-1] == 3
