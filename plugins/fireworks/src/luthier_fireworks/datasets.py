"""Datasets at Fireworks: the rows of a job, under a name that is a hash of their bytes."""

from __future__ import annotations

from typing import Any, Final

from luthier import Call, DataFile, ProviderError, ServiceClient

FORM_BYTES: Final = 150_000_000  # largest file that is sent as a form; larger ones go to a signed link
READY: Final = "READY"
CHECKING: Final = 120  # number of times that the state of a dataset is asked while the service reads it


def dataset_id(file: DataFile) -> str:
    """Return the id of the dataset. The same rows have the same id."""
    return f"luthier-{file.sha256[:32]}"


async def send_dataset(client: ServiceClient, account: str, file: DataFile, progress: Any) -> str:
    """Send a file, unless the service has its bytes, and return the full name of the dataset."""
    name = f"accounts/{account}/datasets/{dataset_id(file)}"
    if await _state_of(client, name, file) != READY:
        if file.size <= FORM_BYTES:
            await client.send_file(f"/v1/{name}:upload", file.path, fields={}, progress=progress)
        else:
            await _send_to_link(client, name, file, progress)
        await _wait_ready(client, name, file)
    return name


async def has_dataset(client: ServiceClient, name: str) -> bool:
    """Return True if a dataset exists and is complete."""
    try:
        dataset = await client.read_json(f"/v1/{name}")
    except ProviderError as error:
        if error.kind == "not_found":
            return False
        raise
    return dataset.get("state") == READY


async def _state_of(client: ServiceClient, name: str, file: DataFile) -> str | None:
    """Return the state of the dataset, which is created if it does not exist."""
    body = {"datasetId": name.rpartition("/")[2], "dataset": {"userUploaded": {}, "exampleCount": str(file.rows)}}
    path = f"/v1/{name.rpartition('/')[0]}"
    answer = await client.send_call(Call(method="POST", path=path, json=body, accepted=(200, 409)))
    if answer.status == 409:  # created before, and perhaps never filled
        return (await client.read_json(f"/v1/{name}")).get("state")
    return answer.body.get("state")


async def _send_to_link(client: ServiceClient, name: str, file: DataFile, progress: Any) -> None:
    asked = {"filenameToSize": {file.path.name: str(file.size)}}
    answer = await client.post_json(f"/v1/{name}:getUploadEndpoint", asked, repeatable=True)
    links = answer.get("filenameToSignedUrls") or {}
    if file.path.name not in links:
        raise ProviderError("protocol", "the answer has no link to send the file to", where=f"fireworks: {name}")
    await client.put_file(links[file.path.name], file.path, progress=progress)
    await client.post_json(f"/v1/{name}:validateUpload", {}, repeatable=True)


async def _wait_ready(client: ServiceClient, name: str, file: DataFile) -> None:
    """Wait until the service has read the rows. Raise its message if it refuses them."""
    for _ in range(CHECKING):
        dataset = await client.read_json(f"/v1/{name}")
        if dataset.get("state") == READY:
            return
        status = dataset.get("status") or {}
        if status.get("code") not in (None, "OK"):
            reason = status.get("message") or status["code"]
            raise ProviderError("invalid", f"the service refuses the file: {reason}", where=str(file.path))
        await client.clock.sleep(5.0)
    raise ProviderError("server", "the service has not read the rows in time", where=f"fireworks: {name}")
