"""`luthier demo`: what it prints; that the loss falls clearly is held by the demo's own tests."""

import json
from pathlib import Path

import jsonschema
from luthier.cli.demo import DemoResult, draw_demo
from luthier.cli.documents.document_schemas import document_schema
from rich.console import Console

RESULT = DemoResult(
    eval_loss_before=4.0,
    eval_loss_after=3.0,
    question="Will it rain?",
    sample_before="perhaps [bold]",
    sample_after="weather('Lisbon')",
    run="runs/demo",
    adapter="runs/demo/adapter",
    merged="runs/demo/merged",
    steps=60,
    seconds=61.4,
    next=[f'luthier generate runs/demo "{"Will it rain? " * 9}"', "luthier train --model demo"],
)


def test_demo_in_a_process_of_its_own_prints_one_document_of_what_it_made(command, tmp_path):
    result = command("demo", "--max-steps", "2", "--folder", tmp_path / "demo", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert jsonschema.Draft202012Validator(document_schema("demo")).is_valid(found)
    assert found["eval_loss_after"] < found["eval_loss_before"]
    assert all(Path(found[name]).is_dir() for name in ("run", "adapter", "merged"))
    assert len(found["next"]) == 2


def test_demo_shows_losses_answers_folders_and_two_commands_that_can_be_copied():
    screen = Console(width=80, highlight=False, markup=False)
    with screen.capture() as captured:
        draw_demo(screen, RESULT)
    lines = [line.strip() for line in captured.get().splitlines()]
    assert all(command in lines for command in RESULT.next)
    for text in ("4.0000", "3.0000, -25.0% in 60 steps and 61 s", "perhaps [bold]", "weather('Lisbon')", "demo/merged"):
        assert any(text in line for line in lines), text
