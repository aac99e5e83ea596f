"""Serving: the commands are right for what lies in a folder."""

import json
import shlex
from pathlib import Path

import pytest
from luthier.artifacts.serving import RANKS, find_serving
from luthier.cli.screen.answers import make_console
from luthier.cli.screen.tables import draw_serving


@pytest.fixture
def made(tmp_path):
    """`made(lora={...})` writes an adapter's folder in a run's; `model={...}` a model's."""

    def make(*, lora=None, model=None, note=None, files=()):
        run = tmp_path / "my run"
        folder = run / ("adapter" if lora is not None else "model")
        folder.mkdir(parents=True)
        (run / "run.json").write_text("{}")
        if lora is not None:
            config = {"peft_type": "LORA", "r": 8, "base_model_name_or_path": "org/base", "bias": "none", **lora}
            (folder / "adapter_config.json").write_text(json.dumps(config))
        if model is not None:
            (folder / "config.json").write_text(json.dumps(model))
        if note is not None:
            (folder / "luthier.json").write_text(json.dumps({"format": 1, "model": {}, **note}))
        for name in files:
            (folder / name).touch()
        return folder

    return make


@pytest.mark.parametrize("began", [True, False, "gaussian"])
def test_a_lora_is_served_upon_its_base(made, began):
    folder = made(lora={"init_lora_weights": began})
    found = find_serving(folder)
    assert shlex.split(found.commands["vLLM"]) == [
        "vllm", "serve", "org/base", "--enable-lora", "--lora-modules", f"my-run={folder}"]  # fmt: skip
    assert shlex.split(found.commands["SGLang"])[-2:] == ["--lora-paths", f"my-run={folder}"]
    assert found.because is None and len(found.commands) <= 4


@pytest.mark.parametrize(
    ("rank", "pattern", "told"), [(16, {}, None), (17, {}, 32), (8, {"q": 200}, 256), (512, {}, 512)]
)
def test_the_rank_is_the_least_that_vllm_takes(made, rank, pattern, told):
    words = shlex.split(find_serving(made(lora={"r": rank, "rank_pattern": pattern})).commands["vLLM"])
    assert words[6:] == ([] if told is None else ["--max-lora-rank", str(told)])
    assert told is None or told in RANKS


@pytest.mark.parametrize(
    ("lora", "note", "reason"),
    [
        ({"use_dora": True}, None, "no DoRA"),
        ({"init_lora_weights": "pissa"}, None, "the difference from where it began"),
        ({"init_lora_weights": "olora"}, None, "the difference from where it began"),
        ({"modules_to_save": ["embed_tokens"]}, None, "no modules_to_save"),
        ({"bias": "all"}, None, "biases"),
        ({"r": 513}, None, "up to 512"),
        ({}, {"quantizer": {"name": "nf4"}, "adapter": {"name": "lora"}}, "weights in nf4"),
    ],
)
def test_what_other_servers_cannot_put_upon_a_base_is_merged_first(made, lora, note, reason):
    folder = made(lora=lora, note=note)
    found = find_serving(folder)
    assert reason in found.because
    assert shlex.split(found.commands["first"]) == ["luthier", "merge", str(folder.parent)]
    assert shlex.split(found.commands["vLLM"]) == ["vllm", "serve", str(folder.parent / "merged")]
    assert len(found.commands) <= 4


def test_prompts_that_cannot_be_merged_are_read_by_peft(made):
    note = {"adapter": {"name": "prompt_tuning"}, "quantizer": {"name": "none"}}
    found = find_serving(made(lora={"peft_type": "PROMPT_TUNING"}, note=note))
    assert list(found.commands) == ["PEFT"] and "cannot be merged" in found.because


def test_a_dense_model_is_served_as_it_is(made):
    folder = made(model={"model_type": "llama"}, note={"artifact": "model"})
    found = find_serving(folder)
    assert shlex.split(found.commands["vLLM"]) == ["vllm", "serve", str(folder)]
    assert found.because is None and "first" not in found.commands
    ollama = found.commands.get("Ollama", "")
    assert not ollama or ollama.endswith(shlex.quote(str(folder.parent / "gguf" / "Modelfile")))


def test_what_is_not_the_runs_own_model_is_exported_beside_itself(made):
    pytest.importorskip("luthier_gguf")
    folder = made(model={"model_type": "llama"}).rename(Path(made(lora={}).parent, "merged-step-00000007"))
    words = shlex.split(find_serving(folder).commands["Ollama"])
    beside = f"{folder}-gguf"
    assert words[:7] == ["luthier", "export", str(folder), "--format", "gguf", "--output-dir", beside]
    assert words[-2:] == ["-f", f"{beside}/Modelfile"]


def test_layers_in_a_quantizers_form_are_merged_first(made):
    assert "first" in find_serving(made(model={}, note={"artifact": "quantized"})).commands


def test_layers_that_cannot_be_merged_are_exported_in_their_own_form(made):
    pytest.importorskip("luthier_bitnet")
    folder = made(model={}, note={"artifact": "quantized", "quantizer": {"name": "bitnet"}})
    found = find_serving(folder)
    words = ["luthier", "export", str(folder.parent), "--format", "bitnet_packed"]
    assert shlex.split(found.commands["bitnet_packed"]) == words
    assert "first" not in found.commands
    assert "cannot be merged" in found.because


def test_a_gguf_file_goes_to_ollama_and_llama_cpp(made):
    folder = made(files=["model.gguf", "Modelfile"])
    found = find_serving(folder)
    assert shlex.split(found.commands["Ollama"]) == ["ollama", "create", "my-run", "-f", str(folder / "Modelfile")]
    assert shlex.split(found.commands["llama.cpp"]) == ["llama-server", "-m", str(folder / "model.gguf")]


def test_a_graph_goes_to_onnx_runtime_alone(made):
    folder = made(model={"model_type": "llama"}, note={"artifact": "model"}, files=["model.onnx", "model.onnx.data"])
    found = find_serving(folder)
    assert found.commands == {"ONNX Runtime": f'onnxruntime.InferenceSession("{folder / "model.onnx"}")'}


def test_a_folder_of_nothing_known_says_so(tmp_path, capsys):
    found = find_serving(tmp_path)
    assert found.commands == {} and "no files" in found.because
    draw_serving(make_console(), found)
    assert found.because in capsys.readouterr().out


def test_each_command_stands_on_one_line(made, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    found = find_serving(made(lora={}))
    draw_serving(make_console(), found)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ", 1)[1].strip() for line in lines[1:]] == list(found.commands.values())
    assert Path("x") not in found.commands
