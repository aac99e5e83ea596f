"""`luthier schema`: one JSON document, quickly, to the screen or to a file."""

import json
import os
import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "peft", "numpy", "datasets"}
BOUND = 1.0  # seconds of CPU time, user and system


def print_schema():
    """What a process of its own prints, the libraries that it has loaded, and the CPU time that it took."""
    source = (
        "import sys\n"
        "from luthier.cli import main\n"
        "sys.argv = ['luthier', 'schema']\n"
        "try:\n    main()\n"
        "except SystemExit:\n    print('', *{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    before = os.times()
    result = subprocess.run([sys.executable, "-c", source], check=True, capture_output=True, text=True)
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    return json.loads(result.stdout), set(result.stderr.splitlines()[-1].split()), seconds


def test_the_schema_is_printed_without_a_heavy_library():
    document, loaded, _ = print_schema()
    assert {"learning_rate", "tasks"} <= set(document["properties"])
    assert not HEAVY & loaded


@pytest.mark.slow  # a time, which other work on the machine lengthens
def test_the_schema_is_printed_quickly():
    assert min(print_schema()[2] for _ in range(5)) < BOUND


def test_the_schema_goes_to_a_file_and_the_line_for_editors_is_told(luthier, tmp_path):
    path = tmp_path / "luthier.schema.json"
    result = luthier("schema", "--output", path)
    assert result.status == 0
    assert "# yaml-language-server: $schema=luthier.schema.json" in result.stdout
    assert json.loads(path.read_text()) == luthier("schema", "--json").document
    assert luthier("schema", "--output", path, "--json").document == {"path": str(path)}


def test_a_folder_that_is_not_there_is_an_error(luthier, tmp_path):
    result = luthier("schema", "--output", tmp_path / "none" / "s.json", "--json")
    assert (result.status, result.document["error"]["code"]) == (2, "path-unwritable")
    assert not list(tmp_path.iterdir())
