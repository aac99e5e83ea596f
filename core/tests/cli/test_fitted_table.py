"""A table of one line a row fits a terminal by leaving columns out, and is whole in a pipe."""

from __future__ import annotations

import io

import pytest
from luthier.cli.screen.tables import draw_fitted
from rich.console import Console

ROWS = [["name", "state", ">loss"], ["a-run-with-a-long-name", "completed", "0.5"], ["b", "killed", "12.25"]]


def drawn(width, *, terminal=True):
    """The lines of the table on a screen of this width."""
    stream = io.StringIO()
    draw_fitted(Console(file=stream, width=width, force_terminal=terminal, color_system=None), ROWS, ["loss", "state"])
    return stream.getvalue().splitlines()


@pytest.mark.parametrize(
    ("width", "heads"), [(60, ["name", "state", "loss"]), (35, ["name", "state"]), (25, ["name"]), (12, ["name"])]
)
def test_columns_go_in_their_order_and_no_line_is_wider_than_the_screen(width, heads):
    lines = drawn(width)
    assert lines[0].split() == heads
    assert len(lines) == len(ROWS)
    assert max(map(len, lines)) <= width


def test_a_pipe_gets_every_column_whole(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    lines = drawn(10, terminal=False)
    assert [line.split() for line in lines] == [["name", "state", "loss"], *ROWS[1:]]


def test_numbers_stand_at_the_right():
    assert [line[-5:] for line in drawn(60)[1:]] == ["  0.5", "12.25"]
