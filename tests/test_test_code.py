"""How tests are written: they replace no function of ours, pin no sentence of an error, and assert something."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("tests", "core/tests", "kernels/tests", "plugins/*/tests", "contrib/*/tests")
ERRORS = ("LuthierError", "ProviderError")
SENTENCE = re.compile(r"[A-Za-z]{2,},? [A-Za-z]{2,}")  # two words in a row
LONGER = re.compile(r"(?:[A-Za-z]{2,},? ){2}[A-Za-z]{2,}")  # of a tuple of facts: `adapter record` is a place
CONSTANT = re.compile(r"_?[A-Z][A-Z0-9_]*")  # a size or a path may be another one in a test; a function may not
PATCHES = ("setattr", "delattr")
SELF_ASSERTING = ("raises", "warns", "fail", "expect_error", "raise_inside", "check", "opcheck")


def read_tests():
    paths = [path for folder in FOLDERS for path in sorted(ROOT.glob(f"{folder}/**/*.py"))]
    return {path: ast.parse(path.read_text("utf-8")) for path in [*paths, *sorted(ROOT.glob("**/conftest.py"))]}


@pytest.fixture(scope="module")
def trees():
    return read_tests()


@functools.cache
def own_imports(module):
    """The names that a module of Luthier imports, with what each stands for; None where there is no such module."""
    package, _, rest = module.partition(".")
    for source in ROOT.glob(f"*/src/{package}"), ROOT.glob(f"*/*/src/{package}"):
        for folder in source:
            place = folder / rest.replace(".", "/")
            for path in (place.with_suffix(".py"), place / "__init__.py"):
                if path.is_file():
                    return imported(ast.parse(path.read_text("utf-8")))
    return None


def imported(tree):
    """Each name that a file imports, with the dotted path of what it stands for."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Import):
            names |= {name.asname or name.name.partition(".")[0]: name.asname and name.name or name.name.partition(".")[0]
                      for name in node.names}  # fmt: skip
    return names


def resolve(node, names):
    """The dotted path of an expression such as `module.part`; of `build.shutil` it is `shutil`. None: not known."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = resolve(node.value, names)
        return None if owner is None else (own_imports(owner) or {}).get(node.attr, f"{owner}.{node.attr}")
    return None


def replaced_functions(tree):
    """`line target` of each function, method or class of ours that a test file replaces."""
    names = imported(tree)
    for node in ast.walk(tree):
        targets = []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in PATCHES:
            targets = [_patched(node, names)]
        elif isinstance(node, ast.Call) and (resolve(node.func, names) or "").startswith("unittest.mock."):
            targets = ["luthier mock"]
        elif isinstance(node, ast.Assign):
            targets = [resolve(t, names) for t in node.targets if isinstance(t, ast.Attribute)]
        for target in targets:
            if target and re.match(r"luthier\b|luthier_", target) and not CONSTANT.fullmatch(target.rpartition(".")[2]):
                yield f"{node.lineno} {target}"


def _patched(call, names):
    """The dotted path that `monkeypatch.setattr` replaces; of `type(part)` it is not known, and taken for ours."""
    first, *rest = call.args
    if isinstance(first, ast.Call) and ast.unparse(first.func) == "type":
        return f"luthier {ast.unparse(first)}"
    owner = resolve(first, names)
    if isinstance(first, ast.Constant) or owner is None or not rest or not isinstance(rest[0], ast.Constant):
        return owner
    return (own_imports(owner) or {}).get(rest[0].value, f"{owner}.{rest[0].value}")


def texts(node):
    """The literal texts of an expression, a placeholder between the parts of an f-string."""
    if isinstance(node, ast.JoinedStr):
        return ["".join(part.value if isinstance(part, ast.Constant) else "0" for part in node.values)]
    return [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def pinned_sentences(tree):
    """`line text` of each sentence that stands for an error of ours: in `match=`, a fact, its text, or a table."""
    tables = {ast.unparse(n.targets[0]): n.value for n in tree.body if isinstance(n, ast.Assign)}
    for function in functions_of(tree):
        yield from table_sentences(function, tables)
    for node in ast.walk(tree):
        for text in _pinned(node):
            if SENTENCE.search(text.replace("pip install ", "")):
                yield f"{node.lineno} {text}"


def _pinned(node):
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func).rpartition(".")[2]
        if name == "expect_error":
            return [text for argument in node.args[2:] for text in texts(argument)]
        if name == "raises" and node.args and ast.unparse(node.args[0]).rpartition(".")[2] in ERRORS:
            return [text for keyword in node.keywords if keyword.arg == "match" for text in texts(keyword.value)]
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and _is_error_text(node.comparators[0]):
        return texts(node.left)
    return []


def table_sentences(function, tables):
    """`line text` of each sentence in a column of `parametrize` that the test compares with an error of ours.

    `tables` are the values of the file's constants, by their names.
    """
    columns = {}
    for decorator in function.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).endswith("parametrize"):
            names, rows = decorator.args[:2]
            columns |= _columns(names, tables.get(ast.unparse(rows), rows))
    compared = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "raises" and node.args:
            is_ours = ast.unparse(node.args[0]).rpartition(".")[2] in ERRORS
            compared |= {name for k in node.keywords if is_ours and k.arg == "match" for name in _names(k.value)}
        elif isinstance(node, ast.Compare) and _is_error_text(node.comparators[0]):
            compared |= _names(node.left)
        elif isinstance(node, ast.comprehension) and isinstance(node.iter, ast.Name):
            compared.add(node.iter.id)
    for name in compared & set(columns):
        for cell in columns[name]:
            pattern = LONGER if isinstance(cell, ast.Tuple) else SENTENCE
            yield from (f"{cell.lineno} {text}" for text in texts(cell) if pattern.search(text))


def _columns(names, rows):
    """The cells of a table of `parametrize` by the names of its columns; none where it is made elsewhere."""
    names = [name.strip() for name in (texts(names)[0].split(",") if isinstance(names, ast.Constant) else texts(names))]
    cells = {name: [] for name in names}
    for row in rows.elts if isinstance(rows, (ast.List, ast.Tuple)) else []:
        parts = row.args if isinstance(row, ast.Call) else [row] if len(names) == 1 else getattr(row, "elts", [])
        for name, cell in zip(names, parts, strict=False):
            cells[name].append(cell)
    return cells


def _names(node):
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def _is_error_text(node):
    """`str(caught.value)` or `error.problem`."""
    source = ast.unparse(node)
    return source.endswith(".problem") or bool(re.fullmatch(r"str\((\w+\.value|error)\)", source))


def functions_of(tree):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def is_asserting(function):
    """A function asserts by itself."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            if name in SELF_ASSERTING or name.startswith("assert_"):
                return True
    return False


