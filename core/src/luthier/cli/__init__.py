"""The command line: one file per verb group, rich tables for people, `--json` for programs."""

from __future__ import annotations


def main() -> None:
    """Run the console script `luthier`."""
    from luthier.cli.app import app

    app()
