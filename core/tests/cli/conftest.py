"""What the command line's tests share: the command in process, and plugin distributions made on the spot."""

import functools
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import luthier as luthier_package
import pytest
from luthier.cli.app import app
from luthier.cli.documents.document_schemas import document_schema, list_verbs
from luthier.logs import set_up
from luthier.plugins.registry import installed_plugins
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.testing import CliRunner


def check_documents(words, documents):
    """Hold what a command has printed to the schema of its verb."""
    words = [str(word) for word in words]
    verb = next((two for word in words[1:] if (two := f"{words[0]} {word}") in list_verbs()), words[0])
    if verb in list_verbs():
        for document in documents:
            problem = jsonschema.exceptions.best_match(validator_of(verb).iter_errors(document))
            assert problem is None, f"{verb}: {problem}"


@functools.cache
def validator_of(verb):
    return jsonschema.Draft202012Validator(document_schema(verb))


@pytest.fixture
def luthier(monkeypatch):
    """`luthier("plugins", "--json")` in process: `status`, `stdout`, `stderr`, and `document` where stdout is JSON."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*args, stdin=None):
        result = CliRunner().invoke(app, [str(a) for a in args], input=stdin)
        document = None
        if "--json" in args:  # of a chat, each line is one
            is_chat = args[0] == "chat" and not result.stdout.startswith("{\n")  # which an error begins with
            lines = result.stdout.splitlines() if is_chat else None
            document = json.loads(result.stdout) if lines is None else [json.loads(line) for line in lines]
            check_documents(args, [document] if lines is None else document)
        return SimpleNamespace(status=result.exit_code, stdout=result.stdout, stderr=result.stderr, document=document)

    yield run
    set_up("warning")  # what a command's options made of it is not the next test's


@pytest.fixture(scope="session")
def command():
    """The same in a process of its own, with one thread, through `python -m luthier`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(*args):
        line = [sys.executable, "-m", "luthier", *(str(a) for a in args)]
        return subprocess.run(line, capture_output=True, text=True, check=False, timeout=120, env=environment)

    return run


@pytest.fixture(scope="session")
def bare(tmp_path_factory):
    """The command with what `pip install luthier` alone brings: a path that holds its requirements and nothing else."""
    site = tmp_path_factory.mktemp("bare")
    (site / "luthier").symlink_to(Path(luthier_package.__file__).parent)
    for name in requirements_of("luthier"):
        found = metadata.distribution(name)
        tops = {path.parts[0] for path in found.files if path.parts[0] not in ("..", "__pycache__")}
        for top in sorted(t for t in tops if not t.endswith(".pth")):
            (site / top).symlink_to(found.locate_file(top))
    environment = {"PYTHONPATH": str(site), "PATH": os.environ["PATH"], "HOME": str(site)}

    def run(*args):
        line = [sys.executable, "-S", "-m", "luthier", *(str(a) for a in args)]
        return subprocess.run(line, capture_output=True, text=True, check=False, timeout=120, env=environment)

    return run


def requirements_of(name):
    """A distribution and all that it requires without extras, by name."""
    found, wanted = set(), [name]
    while wanted:
        current = canonicalize_name(wanted.pop())
        if current not in found:
            found.add(current)
            needed = (Requirement(text) for text in metadata.requires(current) or ())
            wanted += [r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return sorted(found)


@pytest.fixture
def distribute(tmp_path, monkeypatch):
    """`distribute("luthier-x", module_source, requires=[...])` puts an installed distribution on the path."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    made = []

    def make(name, source, *, requires=(), version="1.0"):
        module = name.replace("-", "_")
        made.append(module)
        (site / f"{module}.py").write_text(source)
        info = site / f"{module}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {r}" for r in requires), ""]))
        (info / "entry_points.txt").write_text(f"[luthier]\n{name.removeprefix('luthier-')} = {module}\n")
        installed_plugins.cache_clear()
        return Path(site)

    yield make
    installed_plugins.cache_clear()
    for module in made:
        sys.modules.pop(module, None)


OFFER = """
import attrs
from luthier import OptimizerRecord, hookimpl, option

@attrs.frozen(kw_only=True)
class Options:
    momentum: float = option(0.9, help="How much of the last step is kept.", low=0.0, high=1.0)
    names: list[str] | None = option(None, help="Which parameters.")

@hookimpl
def luthier_optimizers():
    return [OptimizerRecord(name="{name}", summary="An optimizer of a test.", options=Options, build="{build}")]
"""


@pytest.fixture
def offering():
    """The source of a module that offers one optimizer."""

    def source(name, build="luthier.builtin.optimizers:AdamW"):
        return OFFER.format(name=name, build=build)

    return source


RECIPE = """
model: llama
adapter: {name: lora, r: 4}
data: {train: rows.jsonl, validation: 0.1, max_length: 128}
exact_callbacks: [jsonl]
global_batch_size: 4
max_steps: 3
output_dir: run
device: cpu
"""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a tiny model, forty rows, and `r.yaml`, which trains for three steps into `run`."""
    import torch
    from luthier.testing.worlds import save_tiny_model

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder / "llama")
    rows = [{"prompt": f"How much is {n} and {n}?", "completion": f"It is {2 * n}."} for n in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "r.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="session")
def trained(tiny, command):
    """The document and the process of `luthier train r.yaml --json`."""
    result = command("train", tiny / "r.yaml", "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout), result
