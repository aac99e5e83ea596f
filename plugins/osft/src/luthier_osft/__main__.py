"""`python -m luthier_osft audit BASE MODEL`: measure how much of a model's change is in protected directions."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the audit; return 0 if every weight keeps its directions, 1 if one has moved, 2 for bad input."""
    from luthier import LuthierError

    given = _parser().parse_args(arguments)
    from luthier_osft.audit import audit_model, format_audit

    try:
        audit = audit_model(given.base, given.model, given.unfreeze_rank_ratio)
    except LuthierError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(audit.to_dict(), indent=2) if given.json else "\n".join(format_audit(audit)))
    return 0 if audit.holds else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m luthier_osft", description=__doc__)
    verbs = parser.add_subparsers(required=True)
    audit = verbs.add_parser("audit", help="Measure how much of every weight's change is in protected directions.")
    audit.add_argument(
        "base",
        type=Path,
        help="The model from which training began: a folder, a name such as demo, or the run of the task before.",
    )
    audit.add_argument("model", type=Path, help="Folder of the trained model, or of a run with merge: true.")
    audit.add_argument(
        "--unfreeze-rank-ratio", type=_ratio, help="The share of directions that trained; default: read from the run."
    )
    audit.add_argument("--json", action="store_true", help="Print JSON.")
    return parser


def _ratio(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
