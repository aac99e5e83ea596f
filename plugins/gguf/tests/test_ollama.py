"""Registration in Ollama, with a stand-in for its program."""

import os
import sys

import pytest
from luthier.testing import expect_error
from luthier.testing.worlds import tiny_model, tiny_tokenizer
from luthier_gguf import Gguf
from luthier_gguf.exporter import GgufExporter

PROGRAM = """#!{python}
import pathlib, sys
words = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(" ".join(words) + "\\n")
if words[0] in {refused!r}:
    sys.exit("Error: could not connect")
if words[0] == "create":
    modelfile = pathlib.Path(words[3])
    weights = modelfile.parent / modelfile.read_text().split()[1]
    assert words[2] == "-f" and weights.read_bytes()[:4] == b"GGUF"
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a program `ollama` on the PATH, which fails at the commands given; return the file with its calls."""

    def put(*refused):
        program, log = tmp_path / "bin" / "ollama", tmp_path / "log"
        program.parent.mkdir()
        program.write_text(PROGRAM.format(python=sys.executable, log=str(log), refused=refused))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
        return log

    return put


def test_an_export_that_agrees_is_registered_under_its_name(tmp_path, install):
    log, model, tokenizer = install(), tiny_model().eval(), tiny_tokenizer()
    exporter = GgufExporter(Gguf(ollama="my-model"))
    exporter.check(model.config)
    exporter.export(model, tokenizer, tmp_path)
    assert log.read_text() == "list\n"  # what differs is never registered
    exporter.verify(model, tokenizer, tmp_path)
    assert log.read_text().splitlines() == ["list", f"create my-model -f {tmp_path / 'Modelfile'}"]


@pytest.mark.parametrize(
    ("options", "refused", "code", "word"),
    [
        (Gguf(ollama="a"), ("list",), "gguf:ollama", "could not connect"),
        (Gguf(ollama="a"), None, "gguf:ollama", "PATH"),
        (Gguf(ollama="a", modelfile=False), (), "recipe-conflict", "Modelfile"),
    ],
    ids=["no server", "no program", "no Modelfile"],
)
def test_what_cannot_be_registered_is_refused_before_any_work(
    monkeypatch, tmp_path, install, options, refused, code, word
):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing")) if refused is None else install(*refused)
    with expect_error(code, "gguf.ollama", word):
        GgufExporter(options).check(tiny_model().config)
