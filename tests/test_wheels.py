"""Wheels of the core and of each plugin, installed where the repository is not: discovered, and training."""

import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "kernels"  # a library first; its operations are active unnamed
MEMBERS = [
    ROOT / "core",
    LIBRARY,
    *sorted(p.parent for folder in ("plugins", "contrib") for p in ROOT.glob(f"{folder}/*/pyproject.toml")),
]
BUILD = "import sys; from flit_core import buildapi; print(buildapi.build_wheel(sys.argv[1]))"
LIMITS = {"core": 6e6}  # bytes; the core holds the embedded model and its data


def named(members):
    return pytest.mark.parametrize("member", members, ids=lambda member: member.name)


def project(member):
    return tomllib.loads((member / "pyproject.toml").read_text("utf-8"))["project"]


@pytest.fixture(scope="session")
def wheels(tmp_path_factory):
    """Member -> its wheel."""
    folder = tmp_path_factory.mktemp("wheels")
    built = {}
    for member in MEMBERS:
        words = [sys.executable, "-c", BUILD, folder]
        done = subprocess.run(words, cwd=member, capture_output=True, text=True, check=True)
        built[member] = folder / done.stdout.strip()
    return built


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    """Every installed library but ours and what points to the repository."""
    return _links(tmp_path_factory.mktemp("libraries"), [p.name for p in Path(sysconfig.get_path("purelib")).iterdir()])


@pytest.fixture(scope="session")
def light(tmp_path_factory):
    """What `pip install luthier` brings beside luthier."""
    names = set()
    for requirement in _closure("luthier"):
        files = importlib.metadata.distribution(requirement).files
        names |= {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}
    return _links(tmp_path_factory.mktemp("light"), names)


@named(MEMBERS)
def test_a_wheel_says_that_it_is_typed(member, wheels):
    names = zipfile.ZipFile(wheels[member]).namelist()
    packages = {name.partition("/")[0] for name in names if name.endswith("/__init__.py")}
    assert packages
    assert all(f"{package}/py.typed" in names for package in packages)  # PEP 561


@named(MEMBERS)
def test_a_wheel_carries_its_licence_and_says_for_whom_it_is(member, wheels):
    archive = zipfile.ZipFile(wheels[member])
    (licence,) = [name for name in archive.namelist() if name.endswith("/licenses/LICENSE")]
    assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
    (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    lines = archive.read(metadata).decode().splitlines()
    assert "License-Expression: Apache-2.0" in lines
    assert {"Classifier: Typing :: Typed", "Classifier: Operating System :: POSIX :: Linux"} <= set(lines)


def _links(folder, names):
    """A folder of links to these entries of this environment's packages."""
    for name in names:
        if not name.startswith(("luthier", "__")) and not name.endswith((".pth", ".virtualenv")):
            (folder / name).symlink_to(Path(sysconfig.get_path("purelib")) / name)
    return folder


def _closure(name):
    """A distribution and all that it requires without extras."""
    found, wanted = set(), [name]
    while wanted:
        current = canonicalize_name(wanted.pop())
        if current not in found:
            found.add(current)
            needed = [Requirement(text) for text in importlib.metadata.requires(current) or ()]
            wanted += [r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def environment(folder, beneath, wheels):
    """A virtual environment with these wheels over a folder of libraries; `run(*words)` is its `luthier`."""
    venv.create(folder, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (site / "beneath.pth").write_text(f"{beneath}\n")
    python = folder / "bin/python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--no-compile", "-q"]
    subprocess.run([*pip, *wheels], check=True)
    settings = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "LUTHIER", "VIRTUAL_ENV"))}

    def run(*words):
        line = [folder / "bin/luthier", *words]
        variables = {**settings, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "HF_HUB_OFFLINE": "1",
                     "TRACKIO_DIR": str(folder / "trackio")}  # fmt: skip
        return subprocess.run(line, cwd=folder, env=variables, capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="session")
def everything(tmp_path_factory, libraries, wheels):
    """All wheels, with torch and the other libraries beneath."""
    return environment(tmp_path_factory.mktemp("everything"), libraries, wheels.values())


@pytest.fixture(scope="session")
def alone(tmp_path_factory, light, wheels):
    """The core's wheel, with what it requires and nothing else: no torch."""
    return environment(tmp_path_factory.mktemp("alone"), light, [wheels[ROOT / "core"]])


def document(done):
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return json.loads(done.stdout)


@named(MEMBERS)
def test_a_wheel_holds_its_package_its_licence_and_nothing_else(wheels, member):
    with zipfile.ZipFile(wheels[member]) as wheel:
        names = wheel.namelist()
        metadata = wheel.read(next(n for n in names if n.endswith("/METADATA"))).decode()
    package = {name for name in names if ".dist-info/" not in name}
    sources = {str(path.relative_to(member / "src")) for path in (member / "src").rglob("*.py")}
    assert {name for name in package if name.endswith(".py")} == sources
    assert [name for name in package if any(p.startswith((".", "__pycache__", "tests")) for p in name.split("/"))] == []
    assert "License-Expression: Apache-2.0" in metadata
    assert wheels[member].stat().st_size < LIMITS.get(member.name, 2e5)


