"""The shape of calls: nothing is packed into a dict to be unpacked, and a function has at most seven parameters."""

import ast
from pathlib import Path

import luthier
import pytest

ROOT = Path(__file__).resolve().parents[1]
MOST = 7  # parameters; beyond that a record
FOLDERS = sorted(
    path.parent / "src"
    for pattern in ("core", "kernels", "plugins/*", "contrib/*")
    for path in ROOT.glob(f"{pattern}/pyproject.toml")
)
PRESCRIBED = {  # function -> who prescribes its signature
    "attend_documents": "the attention functions of transformers",
    "add_rms_norm": "the operation of that name, which kernels implement",
    "document_attention": "the operation of that name, which kernels implement",
    "_dequantize": "torch's schema of the operation dequantize_fourbit",
    "_multiply_back": "torch's schema of the operation multiply_ternary_back",
    "_fake_back": "torch's schema of the operation multiply_ternary_back",
}
FIRST = ("self", "cls")


def read_trees():
    return {path: ast.parse(path.read_text("utf-8")) for folder in FOLDERS for path in sorted(folder.rglob("*.py"))}


@pytest.fixture(scope="module")
def trees():
    return read_trees()


def unpacked_literals(tree):
    """The lines of calls with `**{...}`."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [call.lineno for call in calls for k in call.keywords if k.arg is None and isinstance(k.value, ast.Dict)]


def assigned_dicts(function):
    """The names that a function gives to dict literals with something in them."""
    for node in ast.walk(function):
        if not isinstance(node, ast.Assign):
            continue
        for target in node.targets:
            is_pair = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
            pairs = zip(target.elts, node.value.elts, strict=False) if is_pair else [(target, node.value)]
            for name, value in pairs:
                if isinstance(name, ast.Name) and isinstance(value, ast.Dict) and value.keys:
                    yield name.id


def dicts_to_unpack(tree):
    """(line, name) of each dict literal of a function that is only unpacked into one call, and never changed."""
    for function in ast.walk(tree):
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        nodes = list(ast.walk(function))
        for name in set(assigned_dicts(function)):
            uses = [n for n in nodes if isinstance(n, ast.Name) and n.id == name]
            stores = sum(isinstance(use.ctx, ast.Store) for use in uses)
            keywords = [k for n in nodes if isinstance(n, ast.Call) for k in n.keywords if k.arg is None]
            unpacked = sum(isinstance(k.value, ast.Name) and k.value.id == name for k in keywords)
            if stores == 1 and unpacked == 1 and len(uses) == 2:
                yield function.lineno, name


def parameters(function):
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    names += [a.arg for a in (arguments.vararg, arguments.kwarg) if a is not None]
    return names[1:] if names[:1] and names[0] in FIRST else names


def is_prescribed(path, function, owner):
    decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
    bases = [ast.unparse(base) for base in owner.bases] if owner is not None else []
    return (
        (function.name if owner is None else owner.name) in luthier.__all__
        or function.name in PRESCRIBED
        or "cli" in path.parts  # a command's parameters are its flags
        or any(decorator in ("jit", "triton.jit") for decorator in decorators)  # numbers and pointers alone
        or any(base.endswith("autograd.Function") or base == "Function" for base in bases)
    )


def long_signatures(path, tree):
    """`line name` of each function of ours with more than seven parameters."""
    owners = {member: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for member in node.body}
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or len(parameters(node)) <= MOST:
            continue
        if not is_prescribed(path, node, owners.get(node)):
            yield f"{node.lineno} {node.name}"


def test_no_call_unpacks_a_dict_literal(trees):
    assert [f"{path}:{line}" for path, tree in trees.items() for line in unpacked_literals(tree)] == []


def test_no_dict_literal_is_made_only_to_be_unpacked(trees):
    assert [f"{path}:{line} {name}" for path, tree in trees.items() for line, name in dicts_to_unpack(tree)] == []


def test_a_function_has_at_most_seven_parameters(trees):
    assert [f"{path}:{found}" for path, tree in trees.items() for found in long_signatures(path, tree)] == []


def test_each_prescribed_signature_is_there(trees):
    names = {n.name for tree in trees.values() for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    assert set(PRESCRIBED) <= names


PLANTED = ROOT / "core" / "src" / "luthier" / "planted.py"


def test_planted_offenders_are_found():
    assert unpacked_literals(ast.parse("call(1, **{'a': 1})")) == [1]
    assert unpacked_literals(ast.parse("call(1, **settings)\n{**settings, 'a': 1}")) == []
    one = "def work(call):\n    given, rest = {'a': 1}, 2\n    return call(**given)\n"
    assert list(dicts_to_unpack(ast.parse(one))) == [(1, "given")]
    changed = "def work(call):\n    given = {'a': 1}\n    given['b'] = 2\n    return call(**given)\n"
    assert list(dicts_to_unpack(ast.parse(changed))) == []
    long = "def work(a, b, c, d, /, e, f, *, g, h): ...\n"
    assert list(long_signatures(PLANTED, ast.parse(long))) == ["1 work"]
    method = "class Part:\n    def work(self, a, b, c, d, e, f, *rest): ...\n"
    assert list(long_signatures(PLANTED, ast.parse(method))) == []


def test_signatures_that_others_prescribe_are_left_alone():
    kernel = "@triton.jit\ndef kernel(a, b, c, d, e, f, g, h): ...\n"
    assert list(long_signatures(PLANTED, ast.parse(kernel))) == []
    public = "def train(a, b, c, d, e, f, g, h): ...\n"
    assert list(long_signatures(PLANTED, ast.parse(public))) == []
    method = "class Part:\n    def train(self, a, b, c, d, e, f, g, h): ...\n"
    assert list(long_signatures(PLANTED, ast.parse(method))) == ["2 train"]
