"""The rules of the sources: who imports whom, what stays light, and what is never written."""

import ast
import functools
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import luthier
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "core"
OTHERS = sorted(
    path.parent for pattern in ("plugins/*", "contrib/*", "kernels") for path in ROOT.glob(f"{pattern}/pyproject.toml")
)
MEMBERS = [CORE, *OTHERS]
HEAVY = ("torch", "transformers", "datasets", "safetensors", "numpy", "peft", "trl", "accelerate", "bitsandbytes", "wandb",
         "mlflow", "tensorboard", "matplotlib", "pandas", "pyarrow", "huggingface_hub", "tokenizers")  # fmt: skip
LIGHT = ("luthier", "luthier.api", "luthier.plugins.on", "luthier.logs", "luthier.builtin", "luthier.recipe", "luthier.plugins",
         "luthier.cli", "luthier.scaffold", "luthier.testing", "luthier.data.read.sources")  # fmt: skip


def sources(member):
    return sorted((member / "src").rglob("*.py"))


def project(member):
    return tomllib.loads((member / "pyproject.toml").read_text("utf-8"))


def own_module(member):
    return project(member)["tool"]["flit"]["module"]["name"]


@functools.cache
def tree_of(path):
    """The syntax tree of a file, which several rules look at."""
    return ast.parse(path.read_text("utf-8"))


@functools.cache
def package_owners():
    """The distributions that provide each package that is installed."""
    return importlib.metadata.packages_distributions()


