"""`luthier export`: a run in another tool's format, checked before the weights are read, compared before it is kept."""

import json
from pathlib import Path

import attrs
import luthier
import numpy as np
import pytest
import torch
from luthier import ExporterRecord, LuthierError, hookimpl, option
from luthier.cli.app import app
from luthier.logs import set_up
from luthier.plugins.loading import Source
from luthier.plugins.registry import installed_plugins
from luthier.testing import expect_error
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

FILE = "weights.npz"


@attrs.frozen(kw_only=True)
class Arrays:
    compressed: bool = option(False, help="Compress the file.")
    damage: float = option(0.0, help="Added to every weight that is written.")
    largest: int = option(10**6, help="The largest vocabulary.")


class ArraysExporter:
    def __init__(self, options):
        self.options = options

    def check(self, config):
        if config.vocab_size > self.options.largest:
            raise LuthierError("part-unsupported", "too many tokens for this format", where="vocab_size")

    def export(self, model, tokenizer, folder):
        assert all(type(m) is not None and "lora" not in name for name, m in model.named_modules())
        save = np.savez_compressed if self.options.compressed else np.savez
        save(folder / FILE, **{n: v.numpy() + self.options.damage for n, v in model.state_dict().items()})

    def verify(self, model, tokenizer, folder):
        held = np.load(folder / FILE)
        worst = max(float((torch.from_numpy(held[n]) - v).abs().max()) for n, v in model.state_dict().items())
        if worst:
            raise LuthierError("artifact-mismatch", "a weight differs", where=str(folder), found=worst)
        return {"largest difference": worst}


class Plugin:
    @hookimpl
    def luthier_exporters(self):
        return [
            ExporterRecord(
                name="arrays", summary="Arrays of numpy.", options=Arrays, build=f"{__name__}:ArraysExporter"
            )
        ]


@pytest.fixture
def arrays(monkeypatch):
    installed_plugins.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, __name__, __import__("sys").modules[__name__])
    installed_plugins().register(
        Plugin(), Source(plugin="arrays", module=__name__, distribution="luthier-arrays", version="1.0")
    )
    yield
    installed_plugins.cache_clear()


@pytest.fixture
def command():
    yield lambda *words: CliRunner().invoke(app, [str(word) for word in words])
    set_up("warning")


@pytest.fixture
def run(train):
    return train(max_steps=2)


def test_a_run_is_written_whole_with_its_adapter_folded_in(arrays, run, tmp_path):
    found = luthier.export(run.output_path, "arrays")
    assert found.folder == run.output_path / "arrays"
    assert found.differences == {"largest difference": 0.0}
    assert sorted(found.files) == sorted([FILE, "README.md"])
    merged = AutoModelForCausalLM.from_pretrained(luthier.merge(run.output_path, tmp_path / "merged"))
    held = np.load(found.folder / FILE)
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(torch.from_numpy(held[name]), value, rtol=1e-6, atol=1e-7)


TEXTS = {"prompt": "How many?", "completion": "1"}
CHAT = {"messages": [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "1"}]}


@pytest.mark.parametrize(("row", "is_chat"), [(TEXTS, False), (CHAT, True)])
def test_a_format_gets_the_chat_template_only_of_what_was_trained_as_a_chat(
    arrays, train, monkeypatch, tmp_path, row, is_chat
):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(row)}\n" * 8)
    trained, seen = train(max_steps=1, data=str(path)), []

    def verify(self, model, tokenizer, folder):
        seen.append(tokenizer.chat_template is not None)
        return {}

    monkeypatch.setattr(ArraysExporter, "verify", verify)
    luthier.export(trained.output_path, "arrays")
    assert seen == [is_chat]
    assert (trained.artifact / "chat_template.jinja").exists()  # the run's own files keep it


def test_the_command_tells_folder_files_and_differences(arrays, run, command, tmp_path):
    words = [
        "export",
        run.output_path,
        "--format",
        "arrays",
        "--option",
        "compressed=true",
        "--output-dir",
        tmp_path / "out",
    ]
    done = command(*words, "--json")
    assert done.exit_code == 0, done.stdout
    told = json.loads(done.stdout)
    assert (told["format"], told["distribution"], told["dry_run"]) == ("arrays", "luthier-arrays", False)
    assert told["files"][FILE] == (tmp_path / "out" / FILE).stat().st_size
    plain = luthier.export(run.output_path, "arrays", tmp_path / "plain").files[FILE]
    assert told["files"][FILE] < plain


def test_a_dry_run_checks_and_writes_nothing(arrays, run, command):
    before = sorted(run.output_path.rglob("*"))
    done = command("export", run.output_path, "--format", "arrays", "--dry-run")
    assert done.exit_code == 0 and "would write arrays" in done.stdout
    assert sorted(run.output_path.rglob("*")) == before
    with expect_error("part-unsupported", "vocab_size"):
        luthier.export(run.output_path, {"name": "arrays", "largest": 5}, dry_run=True)


def test_what_differs_from_the_model_is_not_kept(arrays, run):
    with pytest.raises(LuthierError) as caught:
        luthier.export(run.output_path, {"name": "arrays", "damage": 0.5})
    assert caught.value.code == "artifact-mismatch"
    assert not (run.output_path / "arrays").exists()
    assert not [path for path in run.output_path.iterdir() if path.name.startswith(".arrays")]


def test_nothing_is_overwritten(arrays, run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(LuthierError) as caught:
        luthier.export(run.output_path, "arrays", tmp_path / "out")
    assert caught.value.code == "path-unwritable"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_plain_model_is_exported_too(arrays, model_folder, tmp_path):
    assert luthier.export(model_folder, "arrays", tmp_path / "out").files


def test_an_unknown_format_names_those_that_there_are(arrays, run):
    with pytest.raises(LuthierError) as caught:
        luthier.export(run.output_path, "array")
    assert caught.value.code == "part-unknown"
    assert "arrays" in caught.value.remedy


def test_an_option_that_is_no_pair_is_a_mistake_of_the_command_line(arrays, run, command):
    done = command("export", run.output_path, "--format", "arrays", "--option", "compressed", "--json")
    assert json.loads(done.stdout)["error"]["code"] == "usage"
    assert not Path(run.output_path / "arrays").exists()
