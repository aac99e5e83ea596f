"""What `make_package` writes works: it installs, is listed, passes its own tests, and its README says what its options are."""

import json
import os
import re
import subprocess
import sys
import types

import pytest
import yaml
from luthier.plugins.options import describe_options
from luthier.scaffold import make_package, render

KINDS = ("adapter", "loss", "optimizer", "quantizer", "callback", "provider", "operation", "exporter", "metric",
         "penalty", "trainer", "benchmark", "engine")  # fmt: skip
LISTS = {"callback": "callbacks", "metric": "metrics", "penalty": "penalties"}
TRAINING = tuple(kind for kind in KINDS if kind != "provider")  # which trains elsewhere
PIP = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
PYTEST = ["-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", "-rs"]


def options_class(name, kind):
    """The options class of a generated entry module, which needs nothing but luthier."""
    module = types.ModuleType(f"luthier_{name}")
    sys.modules[module.__name__] = module  # attrs looks type hints up there
    try:
        exec(render(name, kind)[f"src/luthier_{name}/__init__.py"], vars(module))
        found = getattr(module, name.capitalize())
        describe_options(found)
    finally:
        del sys.modules[module.__name__]
    return found


def table(text):
    """The rows of the README's table of options."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("| `")]
    return [tuple(cell.strip().strip("`").replace("\\|", "|") for cell in row) for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_the_readmes_table_is_that_of_the_options(kind):
    described = describe_options(options_class("warmth", kind))
    shown = [(d.name, d.type, "none" if d.default is None else str(d.default), d.bounds.help) for d in described]
    assert table(render("warmth", kind)["README.md"]) == shown


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind not in ("operation", "exporter", "benchmark", "engine")]
)  # no recipe's
def test_the_readmes_recipe_uses_the_part_with_options_it_has(kind):
    text = render("warmth", kind)["README.md"]
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    part = recipe[LISTS[kind]][-1] if kind in LISTS else recipe[kind]
    given = part if isinstance(part, dict) else {"name": part}
    assert given.pop("name") == "warmth"
    options_class("warmth", kind)(**given)


@pytest.mark.parametrize("kind", KINDS)
def test_the_readmes_python_parses_and_names_its_class(kind):
    text = render("warmth", kind)["README.md"]
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    compile(code, "README.md", "exec")
    assert "from luthier_warmth import Warmth" in code and "Warmth(" in code


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A plugin of each kind, and a folder into which all of them are installed."""
    folder, target = tmp_path_factory.mktemp("plugins"), tmp_path_factory.mktemp("site")
    roots = [make_package(f"sample-{kind}", kind, folder) for kind in KINDS]
    roots.append(make_package("sample-pairs", "loss", folder, "preference"))
    subprocess.run([sys.executable, *PIP, "--target", target, *roots], check=True)
    return roots, target


@pytest.mark.parametrize(
    "kinds", [("adapter", "loss", "callback"), pytest.param(KINDS, marks=pytest.mark.slow)], ids=["few", "every"]
)
def test_one_of_a_kind_installs_and_passes_its_own_tests(kinds, site, tmp_path):
    found, target = site
    roots = [root for root in found if root.name.split("-")[-1] in (*kinds, "pairs")]
    assert len(roots) == len(kinds) + 1
    paths = [str(target), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [sys.executable, *PYTEST, *roots], check=False, env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    reasons = ("declares no coefficients", "leaves units as they are", "does not tune by metrics",
               "may read all that a teacher says", "backward computes", "does not ask for the weights")  # fmt: skip
    assert all(any(reason in line for reason in reasons) for line in skipped) and " xfailed" not in done.stdout


TRIAL = """
import json, sys
import luthier

rows = [{"prompt": f"What is {i}?", "completion": f"{i % 7}."} for i in range(16)]
common = {"model": "demo", "data": rows, "global_batch_size": 4, "max_steps": 4, "save_steps": 2, "memory_check": False}
halting = True


class Halt:
    @luthier.event
    def step_started(self, step):
        if halting and step == 4:
            raise KeyboardInterrupt


pairs = [{"prompt": f"What is {i}?", "chosen": f"{i % 7}.", "rejected": "No."} for i in range(16)]


def tried(kind, folder):
    global halting
    own = {"loss": "sample-pairs", "data": pairs} if kind == "pairs" else {kind: f"sample-{kind}"}
    settings = {**common, **own}
    if kind == "trainer":
        del settings["global_batch_size"], settings["memory_check"]
    if kind in ("operation", "exporter", "metric", "penalty", "benchmark", "engine"):
        del settings[kind]
    if kind == "metric":
        settings |= {"metrics": ["sample-metric"], "eval_data": rows[:4], "max_eval_answers": 2}
    if kind == "penalty":
        settings["penalties"] = ["sample-penalty"]
    if kind == "quantizer":
        settings["adapter"] = "sample-adapter"
    watchers = ["sample-callback"] if settings.pop("callback", None) else []
    straight = luthier.train(**settings, exact_callbacks=watchers, output_dir=f"{folder}/straight")
    halting = True
    try:
        luthier.train(**settings, exact_callbacks=[*watchers, Halt()], output_dir=f"{folder}/halted")
    except KeyboardInterrupt:
        halting = False
    resumed = luthier.train(**settings, exact_callbacks=[*watchers, Halt()], output_dir=f"{folder}/halted")
    if kind == "operation":
        decisions = json.loads((resumed.output_path / "run.json").read_text())["decisions"]
        assert any("swiglu: sample-operation" in one for one in decisions["kernels"]["value"])
    if kind == "exporter":
        assert luthier.export(resumed.output_path, "sample-exporter").files["weights.npz"]
    if kind == "benchmark":
        found = luthier.evaluate(resumed.output_path, tasks=["digits"], benchmark="sample-benchmark").metrics
        assert 0.0 <= found["digits/accuracy"].value <= 1.0
    if kind == "engine":
        path = f"{folder}/held_out.jsonl"
        with open(path, "w") as file:
            for row in rows[:4]:
                print(json.dumps(row), file=file)
        found = luthier.evaluate(resumed.output_path, path, metrics=["sample-metric"], engine="sample-engine")
        assert (found.engine, found.rows) == ("a mirror of words", 4)
    if kind == "metric":
        assert 0.0 <= resumed.eval_metrics["eval_sample-metric"] <= 1.0
    return [straight.loss_history, resumed.loss_history, resumed.generate("What is 2?", max_new_tokens=3)]


print(json.dumps({kind: tried(kind, f"{sys.argv[1]}/{kind}") for kind in sys.argv[2:]}))
"""


def test_an_untouched_part_of_each_kind_trains_is_resumed_and_generated_from(site, tmp_path):
    _, target = site
    done = subprocess.run(
        [sys.executable, "-c", TRIAL, tmp_path, *TRAINING, "pairs"],
        check=False, env=os.environ | {"PYTHONPATH": str(target)}, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == {*TRAINING, "pairs"}
    for kind, (straight, resumed, answer) in found.items():
        assert straight == resumed and len(straight) == 4, kind
        assert isinstance(answer, str)


def test_what_is_installed_is_the_module_alone(site):
    _, target = site
    installed = {p.name for p in target.iterdir() if not p.name.endswith(".dist-info")}
    assert installed == {f"luthier_sample_{kind}" for kind in (*KINDS, "pairs")}
