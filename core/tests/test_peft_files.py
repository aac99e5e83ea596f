"""PEFT's files are read back as they were written; whatever is wrong with one is refused by its place."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from luthier import (
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    LuthierError,
    PeftFields,
    read_peft_config,
    read_peft_object,
    read_peft_tensors,
    write_peft_files,
)
from luthier.testing import expect_error

FIELDS = PeftFields(
    kinds=("HOUSE", "SHED"),
    types={"r": (int,), "targets": (list, str)},
    required=("r",),
    neutral=("colour",),
    remedy="Ask the builder.",
)
WHOLE = {"peft_type": "SHED", "r": 4, "targets": ["q"], "colour": "red", "revision": "main", "peft_version": "0.19"}
TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}


@pytest.fixture
def folder(tmp_path):
    write_peft_files(tmp_path / "adapter", WHOLE, TENSORS)
    return tmp_path / "adapter"


def written(folder, **changes):
    config = {**WHOLE, **changes}
    (folder / PEFT_CONFIG).write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return folder


def test_what_is_written_is_read_back(folder):
    assert read_peft_config(folder, FIELDS) == read_peft_object(folder) == WHOLE
    tensors = read_peft_tensors(folder)
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], one) and tensors[name].dtype == one.dtype for name, one in TENSORS.items())


def test_files_that_say_the_same_are_the_same_bytes(folder, tmp_path):
    write_peft_files(tmp_path / "other", dict(reversed(WHOLE.items())), dict(reversed(TENSORS.items())))
    for name in (PEFT_CONFIG, PEFT_WEIGHTS):
        assert (folder / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


@pytest.mark.parametrize(
    "text", ["", "{", "not json", "\x00", "[" * 100_000], ids=["empty", "cut", "text", "null", "deep"]
)
def test_a_config_that_is_no_json_is_refused_with_its_place(folder, text):
    (folder / PEFT_CONFIG).write_text(text)
    with expect_error("file-damaged", str(folder / PEFT_CONFIG)):
        read_peft_config(folder, FIELDS)


@pytest.mark.parametrize("content", [[], [WHOLE], "SHED", 3, None])
def test_a_config_that_is_no_object_is_refused_by_its_type(folder, content):
    (folder / PEFT_CONFIG).write_text(json.dumps(content))
    with expect_error("file-damaged", str(folder / PEFT_CONFIG), type(content).__name__):
        read_peft_config(folder, FIELDS)


def test_bytes_that_are_no_text_are_refused(folder):
    (folder / PEFT_CONFIG).write_bytes(b"\xff\xfe{}")
    with expect_error("file-damaged", str(folder / PEFT_CONFIG)):
        read_peft_config(folder, FIELDS)


@pytest.mark.parametrize("kind", [..., None, "LORA", "shed", 7, ["SHED"]])
def test_another_type_is_refused_with_those_that_are_read(folder, kind):
    with expect_error("artifact-mismatch", str(folder / PEFT_CONFIG), "HOUSE", "SHED"):
        read_peft_config(written(folder, peft_type=kind), FIELDS)


@pytest.mark.parametrize("value", [..., None])
def test_a_missing_field_is_named(folder, value):
    with expect_error("artifact-mismatch", str(folder / PEFT_CONFIG), "lacks r"):
        read_peft_config(written(folder, r=value), FIELDS)


@pytest.mark.parametrize("changes", [{"r": "4"}, {"r": 4.5}, {"r": True}, {"r": [4]}, {"targets": {"q": 1}}])
def test_a_value_of_another_type_is_refused_with_its_field(folder, changes):
    name, value = next(iter(changes.items()))
    with expect_error("artifact-mismatch", str(folder / PEFT_CONFIG), name, repr(value)):
        read_peft_config(written(folder, **changes), FIELDS)


def test_a_field_that_is_not_understood_is_refused_if_it_is_set(folder):
    with expect_error("artifact-mismatch", str(folder / PEFT_CONFIG), "a_window", "builder"):
        read_peft_config(written(folder, a_window={"wide": True}), FIELDS)
    for value in (None, False, [], {}, 0):
        assert read_peft_config(written(folder, a_window=value), FIELDS)["a_window"] == value


def test_an_optional_field_may_be_null_or_absent(folder):
    assert read_peft_config(written(folder, targets=None), FIELDS)["targets"] is None
    assert "targets" not in read_peft_config(written(folder, targets=...), FIELDS)


@pytest.mark.parametrize(("name", "read"), [(PEFT_CONFIG, read_peft_object), (PEFT_WEIGHTS, read_peft_tensors)])
def test_a_missing_file_is_named(folder, name, read):
    (folder / name).unlink()
    with expect_error("artifact-not-found", str(folder), name):
        read(folder)


def test_a_folder_that_does_not_exist_is_not_said_to_lack_a_file(folder):
    with expect_error("artifact-not-found", str(folder / "none")) as caught:
        read_peft_object(folder / "none")
    assert PEFT_CONFIG not in str(caught.value)


def test_a_pickle_is_told_of_and_not_read(folder):
    (folder / PEFT_WEIGHTS).rename(folder / "adapter_model.bin")
    with expect_error("artifact-not-found", str(folder), "pickle"):
        read_peft_tensors(folder)


@pytest.mark.parametrize("length", [0, 7, 40, -1])
def test_cut_weights_are_refused(folder, length):
    (folder / PEFT_WEIGHTS).write_bytes((folder / PEFT_WEIGHTS).read_bytes()[:length])
    with expect_error("file-damaged", str(folder / PEFT_WEIGHTS)):
        read_peft_tensors(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda kids: st.lists(kids) | st.dictionaries(st.text(), kids),
)


@given(content=JSON)
def test_no_content_raises_anything_but_an_error_with_a_place(content, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    (folder / PEFT_CONFIG).write_text(json.dumps(content))
    with pytest.raises(LuthierError) as caught:
        read_peft_config(folder, FIELDS)
    assert caught.value.where == str(folder / PEFT_CONFIG)


def test_a_dtype_that_torch_lacks_is_refused(folder):
    header = json.dumps({"a": {"dtype": "F6_E2M3", "shape": [8], "data_offsets": [0, 6]}}).encode()
    (folder / PEFT_WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(6))
    with expect_error("file-damaged", str(folder / PEFT_WEIGHTS), "F6_E2M3"):
        read_peft_tensors(folder)
