"""Lists that a service sends page by page, each page with a token for the next."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

from luthier.jobs.provider_error import ProviderError
from luthier.jobs.transport.service_client import ServiceClient

PAGES: Final = 200  # the most pages of one list


async def read_pages(
    client: ServiceClient, path: str, items: str, *, token: str = "nextPageToken", asked: str = "pageToken",
    params: Mapping[str, Any] | None = None,
) -> AsyncIterator[Mapping[str, Any]]:  # fmt: skip
    """Yield the items of a list. `items` and `token` are fields of a page; `asked` is the parameter that takes the
    token.

    Raises a `protocol` error if the service sends a token twice, or has no last page.
    """
    where, seen, given = f"{client.service}: GET {path}", set[str](), dict(params or {})
    for _ in range(PAGES):
        page = await client.read_json(path, given)
        for item in page.get(items) or []:
            yield item
        following = page.get(token)
        if not following:
            return
        if following in seen:
            raise ProviderError("protocol", "the list repeats itself", where=where)
        seen.add(following)
        given = {**given, asked: following}
    raise ProviderError("protocol", f"the list did not end after {PAGES} pages", where=where)
