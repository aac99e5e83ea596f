"""Pushing: an artifact's folder is sent to a repository of a hub, by huggingface_hub's client and its own key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import attrs

from luthier.artifacts.folders import is_artifact
from luthier.errors import LuthierError
from luthier.logs import get_logger

log = get_logger()
REPOSITORY: Final = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*")
PICKLES: Final = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")  # formats that run code when they are read
KEY: Final = re.compile(rb"hf_[A-Za-z0-9]{30,}")  # a key of the hub
LOOKED_AT: Final = 1 << 20  # bytes of a file that are searched for a key
STATUS: Final = {401: "provider-auth", 403: "provider-auth", 429: "provider-limited", 404: "provider-not-found"}


@attrs.frozen(kw_only=True)
class Push:
    """The result of a push, or of a dry run: the repository, its address, and the files with their bytes."""

    repository: str
    revision: str
    private: bool
    files: dict[str, int]
    url: str | None = None  # None: nothing was sent


def push_folder(
    folder: Path, repository: str, *, private: bool = True, revision: str = "main", message: str | None = None,
    dry_run: bool = False,
) -> Push:  # fmt: skip
    """Send an artifact's files. With `dry_run` only list them, without any request.

    The key is the one that `hf auth login` or HF_TOKEN has left for the client. It is in no output, and a file that
    contains one is refused, as is a pickle. Raises `credential-missing` without a key.
    """
    if not REPOSITORY.fullmatch(repository):
        problem, remedy = "no name of a repository", "Write OWNER/NAME."
        raise LuthierError("recipe-wrong-type", problem, where="repository", found=repository, remedy=remedy)
    push = Push(repository=repository, revision=revision, private=private, files=list_files(folder))
    if dry_run:
        return push
    from huggingface_hub import HfApi, get_token

    key = get_token()
    if key is None:
        problem, remedy = "there is no key of the hub", "Run `hf auth login`, or set HF_TOKEN."
        raise LuthierError("credential-missing", problem, where="HF_TOKEN", remedy=remedy)
    client = HfApi(token=key)
    with _explained(repository, key):
        client.create_repo(repository, private=private, exist_ok=True)
        client.upload_folder(repo_id=repository, folder_path=folder, revision=revision,
                             allow_patterns=list(push.files),
                             commit_message=message or "Artifact of Luthier")  # fmt: skip
    url = f"{client.endpoint}/{repository}"
    log.info("pushed", url=url, revision=revision, files=len(push.files))
    return attrs.evolve(push, url=url)


def list_files(folder: Path) -> dict[str, int]:
    """Return the files of an artifact that are sent, with their bytes, without hidden files and inner artifacts.

    Raises `artifact-not-found` if there is no artifact, and `artifact-mismatch` for a pickle or a key.
    """
    if not is_artifact(folder):
        remedy = "Give the folder of an adapter or a model."
        raise LuthierError("artifact-not-found", "there is no artifact here", where=str(folder), remedy=remedy)
    # for example a merged model, which is pushed on its own
    others = [path for path in folder.iterdir() if is_artifact(path)]
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not {*path.parents}.intersection(others)]
    names = {str(path.relative_to(folder)): path for path in paths}
    sent = {name: path for name, path in names.items() if not any(part.startswith(".") for part in Path(name).parts)}
    for path in sent.values():
        if path.suffix in PICKLES:
            raise _kept_back(path, "it may be a pickle, which can run code", "Save it as safetensors.")
        with path.open("rb") as file:
            if KEY.search(file.read(LOOKED_AT)):
                raise _kept_back(path, "it holds what looks like a key of the hub", "Remove the key, and revoke it.")
    return {name: path.stat().st_size for name, path in sent.items()}


def _kept_back(path: Path, problem: str, remedy: str) -> LuthierError:
    return LuthierError("artifact-mismatch", problem, where=str(path), remedy=remedy)


@contextmanager
def _explained(repository: str, key: str) -> Iterator[None]:
    """Raise the client's errors in luthier's words, without the key."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        code = STATUS.get(status, "provider-failed" if status >= 500 else "provider-invalid")
        said = (str(error).splitlines() or [""])[0].replace(key, "(key)")
        raise LuthierError(code, f"the hub says: {said}", where=repository) from None
    except (httpx.TransportError, OSError) as error:
        problem = f"the hub cannot be reached: {type(error).__name__}"
        raise LuthierError("provider-unreachable", problem, where=repository) from None
