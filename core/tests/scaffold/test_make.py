"""What `make_package` writes and what it refuses, without installing anything."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier import LuthierError, scaffold
from luthier.plugins import catalogue
from luthier.plugins.records import RECORDS
from luthier.plugins.registry import installed_plugins
from luthier.scaffold import make_package, render
from luthier.testing import expect_error

KINDS = ("adapter", "loss", "optimizer", "quantizer", "callback", "provider", "operation", "exporter", "metric",
         "penalty", "trainer", "benchmark", "engine")  # fmt: skip
PUBLIC = {"luthier", "luthier.testing"}


def test_a_loss_over_pairs_has_its_own_templates(tmp_path):
    root = make_package("warm-up", "loss", tmp_path, "preference")
    assert 'data = "preference"' in (root / "src/luthier_warm_up/loss.py").read_text()
    for path, text in render("a" * scaffold.LONGEST, "loss", "preference").items():
        assert "$" not in text and text.endswith("\n"), path
        if path.endswith(".py"):
            compile(text, path, "exec")
            assert max(map(len, text.splitlines())) <= 120, path


@pytest.mark.parametrize(("kind", "data"), [("adapter", "preference"), ("loss", "documents"), ("loss", "prefrence")])
def test_rows_that_no_beginning_takes_are_refused(tmp_path, kind, data):
    with pytest.raises(LuthierError, match="rows") as refused:
        make_package("warm-up", kind, tmp_path, data)
    assert refused.value.code == "part-unsupported"
    assert not any(tmp_path.iterdir())


def python_files(files):
    return {path: ast.parse(text) for path, text in files.items() if path.endswith(".py")}


def imported(tree):
    """(module, name) of every import of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)


def test_every_kind_of_part_has_a_beginning():
    assert set(KINDS) == set(RECORDS)


@pytest.mark.parametrize("kind", KINDS)
def test_it_writes_exactly_these_files(tmp_path, kind):
    root = make_package("warm-up", kind, tmp_path)
    assert root == tmp_path / "luthier-warm-up"
    assert {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()} == {
        ".gitignore",
        "README.md",
        "pyproject.toml",
        "src/luthier_warm_up/__init__.py",
        f"src/luthier_warm_up/{kind}.py",
        "tests/test_warm_up.py",
    }


@pytest.mark.parametrize("kind", KINDS)
def test_metadata_names_distribution_entry_point_and_module(kind):
    project = tomllib.loads(render("warm-up", kind)["pyproject.toml"])
    assert project["project"]["name"] == "luthier-warm-up"
    assert project["project"]["entry-points"]["luthier"] == {"warm-up": "luthier_warm_up"}
    assert project["tool"]["flit"]["module"]["name"] == "luthier_warm_up"


@pytest.mark.parametrize("kind", KINDS)
def test_dependencies_are_what_the_source_imports(kind):
    files = render("warmth", kind)
    declared = {re.split(r"[\[>]", d)[0] for d in tomllib.loads(files["pyproject.toml"])["project"]["dependencies"]}
    source = {path: tree for path, tree in python_files(files).items() if path.startswith("src/")}
    roots = {module.split(".")[0] for tree in source.values() for module, _ in imported(tree)}
    libraries = {"attrs", "luthier", "numpy", "torch", "safetensors"}
    assert roots & libraries == declared
    assert roots <= libraries | {"luthier_warmth"} | set(__import__("sys").stdlib_module_names)


@pytest.mark.parametrize("kind", KINDS)
def test_the_entry_module_imports_nothing_heavy_and_only_public_names(kind):
    import luthier

    for path, tree in python_files(render("warmth", kind)).items():
        names = list(imported(tree))
        if path.endswith("__init__.py"):
            assert not {m.split(".")[0] for m, _ in names} & {"torch", "safetensors", "transformers"}
        ours = {(m, n) for m, n in names if m == "luthier" or m.startswith("luthier.")}
        assert {m for m, _ in ours} <= PUBLIC
        assert all(n in luthier.__all__ for m, n in ours if m == "luthier")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["w", "a" * scaffold.LONGEST, "a-b-c-d-e-f-g-h-i-j-k-l9"])
def test_no_placeholder_is_left_and_lines_stay_within_120_columns(kind, name):
    for path, text in render(name, kind).items():
        assert "$" not in text, path
        assert text.endswith("\n") and not text.endswith("\n\n"), path
        if path.endswith(".py"):
            assert max(map(len, text.splitlines())) <= 120, path


