"""Options that are not given are not parsed: what a command gets, what it refuses, and what is not loaded."""

import subprocess
import sys

import pytest
import typer
from luthier.cli.completion.quick_command import QuickCommand, QuickGroup
from typer.testing import CliRunner

app = typer.Typer(cls=QuickGroup)


@app.callback()
def root(loud: bool = typer.Option(False, "--loud", "-l"), level: int = typer.Option(7, min=1)) -> None:
    print(f"root {loud} {level}")


@app.command(cls=QuickCommand)
def show(
    name: str, limit: int = typer.Option(50, min=1), words: list[str] = typer.Option([], "--word", "-w"),
    flag: bool = typer.Option(True, "--flag/--no-flag", "-f/-F"),
) -> None:  # fmt: skip
    print(f"show {name} {limit} {list(words)} {flag}")


@pytest.mark.parametrize(("given", "told"), [
    ("show a", "root False 7 show a 50 [] True"),
    ("-l --level 3 show a --limit=4 -w x --word y --no-flag", "root True 3 show a 4 ['x', 'y'] False"),
    ("show -F a", "root False 7 show a 50 [] False"), ("show -Fwx a", "root False 7 show a 50 ['x'] False"),
    ("show -- --limit", "root False 7 show --limit 50 [] True"),
])  # fmt: skip
def test_options_have_their_values_or_their_defaults(given, told):
    result = CliRunner().invoke(app, given.split())
    assert (result.exit_code, result.output.split()) == (0, told.split())


@pytest.mark.parametrize("given", ["show", "show a --limit 0", "show a --limit x", "show a --nope", "--level 0 show a",
                                   "show a b"])  # fmt: skip
def test_what_typer_refuses_is_refused(given):
    assert CliRunner().invoke(app, given.split()).exit_code == 2


def test_help_lists_every_option():
    shown = CliRunner().invoke(app, ["show", "--help"]).output
    assert all(name in shown for name in ("--limit", "--word", "--no-flag"))


def test_the_list_of_jobs_loads_no_library_that_only_values_need(tmp_path):
    source = (
        "import sys\nfrom luthier.cli import main\nsys.argv = ['luthier', 'jobs', '--json']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    print(end.code, 'pydantic' in sys.modules, file=sys.stderr)"
    )
    environment = {"LUTHIER_JOBS": str(tmp_path), "PATH": ""}
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=environment, check=True)
    assert result.stderr.splitlines()[-1] == "0 False"
