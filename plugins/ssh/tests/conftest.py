"""An SSH server on this machine that runs what it is asked, for OpenSSH's own client."""

import asyncio
import threading

import asyncssh
import pytest


class Loopback:
    """A server of asyncssh in a thread. `cut` ends so many connections before they answer; `lines` holds what came."""

    def __init__(self, folder):
        self.folder, self.cut, self.lines = folder, 0, []
        self.home = folder / "home"
        self.home.mkdir()
        key, host = (asyncssh.generate_private_key("ssh-ed25519") for _ in range(2))
        key.write_private_key(folder / "id")
        (folder / "id").chmod(0o600)
        self.host, self.key = host, key

    async def serve(self, process):
        self.lines.append(process.command)
        shell = await asyncio.create_subprocess_exec(
            "/bin/sh", "-c", process.command, cwd=self.home, stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        told, said = await shell.communicate(await process.stdin.read())
        if self.cut and "worker_desk start" in process.command:
            self.cut -= 1
            process.get_extra_info("connection").abort()
            return
        process.stdout.write(told)
        process.stderr.write(said)
        process.exit(shell.returncode)

    async def run(self, ready, done):
        keys = self.folder / "keys"
        keys.write_bytes(self.key.export_public_key())
        server = await asyncssh.listen("127.0.0.1", 0, server_host_keys=[self.host], authorized_client_keys=str(keys),
                                       process_factory=self.serve, encoding=None, line_editor=False)  # fmt: skip
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await done
        server.close()

    def write_config(self, known=True):
        public = self.host.export_public_key().decode().strip()
        (self.folder / "known").write_text(f"[127.0.0.1]:{self.port} {public}\n" if known else "")
        lines = ("Host there", "  HostName 127.0.0.1", f"  Port {self.port}", "  User me", f"  IdentityFile {self.folder}/id",
                 "  IdentitiesOnly yes", f"  UserKnownHostsFile {self.folder}/known", "  StrictHostKeyChecking yes")  # fmt: skip
        (self.folder / "config").write_text("\n".join(lines) + "\n")
        return str(self.folder / "config")


@pytest.fixture
def there(tmp_path):
    folder = tmp_path / "there"
    folder.mkdir()
    made, ready = Loopback(folder), threading.Event()
    loop = asyncio.new_event_loop()
    done = loop.create_future()

    def serve():
        asyncio.set_event_loop(loop)
        loop.run_until_complete(made.run(ready, done))
        loop.run_until_complete(asyncio.sleep(0.05))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert ready.wait(20)
    yield made
    loop.call_soon_threadsafe(done.set_result, None)
    thread.join(10)
