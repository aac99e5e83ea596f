"""Lost parts: the report on a row of which the chat template writes less than it holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

from luthier.data.tokenise.rendered_parts import TOOLS, Part
from luthier.data.tokenise.supervised_spans import Rendered
from luthier.errors import LuthierError

PROMPT: Final = "the text before messages[{}] is not the prompt that generation gets"
NAMES: Final = {"thought": "the thought", "tool_calls": "the arguments of a call"}


def lost_parts(texts: Iterable[Rendered]) -> list[Part]:
    """Return the parts of a row that some of its texts lack, each part once."""
    parts = {(part.index, part.role, part.call): part for text in texts for part in text.lost}
    return list(parts.values())


def lost_error(lost: Sequence[Part], where: str) -> LuthierError:
    """Return the error for one row that lacks parts, counted by role."""
    missing = [part for part in lost if part.role != "prompt"]
    reasons = [PROMPT.format(part.index) for part in lost if part.role == "prompt"]
    if missing:
        reasons.insert(0, f"the chat template does not write {', '.join(map(_name, missing))}")
    counts = Counter(part.role for part in lost)
    return LuthierError("data-unrendered", "; ".join(reasons), where=where, found=dict(counts))


def lost_kind(error: LuthierError) -> str:
    """Return the word under which rows with such lost parts are counted; an empty text for other errors."""
    roles = error.found if isinstance(error.found, dict) else {}
    return f"unrendered ({', '.join(roles)})" if error.code == "data-unrendered" else ""


def _name(part: Part) -> str:
    if part.index == TOOLS:
        return "the tools"
    return f"{NAMES.get(part.role, f'the {part.role} message')} (messages[{part.index}])"