def silent_tests(trees):
    """`path:line name` of each test that asserts nothing, and calls no function of the test folders that does."""
    known = {path: {f.name: f for f in functions_of(tree)} for path, tree in trees.items()}
    modules = {path.stem: path for path in trees if path.stem != "conftest"}
    fixtures = {name: path for path in trees if path.stem == "conftest" for name in known[path]}

    def asserts(path, function, seen=frozenset()):
        if is_asserting(function):
            return True
        names = imported(trees[path])
        for node in ast.walk(function):
            if not isinstance(node, ast.Name) or (path, node.id) in seen:
                continue
            home, name = path, node.id
            if name not in known[path]:
                module, _, own = names.get(name, "").rpartition(".")
                home, name = (modules.get(module), own) if module else (fixtures.get(name), name)
            helper = known.get(home, {}).get(name)
            if helper is not None and asserts(home, helper, seen | {(path, node.id)}):
                return True
        return False

    for path, tree in trees.items():
        for function in functions_of(tree):
            if function.name.startswith("test_") and not asserts(path, function):
                yield f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"


def test_no_test_replaces_a_function_of_ours(trees):
    assert [f"{path}:{found}" for path, tree in trees.items() for found in replaced_functions(tree)] == []


def test_no_test_pins_the_sentence_of_an_error(trees):
    assert [f"{path}:{found}" for path, tree in trees.items() for found in pinned_sentences(tree)] == []


def test_every_test_asserts_something(trees):
    assert list(silent_tests(trees)) == []


REPLACING = """
import torch, unittest.mock
from luthier.data import cache
from luthier.plugins import catalogue
from luthier_kernels.native import build
def test_one(monkeypatch, part):
    monkeypatch.setattr(catalogue, "read_catalogue", dict)
    monkeypatch.setattr("luthier.model.load.load_model", None)
    monkeypatch.setattr(type(part), "save", None)
    catalogue.distribution_of = None
    with unittest.mock.patch("torch.compile"):
        part.name = "other"
    monkeypatch.setattr(cache, "SMALLEST", 3)
    monkeypatch.setattr(torch, "compile", None)
    monkeypatch.setattr(build.shutil, "which", None)
"""
PINNING = """
def test_one(error, name):
    with pytest.raises(LuthierError, match="is not there"):
        act()
    with expect_error("data-row", "data[0]", "broken row"):
        act()
    assert "no such role" in str(caught.value) and f"{name} is missing" in error.problem
    with expect_error("data-row", "data[0]: message 1", "'role'", name), pytest.raises(ValueError, match="no such file"):
        act()
    assert "pip install luthier" in error.remedy and "two words" in page
"""
TABLE = """
CASES = [({"a b c": 1}, "of its own"), ({}, ("lora.r", "'x'")), ({}, "lora.r")]
@pytest.mark.parametrize(("given", "says"), CASES)
def test_two(given, says):
    with pytest.raises(LuthierError, match=says):
        act(given)
"""
SILENT = """
def same(a, b):
    assert a == b
def through(a, b):
    same(a, b)
def plain(a):
    return a
def test_silent(): plain(1)
def test_by_a_helper(): through(1, 1)
def test_by_an_error():
    with pytest.raises(ValueError): plain(1)
def test_by_the_kit(check): check()
def test_by_torch(): torch.testing.assert_close(1, 1)
"""


def test_planted_offenders_are_found():
    replaced = [line.partition(" ")[0] for line in replaced_functions(ast.parse(REPLACING))]
    assert sorted(replaced, key=int) == ["7", "8", "9", "10", "11"]
    pinned = [line.partition(" ")[2] for line in pinned_sentences(ast.parse(PINNING))]
    assert set(pinned) == {"is not there", "broken row", "no such role", "0 is missing"}
    assert list(pinned_sentences(ast.parse(TABLE))) == ["2 of its own"]
    path = ROOT / "tests/test_planted.py"
    assert list(silent_tests({path: ast.parse(SILENT)})) == ["tests/test_planted.py:8 test_silent"]
