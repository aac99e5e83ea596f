"""Combining folders that others wrote: what their configuration says is held against each other before any tensor is."""

import json

import pytest
import torch
from luthier.artifacts.combine import Combination, combine_folders
from luthier.errors import LuthierError
from safetensors.torch import save_file

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def adapter(tmp_path):
    """`adapter("a", r=2, ...)`: a folder in PEFT's layout with one layer and no note, or with one."""

    def make(name, note=None, **changes):
        folder = tmp_path / name
        folder.mkdir()
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "org/base", **changes}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        tensors = {f"{LAYER}.lora_A.weight": torch.ones(2, 4), f"{LAYER}.lora_B.weight": torch.ones(3, 2)}
        save_file(tensors, folder / "adapter_model.safetensors")
        if note is not None:
            (folder / "luthier.json").write_text(json.dumps(note))
        return folder

    return make


def refused(folders, made):
    with pytest.raises(LuthierError) as caught:
        combine_folders(folders, Combination(), made)
    assert not made.exists()
    return caught.value


def test_factors_of_parameters_are_refused_for_their_scale_is_another(adapter, tmp_path):
    experts = adapter("b", target_parameters=["mlp.experts.down_proj"])
    error = refused([adapter("a"), experts], tmp_path / "made")
    assert (error.code, error.where) == ("artifact-mismatch", str(experts / "adapter_config.json"))
    assert "mlp.experts.down_proj" in str(error.found)


NOTE = {"format": 1, "model": {"name_or_path": "org/base"}, "base": "0" * 16, "artifact": "adapter"}


@pytest.mark.parametrize("note", [None, NOTE])
def test_bases_are_compared_by_the_names_in_the_files_where_a_note_is_missing(adapter, tmp_path, note):
    other = adapter("b", base_model_name_or_path="org/other")
    error = refused([adapter("a", note), other], tmp_path / "made")
    assert (error.code, error.where, error.found) == ("artifact-mismatch", str(other), "org/other")


def test_one_base_under_two_paths_and_one_without_a_name_are_combined(adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    names = {"a": "base", "b": str(tmp_path / "base"), "c": None}
    folders = [adapter(name, base_model_name_or_path=base) for name, base in names.items()]
    made = combine_folders(folders, Combination(), tmp_path / "made")
    assert json.loads((made / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