def imported(path):
    """(module, name or None) for each import of a file, relative ones left out; `importlib.import_module` counts."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from ((argument.value, None) for argument in node.args[:1] if isinstance(argument, ast.Constant))


def members():
    return pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)


def test_the_core_imports_no_plugin():
    taken = {own_module(member) for member in OTHERS} | {"luthier_kernels"}
    found = [
        f"{path}: {name}" for path in sources(CORE) for name, _ in imported(path) if name.partition(".")[0] in taken
    ]
    assert found == []


@pytest.mark.parametrize("member", OTHERS, ids=lambda member: member.name)
def test_a_plugin_imports_only_public_names_of_the_core_and_no_other_plugin(member):
    wrong = []
    for path in sources(member):
        for module, name in imported(path):
            package = module.partition(".")[0]
            if package == "luthier" and not _is_public(module, name):
                wrong.append(f"{path}: {module} {name}")
            if package.startswith("luthier_") and package not in (own_module(member), "luthier_kernels"):
                wrong.append(f"{path}: {module}")
    assert wrong == []


@pytest.mark.parametrize("member", OTHERS, ids=lambda path: path.name)
def test_a_plugin_logs_only_through_the_library(member):
    """A logger of structlog's own would print to standard output, at any level, and not into the run's log."""
    assert {path.name for path in sources(member) for module, _ in imported(path) if module == "structlog"} == set()


def _is_public(module, name):
    if module == "luthier":
        return name is None or name in luthier.__all__
    return module == "luthier.testing" or module.startswith("luthier.testing.")


NEVER_REQUIRED = {"flash_attn", "IPython", "pandas"}  # used where they are, and their absence is no error


@members()
def test_what_a_member_imports_is_among_its_dependencies(member):
    meta = project(member)["project"]
    groups = [meta["dependencies"], *meta.get("optional-dependencies", {}).values()]
    declared = {Requirement(text).name.lower().replace("_", "-") for group in groups for text in group}
    owners = package_owners()
    missing = set()
    for path in sources(member):
        for package in {module.partition(".")[0] for module, _ in imported(path)}:
            if package in sys.stdlib_module_names or package in (own_module(member), "luthier"):
                continue
            if package in NEVER_REQUIRED:
                continue
            if not declared & {owner.lower().replace("_", "-") for owner in owners.get(package, [package])}:
                missing.add(package)
    assert missing == set()


FLOORS = (  # from the top; a room imports from the floors below its own, and from its neighbours without a circle
    ("__main__", "cli", "testing"),
    ("api", "artifact_api", "luthier"),
    ("training",),
    ("artifacts", "checkpoint", "health", "memory"),  # none of them knows another
    ("step",),
    ("builtin", "distributed"),
    ("model",),
    ("precision",),
    ("jobs",),
    ("data", "runs"),
    ("recipe", "scaffold"),
    ("plugins", "hardware", "logs", "disk", "state_tree", "peft_files"),
    ("errors", "error_lists", "randomness", "sizes", "timestamp", "torch_operators", "demo"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
APART = ("artifacts", "checkpoint", "health", "memory")


def module_name(path, root=CORE / "src"):
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def room_of(module):
    return module.split(".")[1] if "." in module else module


def import_graph():
    """Each module of the core with the modules of the core that it imports, lazily or for types alone too."""
    modules = {module_name(path): path for path in sources(CORE)}
    graph = {}
    for module, path in modules.items():
        named = [(f"{source}.{name}", source) for source, name in imported(path)]
        graph[module] = {next(m for m in pair if m in modules) for pair in named if set(pair) & set(modules)}
    return graph


def room_graph(graph):
    rooms = {room_of(module): set() for module in graph}
    for module, targets in graph.items():
        rooms[room_of(module)] |= {room_of(target) for target in targets} - {room_of(module)}
    return rooms


def upward(graph):
    """The arrows that run up, or between two of the rooms that stand apart."""
    arrows = [(a, b) for a, targets in graph.items() for b in targets if room_of(a) != room_of(b)]
    return [
        f"{a} imports {b}"
        for a, b in arrows
        if FLOOR[room_of(a)] > FLOOR[room_of(b)] or {room_of(a), room_of(b)} <= set(APART)
    ]


def circles(graph):
    """Sets of nodes that reach each other."""
    reached = {node: set(targets) for node, targets in graph.items()}
    for middle in graph:
        for node, targets in reached.items():
            if middle in targets:
                reached[node] = targets | reached[middle]
    found = {frozenset(n for n in graph if n in reached[m] and m in reached[n]) for m in graph if m in reached[m]}
    return [sorted(circle) for circle in found if len(circle) > 1]


def test_each_room_of_the_core_stands_on_a_floor_and_none_of_it_is_empty():
    assert set(room_graph(import_graph())) == set(FLOOR)


def test_no_import_of_the_core_runs_up():
    assert upward(import_graph()) == []


def test_no_imports_of_the_core_run_in_a_circle():
    graph = import_graph()
    assert circles(graph) == []
    assert circles(room_graph(graph)) == []


def test_a_planted_arrow_up_and_a_planted_circle_are_found():
    graph = import_graph()
    graph["luthier.disk"] = {*graph["luthier.disk"], "luthier.runs.run_folder"}
    assert upward(graph) == ["luthier.disk imports luthier.runs.run_folder"]
    graph = {**import_graph(), "luthier.health.watch": {"luthier.memory.fit"}}
    assert upward(graph) == ["luthier.health.watch imports luthier.memory.fit"]
    graph = {**import_graph(), "luthier.errors": {"luthier.sizes"}, "luthier.sizes": {"luthier.errors"}}
    assert circles(graph) == circles({"luthier.errors": {"luthier.sizes"}, "luthier.sizes": {"luthier.errors"}})


def file_lengths():
    """The lines of each file of the core."""
    return {path: path.read_text("utf-8").count("\n") for path in sources(CORE)}


def crowded_folders(lengths):
    """Folders of more than 15 files."""
    counts = Counter(str(path.parent.relative_to(CORE)) for path in lengths)
    return {folder: count for folder, count in counts.items() if count > 15}


def large_rooms(lengths):
    """Rooms of more than 16 % of all lines, their subfolders counted."""
    lines = Counter()
    for path, length in lengths.items():
        lines[room_of(module_name(path))] += length
    return {room: count for room, count in lines.items() if count > 0.16 * lines.total()}


def repeated_stems(lengths):
    counts = Counter(path.stem for path in lengths if path.stem != "__init__")
    return [stem for stem, count in counts.items() if count > 1]


def test_a_folder_of_the_core_holds_at_most_15_files():
    assert crowded_folders(file_lengths()) == {}


def test_a_room_of_the_core_holds_at_most_16_percent_of_it():
    assert large_rooms(file_lengths()) == {}


def test_no_name_of_a_file_stands_twice_in_the_core():
    assert repeated_stems(file_lengths()) == []


def test_a_planted_crowd_a_planted_hall_and_a_planted_second_name_are_found():
    lengths, room = file_lengths(), CORE / "src/luthier/health"
    crowd = {room / f"planted_{number}.py": 1 for number in range(16)}
    assert list(crowded_folders(lengths | crowd)) == ["src/luthier/health"]
    assert list(large_rooms(lengths | {room / "deep/planted.py": sum(lengths.values())})) == ["health"]
    assert repeated_stems(lengths | {room / "disk.py": 1}) == ["disk"]


def entry_modules():
    """The module that each plugin's entry point names."""
    points = [project(member)["project"].get("entry-points", {}).get("luthier", {}) for member in OTHERS]
    return [module for found in points for module in found.values()]


