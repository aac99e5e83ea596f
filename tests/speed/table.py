"""Row: one comparison, and how several are drawn."""

from __future__ import annotations

from typing import Any, TextIO

import attrs


@attrs.frozen(kw_only=True)
class Row:
    """`ours` and `peer` are in `unit`; `ratio` is how many times better ours is, whichever way better lies."""

    case: str
    ours: float
    peer: float | None
    unit: str
    ratio: float | None
    loss_difference: float | None = None  # ours minus the peer's, after the same work
    more: dict[str, Any] = attrs.field(factory=dict)

    @classmethod
    def rate(cls, case: str, ours: float, peer: float, unit: str, **rest: Any) -> Row:
        """More is better."""
        return cls(case=case, ours=ours, peer=peer, unit=unit, ratio=ours / peer, **rest)

    @classmethod
    def cost(cls, case: str, ours: float, peer: float, unit: str, **rest: Any) -> Row:
        """Less is better."""
        return cls(case=case, ours=ours, peer=peer, unit=unit, ratio=peer / ours if ours else None, **rest)

    def to_dict(self) -> dict[str, Any]:
        own = attrs.asdict(self)
        return {**{k: v for k, v in own.items() if k != "more"}, **self.more}


def draw(rows: list[dict[str, Any]], file: TextIO) -> None:
    """A table of all rows; what is not in its columns stands below."""
    from rich.console import Console
    from rich.table import Table

    screen = Console(file=file, width=None if file.isatty() else 140)
    table = Table("case", "ours", "peer", "unit", "ratio", "loss difference")
    for row in rows:
        numbers = [_number(row[name]) for name in ("ours", "peer")]
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}x"
        table.add_row(row["case"], *numbers, row["unit"], ratio, _number(row["loss_difference"], signed=True))
    screen.print(table)
    for row in rows:
        rest = {k: v for k, v in row.items() if k not in ("case", "ours", "peer", "unit", "ratio", "loss_difference")}
        if rest:
            screen.print(f"{row['case']}: " + ", ".join(f"{k} {_shown(v)}" for k, v in rest.items()), markup=False)


def _number(value: float | None, signed: bool = False) -> str:
    if value is None:
        return ""
    return f"{value:+.4f}" if signed else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
