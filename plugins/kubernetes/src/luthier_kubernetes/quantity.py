"""Quantities as Kubernetes writes them: a number, and a suffix such as m, k, G, Gi or e3."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Final

FORM: Final = re.compile(
    r"\+?(?P<number>[0-9]+\.?[0-9]*|\.[0-9]+)(?:(?P<suffix>[numkMGTPE]|[KMGTPE]i)|[eE](?P<power>[+-]?[0-9]{1,2}))?"
)
UNITS: Final = {"": Fraction(1)}
UNITS.update({name: Fraction(1000) ** power for power, name in ((-3, "n"), (-2, "u"), (-1, "m"))})
UNITS.update({name: Fraction(1000) ** power for power, name in enumerate("kMGTPE", start=1)})
UNITS.update({f"{name}i": Fraction(1024) ** power for power, name in enumerate("KMGTPE", start=1)})


def read_quantity(text: str) -> Fraction | None:
    """Return the number of a quantity, or None if the text is no quantity or negative."""
    form = FORM.fullmatch(text)
    if form is None:
        return None
    power = Fraction(10) ** int(form["power"]) if form["power"] else Fraction(1)
    return Fraction(form["number"].rstrip(".")) * power * UNITS[form["suffix"] or ""]
