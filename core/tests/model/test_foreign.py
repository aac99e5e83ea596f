"""Whatever a library raises while a model is read is one error of ours, with the file and the cause."""

import json
import pickle
import shutil

import luthier
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier import Adapter, LuthierError
from luthier.model import load
from luthier.model.config_limits import check_config
from luthier.model.foreign import describe_error, explain_reading
from luthier.recipe.schema import Model
from luthier.testing import expect_error
from luthier.testing.worlds import tiny_model, tiny_tokenizer

CONFIGS = {  # what stands in config.json: what the error says
    "hidden_size: 0": ({"hidden_size": 0}, "hidden_size"),
    "heads: x": ({"num_attention_heads": "x"}, "num_attention_heads"),
    "vocabulary": ({"vocab_size": 10**12}, "16,777,216"),
    "layers": ({"num_hidden_layers": 10**9}, "1,024"),
    "head_dim": ({"head_dim": 2**31}, "65,536"),
    "no layers": ({"num_hidden_layers": -1}, "found -1"),
    "dtype": ({"dtype": "float7"}, "float7"),
    "activation": ({"hidden_act": "nonsense"}, "nonsense"),
    "rotary": ({"rope_parameters": {"rope_type": "nonsense"}}, "nonsense"),
    "a kernel of the hub": ({"attn_implementation": "evil/kernel"}, "evil/kernel"),
    "a library that is absent": ({"quantization_config": {"quant_method": "aqlm"}}, "aqlm"),
    "a method of nobody": ({"quantization_config": {"quant_method": "nonsense"}}, "nonsense"),
    "no mapping": ({"quantization_config": 7}, "config.json"),
    "an unknown kind": ({"model_type": "nonsense"}, "nonsense"),
    "dropout": ({"attention_dropout": "a"}, "attention_dropout"),
}
FILES = {  # a file of the folder: what stands in it
    "config.json": ["[1, 2]", "7", "{", "[" * 100_000, '"\ud800"'],
    "generation_config.json": ["[1, 2]", "{"],
    "tokenizer_config.json": ["[1, 2]", "null"],
    "tokenizer.json": ["[1, 2]", "{}", '{"version": 1}'],
    "model.safetensors": ["", "{}", "x" * 100],
}


@pytest.fixture(scope="module")
def broken(model_folder, tmp_path_factory):
    """A copy of the tiny model's folder with a file changed: by its text, or by a change of its JSON."""

    def make(name, content):
        folder = tmp_path_factory.mktemp("broken") / "model"
        shutil.copytree(model_folder, folder)
        path = folder / name
        if isinstance(content, dict):
            content = json.dumps({**json.loads(path.read_text()), **content})
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
        return folder

    return make


def refusal(verb, folder, tmp_path):
    data = {} if verb is luthier.plan else {"data": [{"prompt": "a", "completion": "b"}], "output_dir": tmp_path / "r"}
    with pytest.raises(LuthierError) as caught:
        verb(model=str(folder), adapter="lora", **data)
    assert caught.value.code in ("model-not-found", "model-weights", "file-damaged")
    assert str(folder) in caught.value.where and not (tmp_path / "r").exists()
    return str(caught.value)


@pytest.mark.parametrize("verb", [luthier.plan, luthier.train])
@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_no_model_can_be_made_of_is_refused_with_the_cause(case, verb, broken, tmp_path):
    change, told = CONFIGS[case]
    assert told in refusal(verb, broken("config.json", change), tmp_path)


@pytest.mark.parametrize(("name", "content"), [(n, c) for n, contents in FILES.items() for c in contents])
def test_a_file_that_is_not_what_its_name_says_is_named(name, content, broken, tmp_path):
    assert name in refusal(luthier.train, broken(name, content), tmp_path)
    if name != "tokenizer.json":  # without rows no tokenizer is asked for
        assert name in refusal(luthier.plan, broken(name, content), tmp_path)


@pytest.mark.parametrize("found", ["x", [1, 2], {}])
def test_a_setting_with_which_the_tokenizer_fails_is_told_before_any_row_is_read(found, broken, tmp_path):
    settings_of_it = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": found}
    folder = broken("tokenizer_config.json", json.dumps(settings_of_it))
    assert "tokenizer_config.json" in refusal(luthier.train, folder, tmp_path)


@pytest.mark.parametrize("held", [{"a": torch.zeros(2)}, print])
def test_pickled_weights_are_refused_unread(held, broken, tmp_path):
    folder = broken("config.json", {})
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(held))
    assert "pickle" in refusal(luthier.plan, folder, tmp_path) and "pickle" in refusal(luthier.train, folder, tmp_path)


@settings(max_examples=20)
@given(st.sampled_from([ZeroDivisionError, OverflowError, RecursionError, MemoryError, AttributeError, KeyError, OSError,
                        AssertionError, NotImplementedError, UnicodeError, StopIteration, Warning]), st.text())  # fmt: skip
def test_any_exception_becomes_one_error_with_place_and_cause(kind, text):
    with pytest.raises(LuthierError) as caught, explain_reading("here", file="config.json"):
        raise kind(text)
    assert caught.value.code == "model-not-found" and caught.value.where == "here"
    assert isinstance(caught.value.__cause__, kind) and len(caught.value.problem) < 500
    assert caught.value.problem == describe_error(caught.value.__cause__)


def test_an_error_of_ours_and_a_device_without_memory_are_told_as_they_are():
    for error in (LuthierError("usage", "as it is"), torch.OutOfMemoryError("full")):
        with pytest.raises(type(error)) as caught, explain_reading("here"):
            raise error
        assert caught.value is error


def test_a_plan_without_rows_says_what_is_broken_where_weights_are_needed(model_folder, tmp_path):
    """A part that cannot be rehearsed has the weights loaded; the rows that are assumed go along."""

    class Curious(Adapter):
        def attach(self, model, context):
            float(model.get_input_embeddings().weight.sum())
            raise LuthierError("part-unsupported", "the numbers were looked at")

        def groups(self):
            return []

        disabled = state = load_state = save = load = groups

    with expect_error("part-unsupported"):
        luthier.plan(model=tiny_model(), tokenizer=tiny_tokenizer(), adapter=Curious())


def test_a_hub_kernel_is_not_fetched_by_any_name(model_folder):
    spec = Model(name_or_path=str(model_folder))
    for name in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        config = load.load_config(spec.name_or_path)
        setattr(config, f"_{name.lstrip('_')}", "evil/kernel")
        with pytest.raises(LuthierError, match="evil/kernel"):
            check_config(config, "here")
