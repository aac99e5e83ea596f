"""What luthier-trackio offers: the callback `trackio`, described without importing the library."""

from __future__ import annotations

from urllib.parse import parse_qsl, urlsplit

import attrs
from luthier import CallbackRecord, LuthierError, hookimpl, option

__all__ = ["Trackio", "luthier_callbacks"]


@attrs.frozen(kw_only=True)
class Trackio:
    """Options of the callback `trackio`, under the names of `trackio.init`.

    A token is never an option: the library reads HF_TOKEN or its own login for a Space, and TRACKIO_WRITE_TOKEN for a
    server.
    """

    project: str = option(
        "luthier", help="The project, which is one database of the store and one page of the dashboard."
    )
    run_name: str | None = option(None, help="The run's name in Trackio; none: the run's own.")
    group: str | None = option(None, help="The group that this run belongs to; none: no group.")
    space_id: str | None = option(
        None, help="A Space of Hugging Face that gets the numbers, such as team/dashboard; none: TRACKIO_SPACE_ID, "
                   "else nothing leaves the machine.")  # fmt: skip
    private: bool | None = option(None, help="Whether a Space that is created is private; none: the owner's default.")
    server_url: str | None = option(
        None, help="A Trackio server of your own (http or https); none: TRACKIO_SERVER_URL, else the local store."
    )

    def __attrs_post_init__(self) -> None:
        parts = urlsplit(self.server_url or "")
        if "@" in parts.netloc or "write_token" in dict(parse_qsl(parts.query)):
            raise LuthierError("recipe-conflict", "an address must not contain a secret", where="Trackio.server_url",
                               remedy="Set TRACKIO_WRITE_TOKEN in the environment.")  # fmt: skip
        if self.space_id and self.server_url:
            raise LuthierError("recipe-conflict", "the numbers go to a Space or to a server, not to both",
                               where="Trackio.server_url", remedy="Leave out space_id or server_url.")  # fmt: skip


@hookimpl
def luthier_callbacks() -> list[CallbackRecord]:
    return [
        CallbackRecord(
            name="trackio",
            summary="The run's numbers in Trackio: its local store, a Space, or a server of your own.",
            options=Trackio,
            build="luthier_trackio.tracker:Tracker",
        )
    ]
