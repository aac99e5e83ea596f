"""The names of the core: what one module calls of another has a verb and an object, and stands once."""

import ast
from collections import Counter
from pathlib import Path

import luthier
import pytest

ROOT = Path(__file__).resolve().parents[1] / "core" / "src"
PRESCRIBED = {"main"}  # the console script's
SHARE = 0.70  # of the names, at least, have two words


def read_modules(root=ROOT):
    """The syntax tree of each module of the core, by its name."""
    paths = sorted((root / "luthier").rglob("*.py"))
    names = [".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for p in paths]
    return {name: ast.parse(path.read_text("utf-8")) for name, path in zip(names, paths, strict=True)}


def public_functions(tree):
    functions = (node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    return {node.name: node for node in functions if not node.name.startswith("_")}


def imported_names(tree):
    """The (module, function) pairs that a module imports, or reaches through a module that it imports."""
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            for name in node.names:
                aliases[name.asname or name.name] = f"{node.module}.{name.name}"
                yield node.module, name.name
        elif isinstance(node, ast.Import):
            aliases |= {name.asname: name.name for name in node.names if name.asname}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            yield aliases.get(owner, owner), node.attr


def command_names(modules):
    """Functions of `cli` that typer calls: decorated with an app's `command`, or given to it."""
    commands = set()
    for module, tree in modules.items():
        if not module.startswith("luthier.cli"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Call) and "command(" in ast.unparse(node.func):
                commands |= {ast.unparse(argument).rpartition(".")[2] for argument in node.args}
            elif isinstance(node, ast.For) and ".command(" in ast.unparse(node.body[0]):
                commands |= {ast.unparse(verb).rpartition(".")[2] for verb in getattr(node.iter, "elts", [])}
            elif isinstance(node, ast.FunctionDef) and any("command" in ast.unparse(d) for d in node.decorator_list):
                commands.add(node.name)
    return commands


def is_exempt(module, node, commands):
    decorators = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
    return (
        node.name in luthier.__all__
        or node.name in PRESCRIBED
        or "hookimpl" in decorators
        or "hookspec" in decorators
        or (module.startswith("luthier.cli") and node.name in commands)
    )


def shared_functions(modules):
    """The (module, name) of each public function that another module of the core imports and that we name ourselves."""
    functions = {module: public_functions(tree) for module, tree in modules.items()}
    imported = {
        (owner, name)
        for module, tree in modules.items()
        for owner, name in imported_names(tree)
        if owner != module and name in functions.get(owner, ())
    }
    commands = command_names(modules)
    return sorted(pair for pair in imported if not is_exempt(pair[0], functions[pair[0]][pair[1]], commands))


def one_word_names(shared):
    return [f"{module}.{name}" for module, name in shared if "_" not in name]


def repeated_names(shared):
    counts = Counter(name for _, name in shared)
    return [f"{module}.{name}" for module, name in shared if counts[name] > 1]


@pytest.fixture(scope="module")
def modules():
    return read_modules()


def plant(modules, module, source):
    """The modules with one more, and with one that imports all of its functions."""
    tree = ast.parse(source)
    user = "\n".join(f"from {module} import {name}" for name in public_functions(tree))
    return {**modules, module: tree, "luthier.planted_user": ast.parse(user)}


def test_seventy_percent_of_the_functions_that_modules_share_have_two_words(modules):
    shared = shared_functions(modules)
    short = one_word_names(shared)
    print(f"{len(short)} of {len(shared)} shared functions have one word: {', '.join(short)}")
    assert len(short) <= (1 - SHARE) * len(shared), "\n".join(short)


def test_no_function_that_modules_share_stands_twice(modules):
    assert repeated_names(shared_functions(modules)) == []


def test_planted_functions_of_one_word_are_counted(modules):
    before = one_word_names(shared_functions(modules))
    planted = plant(modules, "luthier.planted", "def settle(): ...\ndef settle_size(): ...\ndef _hidden(): ...\n")
    assert sorted({*one_word_names(shared_functions(planted))} - {*before}) == ["luthier.planted.settle"]


def test_so_many_planted_functions_of_one_word_that_the_share_falls_are_too_many(modules):
    words = "".join(f"def word{number}(): ...\n" for number in range(len(shared_functions(modules))))
    shared = shared_functions(plant(modules, "luthier.planted", words))
    assert len(one_word_names(shared)) > (1 - SHARE) * len(shared)


def test_a_planted_function_that_stands_elsewhere_too_is_found(modules):
    module, name = next(pair for pair in shared_functions(modules) if pair[1] == "choose_device")
    planted = plant(modules, "luthier.planted", f"def {name}(): ...\n")
    assert repeated_names(shared_functions(planted)) == [f"{module}.{name}", f"luthier.planted.{name}"]


def test_a_function_reached_through_its_module_counts_as_shared(modules):
    planted = {
        **modules,
        "luthier.planted": ast.parse("def settle(): ...\n"),
        "luthier.planted_user": ast.parse("from luthier import planted as other\nother.settle()\n"),
    }
    assert "luthier.planted.settle" in one_word_names(shared_functions(planted))


def test_commands_and_public_names_keep_their_one_word(modules):
    names = {name for _, name in shared_functions(modules)}
    assert names.isdisjoint({"train", "merge", "doctor", "demo", "checkpoint", "main"})
