"""docs/screens.md shows each screen of its generator within its width, and the emulated terminal does what one does."""

import re
from pathlib import Path

import pytest

from tests.generate_screens import PAGE, SCREENS, drawn, screen_of

BLOCK = re.compile(r"(\d+) columns:\n\n```text\n(.*?)```", re.DOTALL)
LONG = (
    "vLLM:",
    "SGLang:",
    "transformers:",
    "luthier ",
    "run ",
    "best ",
    "error:",
)  # commands and paths are never folded


def test_the_page_has_every_screen_of_its_generator():
    page = PAGE.read_text("utf-8")
    for heading, command, widths in SCREENS:
        section = page.partition(f"## {heading}\n")[2].partition("\n## ")[0]
        assert f"$ luthier {command}\n" in section
        assert section.count("```text") == 1 + len(widths)


def test_no_line_is_longer_than_its_terminal_but_for_commands_and_paths():
    for width, text in BLOCK.findall(PAGE.read_text("utf-8")):
        lines = [line for line in text.splitlines() if not line.strip().startswith(LONG)]
        assert max(map(len, lines)) <= int(width)


def test_a_terminal_carries_out_returns_moves_and_erased_lines():
    assert screen_of("one\r\ntwo\x1b[1A\r\x1b[2Kthree\r\n") == "three\ntwo"
    assert screen_of("\x1b[31mred\x1b[0m\rb") == "bed"


@pytest.mark.parametrize("width", [80, 120])
def test_the_list_of_no_runs_is_drawn_in_a_terminal_of_that_width(width, tmp_path: Path):
    text = drawn(["runs"], tmp_path, width)
    assert text and max(map(len, text.splitlines())) <= width