def test_every_plugin_is_discovered_and_nothing_fails(everything):
    listed = document(everything("plugins", "--json"))["plugins"]
    assert {row["distribution"] for row in listed} == {project(member)["name"] for member in MEMBERS}
    assert {row["state"] for row in listed} <= {"ok", "unsupported"}


def test_the_installed_command_trains_a_lora_with_an_optimizer_from_outside(
    everything, tmp_path, model_folder, data_file
):
    words = [
        "--model",
        model_folder,
        "--data",
        data_file,
        "--adapter",
        "lora",
        "--optimizer",
        "lion",
        "--max-steps",
        "2",
    ]
    run = document(everything("train", *words, "--output-dir", tmp_path / "run", "--json"))
    assert run["steps"] == 2
    assert {p["distribution"] for p in run["parts"]} == {"luthier", "luthier-lora", "luthier-lion"}
    made = document(everything("doctor", "--json"))
    assert (made["failures"], made["missing"]) == ([], [])


def test_the_core_alone_lists_its_parts_and_says_what_to_install(alone):
    listed = document(alone("plugins", "--json"))["plugins"]
    assert {row["distribution"] for row in listed} == {"luthier"}
    found = document(alone("doctor", "--json"))
    assert "torch" not in found["versions"]
    assert "torch" in found["missing"]
    assert 'pip install "luthier[local]"' in found["remedy"]


def test_the_core_alone_checks_a_recipe(alone, tmp_path):
    recipe = {"model": "demo", "data": "rows.jsonl", "learning_rate": 1e-4, "max_steps": 2}
    (tmp_path / "right.json").write_text(json.dumps(recipe))
    (tmp_path / "wrong.json").write_text(json.dumps({**recipe, "learning_rat": 1e-4}))
    (tmp_path / "lora.json").write_text(json.dumps({**recipe, "adapter": "lora"}))
    assert document(alone("plan", tmp_path / "right.json", "--json"))["recipe"]["max_steps"] == 2
    wrong, lora = (alone("plan", tmp_path / f"{name}.json") for name in ("wrong", "lora"))
    assert "Did you mean 'learning_rate'?" in wrong.stderr
    assert "pip install luthier-lora" in lora.stderr
    assert (wrong.returncode, lora.returncode) == (2, 2)


def test_the_core_alone_says_what_training_needs(alone, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    done = alone("train", "--model", "demo", "--data", tmp_path / "rows.jsonl", "--json")
    error = json.loads(done.stdout)["error"]
    assert (done.returncode, error["code"]) == (2, "dependency-missing")
    assert 'pip install "luthier[local]"' in error["remedy"]


@pytest.mark.slow
@named(MEMBERS[2:])
def test_each_plugins_wheel_works_with_the_cores_alone(tmp_path, libraries, wheels, member, model_folder, data_file):
    beside = BESIDE.get(member.name, [])
    chosen = [wheels[ROOT / folder] for folder in ("core", *beside)]
    run = environment(tmp_path / "environment", libraries, [*chosen, wheels[member]])
    listed = document(run("plugins", "--json"))["plugins"]
    name = project(member)["name"]
    parts = [row for row in listed if row["distribution"] == name]
    assert parts and {row["state"] for row in listed} <= {"ok", "unsupported"}
    assert document(run("doctor", "--json"))["failures"] == []
    used = USED.get(member.name)
    if used is None and "callback" in {row["kind"] for row in parts}:
        used = ["--exact-callbacks", json.dumps(["jsonl", member.name])]
    if used is None:  # parts that need an account, another file of rows, or a run
        return
    words = ["--model", model_folder, "--data", data_file, "--max-steps", "2", *used]
    trained = document(run("train", *words, "--output-dir", tmp_path / "run", "--json"))
    assert name in {part["distribution"] for part in trained["parts"]}


BESIDE = {
    "int8": ["plugins/lora"],
    "bitnet": ["kernels"],
    "bitsandbytes": ["plugins/lora"],
    "torchao": ["plugins/lora"],
    "optimizers": ["kernels"],
    "nf4": ["plugins/lora", "kernels"],
}  # something must train on a frozen base
USED = {
    "lora": ["--adapter", "dora"],
    "peft": ["--adapter", "peft.loha"],
    "osft": ["--adapter", "osft"],
    "slao": ["--adapter", "slao"],
    "prompt": ["--adapter", "prompt_tuning"],
    "selective": ["--adapter", '{"name": "modules", "target_modules": ["mlp"]}'],
    "lion": ["--optimizer", "lion"],
    "int8": ["--adapter", "lora", "--quantizer", "int8"],
    "nf4": ["--adapter", "qlora"],
    "bitsandbytes": ["--adapter", "lora", "--quantizer", "bnb.nf4"],
    "torchao": ["--adapter", "lora", "--quantizer", "torchao.int4"],
    "optimizers": ["--optimizer", "adamw_8bit"],
    "bitnet": ["--adapter", "full", "--quantizer", "bitnet"],
    "wandb": ["--exact-callbacks", '["jsonl", {"name": "wandb", "mode": "offline"}]'],
    "mlflow": ["--exact-callbacks", '["jsonl", {"name": "mlflow"}]'],
}
