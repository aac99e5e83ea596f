"""A machine behind the ssh command: its Python runs the jobs, and files are sent as tar streams."""

from __future__ import annotations

import asyncio
import os
import shlex
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from luthier import DeskService, JobStatus, LuthierError, ProviderError, desk_words, read_desk

from luthier_ssh import Ssh

BLOCK: Final = 2**18
REACHED: Final = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=15",
                  "-o", "ServerAliveCountMax=4", "-a", "-x", "-T")  # fmt: skip
FAILED: Final = 255  # exit status of a failure of ssh itself
TOLD: Final = (  # text in ssh's output, the kind of error, and what to do
    ("permission denied", "auth", "Give a key that the machine accepts: set provider.identity_file, or run ssh-add."),
    ("host key verification failed", "permission", "Log in once by hand, and compare the machine's key."),
    ("identification has changed", "permission", "The machine's key has changed. Find out why."),
    ("could not resolve", "network", None),
    ("connection refused", "network", None),
    ("no route to host", "network", None),
    ("connection timed out", "network", None),
)


def build_service(options: Ssh) -> DeskService:
    """Return the provider. It opens no connection before the first request."""
    return DeskService(SshPlace(options))


class SshPlace:
    """One machine. Each command has its own connection, so that nothing is lost when one breaks."""

    name = "ssh"

    def __init__(self, options: Ssh) -> None:
        self.options, self.processes = options, options.nproc_per_node
        port = f":{options.port}" if options.port else ""
        self.scope = f"ssh://{options.host or 'no machine'}{port}/{options.folder}"
        self._root: str | None = None

    async def find_root(self) -> str:
        if self._root is None:
            folder = shlex.quote(self.options.folder)
            output = await self._run(f"umask 077 && mkdir -p -- {folder} && cd -- {folder} && pwd -P")
            self._root = output.decode().strip().splitlines()[-1]
        return self._root

    async def ask_python(self, words: Sequence[str]) -> str:
        line = shlex.join([self.options.python, *words])
        return (await self._run(line)).decode("utf-8", "replace")

    async def start_run(self, folder: str) -> None:
        read_desk(await self.ask_python(desk_words("start", folder)), f"ssh: {folder}")

    async def find_waiting(self, folder: str) -> JobStatus | None:
        return None

    async def end_run(self, folder: str) -> bool:
        return False

    async def send_files(self, files: Mapping[str, Path], folder: str) -> None:
        where = shlex.quote(folder)
        with tempfile.TemporaryFile() as archive:
            with tarfile.open(fileobj=archive, mode="w") as tar:
                for name, path in files.items():
                    tar.add(path, arcname=name, filter=_plain)
            archive.seek(0)
            await self._run(f"umask 077 && mkdir -p -- {where} && tar -xf - -C {where}", given=archive)

    async def fetch_folder(self, folder: str, archive: Path, progress: Any) -> None:
        process = await self._start(f"tar -cf - -C {shlex.quote(folder)} .", None)
        assert process.stdout is not None
        done = 0
        with archive.open("wb") as file:
            while block := await process.stdout.read(BLOCK):
                file.write(block)
                done += len(block)
                if progress is not None:
                    progress(done, done)
        await self._finish(process, b"")

    async def _run(self, line: str, given: Any = None) -> bytes:
        process = await self._start(line, given)
        try:
            output, said = await process.communicate()
        except BaseException:
            if process.returncode is None:
                process.kill()
            raise
        await self._finish(process, said)
        return output

    async def _start(self, line: str, given: Any) -> asyncio.subprocess.Process:
        options = self.options
        if not options.host:
            raise LuthierError("recipe-missing", "no machine is named", where="ssh.host", remedy="Set provider.host.")
        named = (("-p", options.port), ("-i", options.identity_file), ("-F", options.config_file))
        words = [word for flag, value in named if value is not None for word in (flag, str(value))]
        try:
            return await asyncio.create_subprocess_exec(
                "ssh", *REACHED, *words, "--", options.host, line, stdin=given or asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env={**os.environ, "LC_ALL": "C"},
            )  # fmt: skip
        except FileNotFoundError:
            raise LuthierError("dependency-missing", "the ssh command is not installed here", where="ssh",
                               remedy="Install OpenSSH's client.") from None  # fmt: skip

    async def _finish(self, process: asyncio.subprocess.Process, said: bytes) -> None:
        """Raise the error of a command that failed."""
        if process.stderr is not None and not process.stderr.at_eof():
            said += await process.stderr.read()
        code = await process.wait()
        if code == 0:
            return
        message = said.decode("utf-8", "replace").strip()
        last = message.splitlines()[-1] if message else f"it ended with status {code}"
        where = f"ssh: {self.options.host}"
        if code == FAILED:
            entry = next((item for item in TOLD if item[0] in message.lower()), None)
            kind, remedy = (entry[1], entry[2]) if entry else ("lost", None)
            raise ProviderError(kind, last, where=where, remedy=remedy)
        if "No module named" in message or code == 127:
            remedy = 'On that machine run: pip install "luthier[local]", and set provider.python to its Python.'
            raise ProviderError("invalid", f"Luthier is not installed there: {last}", where=where, remedy=remedy)
        raise ProviderError("lost" if code > 128 else "invalid", last, where=where)


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Return a member without owner names and numbers, readable by its owner only."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mode = 0o600
    return member
