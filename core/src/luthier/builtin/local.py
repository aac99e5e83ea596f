"""The provider `local`: training in this process."""

from __future__ import annotations

from luthier.builtin import Local


class InProcess:
    def __init__(self, options: Local) -> None:
        self.options = options

    async def check(self) -> dict[str, list[str]]:
        """The devices that a run could use here."""
        from luthier.engine.devices import available

        return {"devices": available()}