def test_recipes_plugins_the_command_line_and_entry_modules_load_nothing_heavy():
    light = [*LIGHT, *entry_modules()]
    every = [
        ".".join(p.relative_to(CORE / "src").with_suffix("").parts).removesuffix(".__init__") for p in sources(CORE)
    ]
    light += [
        m for m in every if m.startswith(("luthier.recipe.", "luthier.plugins.", "luthier.cli.", "luthier.jobs."))
    ]
    script = f"import importlib, sys\nfor m in {light!r}: importlib.import_module(m)\nprint(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert {name for name in loaded if name.partition(".")[0] in HEAVY} == set()


def test_help_and_listing_load_nothing_heavy_either():
    script = "import sys\nfrom luthier.cli import main\ntry:\n main()\nfinally:\n print(*sys.modules, file=sys.stderr)"
    for words in (["--help"], ["plugins", "--json"], ["train", "--help"], ["plugins", "show", "adapter", "lora"]):
        done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
        loaded = done.stderr.split()
        assert {name for name in loaded if name.partition(".")[0] in HEAVY} == set(), words


def functions(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


@members()
def test_no_file_is_longer_than_300_lines_and_no_function_than_30(member):
    files = {path: path.read_text("utf-8").count("\n") for path in sources(member)}
    assert {str(path): lines for path, lines in files.items() if lines > 300} == {}
    found = {f"{path}:{node.lineno} {node.name}": node for path in files for node in functions(path)}
    lengths = {name: node.end_lineno - node.lineno + 1 for name, node in found.items()}
    assert {name: lines for name, lines in lengths.items() if lines > 30} == {}


def test_every_file_of_tests_holds_tests_and_is_no_longer_than_400_lines():
    folders = (ROOT / "tests", *(path for path in ROOT.glob("*/tests")), *ROOT.glob("*/*/tests"))
    texts = {path: path.read_text("utf-8") for folder in folders for path in folder.rglob("*.py")}
    assert len(texts) > 300
    assert {str(path.relative_to(ROOT)): n for path, text in texts.items() if (n := text.count("\n")) > 400} == {}
    named = {path: text for path, text in texts.items() if path.name.startswith("test_")}
    assert [str(path.relative_to(ROOT)) for path, text in named.items() if "def test_" not in text] == []


@members()
def test_every_function_is_annotated(member):
    bare = []
    for path in sources(member):
        for node in functions(path):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
            untyped = [
                a.arg for a in given if a is not None and a.annotation is None and a.arg not in ("self", "cls", "_")
            ]
            if untyped or (node.returns is None and node.name != "__init__"):
                bare.append(f"{path}:{node.lineno} {node.name} {untyped}")
    assert bare == []


@members()
def test_every_module_says_in_a_sentence_what_it_is_for(member):
    undescribed = [str(path) for path in sources(member) if not ast.get_docstring(tree_of(path))]
    assert undescribed == []


PICKLES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def called(path):
    """(name, keywords) of each call in a file."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


@members()
def test_nothing_is_unpickled(member):
    found = [
        str(path) for path in sources(member) if PICKLES & {module.partition(".")[0] for module, _ in imported(path)}
    ]
    assert found == []
    assert [
        str(path) for path in sources(member) for name, _ in called(path) if name in ("torch.load", "torch.save")
    ] == []


@members()
def test_a_models_own_code_is_never_run(member):
    allowed = [
        f"{p}: {name}" for p in sources(member) for name, given in called(p) if given.get("trust_remote_code") == "True"
    ]
    assert allowed == []


@members()
def test_what_loads_from_a_hub_refuses_the_models_own_code_in_so_many_words(member):
    loading = ("AutoTokenizer.from_pretrained", "AutoModelForCausalLM.from_pretrained", "AutoConfig.from_pretrained")
    silent = []
    for path in sources(member):
        for name, given in called(path):
            if name.endswith(loading) and given.get("trust_remote_code") != "False":
                silent.append(f"{path}: {name}")
    assert silent == []


FORBIDDEN = {
    "an unfinished place": re.compile(r"\b(TODO|FIXME|XXX)\b|raise NotImplementedError"),
    "a path of one machine": re.compile(r"\.\./shared|/work/|/home/|/root/"),
}


@members()
@pytest.mark.parametrize("what", FORBIDDEN)
def test_the_sources_hold_none_of(member, what):
    files = [p for p in (member / "src").rglob("*") if p.suffix in (".py", ".txt", ".yaml", ".json", ".md", ".toml")]
    lines = [
        (path, number, line) for path in files for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
    ]
    assert [f"{path}:{number}: {line.strip()}" for path, number, line in lines if FORBIDDEN[what].search(line)] == []