@settings(max_examples=20, deadline=None)
@given(name=st.from_regex(scaffold.NAME, fullmatch=True).filter(lambda n: len(n) <= 24), kind=st.sampled_from(KINDS))
def test_any_name_that_is_accepted_gives_modules_that_compile(name, kind):
    try:
        scaffold._check_name(name, kind)
    except LuthierError as error:
        assert error.code == "plugin-name"
        return
    for path, text in render(name, kind).items():
        if path.endswith(".py"):
            compile(text, path, "exec")


@pytest.mark.parametrize("kind", KINDS)
def test_names_that_the_templates_use_are_never_an_options_class(kind):
    for tree in python_files(render("warmth", kind)).values():
        defined = {n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
        used = {name for _, name in imported(tree) if name} | defined
        clashing = {n for n in used if n[0].isupper() and not n.startswith("Warmth") and n.isidentifier()}
        reachable = {n for n in clashing if n != n.upper()}  # of one capital letter or more, as a class name has
        assert reachable <= scaffold.TAKEN


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("Warmth", "'warmth'"),
        ("warm_up", "'warm-up'"),
        ("warm up", "'warm-up'"),
        ("warm--up", "'warm-up'"),
        ("-warm", "'warm'"),
        ("", "Begin with a letter"),
        ("8bit", "Begin with a letter"),
        ("../evil", "'evil'"),
        ("w" * 25, "'" + "w" * 24 + "'"),
        ("wärme", "'w-rme'"),
        ("luthier-warmth", "'warmth'"),
    ],
)
def test_a_bad_name_is_refused_with_one_that_would_do(tmp_path, name, remedy):
    with pytest.raises(LuthierError) as caught:
        make_package(name, "loss", tmp_path)
    assert caught.value.code == "plugin-name" and remedy in caught.value.remedy
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["none", "true", "path", "loss-record", "loss-output", "any"])
def test_a_name_whose_class_means_something_else_is_refused(tmp_path, name):
    with expect_error("plugin-name") as caught:
        make_package(name, "loss", tmp_path)
    assert caught.value.code == "plugin-name"


def test_the_name_of_a_part_that_is_there_is_refused_with_its_owner(tmp_path):
    with expect_error("plugin-name", None, "'sft'"):
        make_package("sft", "loss", tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_name_of_an_installed_distribution_is_refused_for_every_kind(tmp_path, kind):
    taken = [
        o.source.distribution for o in installed_plugins().offers() if o.source.distribution.startswith("luthier-")
    ]
    for distribution in taken:
        with expect_error("plugin-name", None, distribution):
            make_package(distribution.removeprefix("luthier-"), kind, tmp_path)
    assert taken and not list(tmp_path.iterdir())


def test_no_name_of_a_first_party_part_or_distribution_is_given_away(tmp_path):
    for kind, parts in catalogue.read_catalogue().items():
        for name, distribution in parts.items():
            for wanted in (name, distribution.removeprefix("luthier-")):
                with pytest.raises(LuthierError) as caught:
                    make_package(wanted, kind, tmp_path)
                assert caught.value.code == "plugin-name"
    assert not list(tmp_path.iterdir())


def test_a_part_of_another_kind_may_have_the_name(tmp_path):
    assert make_package("sft", "callback", tmp_path).is_dir()


def test_an_existing_folder_is_left_as_it_is(tmp_path):
    root = make_package("warmth", "loss", tmp_path)
    (root / "README.md").write_text("mine")
    with expect_error("plugin-name", "luthier-warmth") as caught:
        make_package("warmth", "adapter", tmp_path)
    assert (caught.value.code, caught.value.where) == ("plugin-name", str(root))
    assert (root / "README.md").read_text() == "mine"


def test_missing_parents_of_the_folder_are_made(tmp_path):
    assert make_package("warmth", "loss", tmp_path / "a" / "b").parent == tmp_path / "a" / "b"


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LuthierError) as caught:
        make_package("warmth", "loss", tmp_path / "file")
    assert caught.value.code == "path-unwritable"


def test_an_unknown_kind_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(LuthierError, match="adapter") as caught:
        make_package("warmth", "adaptor", tmp_path)
    assert caught.value.code == "part-unknown"


def test_every_template_is_used():
    folder = Path(scaffold.__file__).parent / "templates"
    there = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    kinds = (*KINDS, "loss-preference")
    own = {f"{kind}/{name}" for kind in kinds for name in ("about.md.txt", "init.py.txt", "part.py.txt")}
    assert there == own | set(scaffold.COMMON.values()) | {"provider/test.py.txt"}
