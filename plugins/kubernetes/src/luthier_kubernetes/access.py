"""Access to a cluster: its address, its authority and who asks, by a kubeconfig, by options, or as a pod of its own."""

from __future__ import annotations

import base64
import json
import os
import ssl
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

import attrs
import yaml
from luthier import LuthierError, Secret, read_secret

from luthier_kubernetes import Kubernetes

ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
UNREAD: Final = {  # what a kubeconfig may hold and is not done: what to do instead
    "insecure-skip-tls-verify": "Give the cluster's certificate-authority.",
    "proxy-url": "Set HTTPS_PROXY.",
    "tls-server-name": "Name the server as its certificate does.",
    "auth-provider": "Use a token, a certificate, or an exec command.",
    "username": "Use a token, a certificate, or an exec command.",
    "as": "Use an account of its own.",
}
Headers = Mapping[str, str | Secret]


@attrs.frozen(kw_only=True)
class Access:
    """A cluster, and who asks it. `tls` and `headers` read files and keys, when they are first needed."""

    server: str
    namespace: str
    tls: Callable[[], ssl.SSLContext | None]
    headers: Callable[[], Headers]


def find_access(options: Kubernetes) -> Access:
    """Return the access that the options name; only the kubeconfig is read, and no key of it is kept in clear."""
    if options.server is not None:
        return _by_options(options)
    paths = _config_paths(options)
    if not paths and (ACCOUNT / "token").exists() and "KUBERNETES_SERVICE_HOST" in os.environ:
        return _by_account(options)
    if not paths:
        remedy = "Set KUBECONFIG, provider.kubeconfig, or provider.server and provider.token."
        raise LuthierError("credential-missing", "no kubeconfig is here", where="kubernetes.kubeconfig", remedy=remedy)
    return _by_config(options, paths)


def _by_options(options: Kubernetes) -> Access:
    reference, authority = options.token, options.certificate_authority

    @cache
    def bearer() -> Headers:
        return {} if reference is None else _bearer(read_secret(reference, "kubernetes.token"))

    return Access(
        server=str(options.server),
        namespace=options.namespace or "default",
        tls=lambda: None if authority is None else _context(Path(authority).expanduser().read_text("utf-8")),
        headers=bearer,
    )


def _by_account(options: Kubernetes) -> Access:
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    return Access(
        server=f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}",
        namespace=options.namespace or (ACCOUNT / "namespace").read_text("utf-8").strip(),
        tls=lambda: _context((ACCOUNT / "ca.crt").read_text("utf-8")),
        headers=lambda: _bearer(read_secret(f"file:{ACCOUNT / 'token'}", "kubernetes")),  # it is renewed there
    )


def _config_paths(options: Kubernetes) -> list[Path]:
    if options.kubeconfig is not None:
        return [Path(options.kubeconfig).expanduser()]
    named = [Path(name).expanduser() for name in os.environ.get("KUBECONFIG", "").split(os.pathsep) if name]
    return [path for path in named or [Path.home() / ".kube" / "config"] if path.exists()]


def _by_config(options: Kubernetes, paths: Iterable[Path]) -> Access:
    config = Config(paths)
    context = config.find_entry("contexts", "context", options.context or config.current)
    cluster = config.find_entry("clusters", "cluster", context.get("cluster"))
    user = config.find_entry("users", "user", context.get("user")) if context.get("user") else Entry()
    _check_entry(cluster)
    _check_entry(user)
    if user.get("exec") and not options.run_exec:
        problem = "the token comes of a command that the file names, which is not run unasked"
        raise LuthierError("credential-missing", problem, where=user.where, remedy="Set provider.run_exec: true.")
    return Access(
        server=str(cluster.get("server") or ""),
        namespace=options.namespace or context.get("namespace") or "default",
        tls=lambda: _context(cluster.read_material("certificate-authority"), user.read_certificate()),
        headers=_headers_of(user),
    )


@attrs.frozen(kw_only=True, repr=False)
class Entry:
    """A cluster, user or context of a kubeconfig, and the folder that its paths are relative to."""

    values: Mapping[str, Any] = attrs.field(factory=dict)
    folder: Path = Path()
    where: str = ""

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def path_of(self, key: str) -> Path:
        """Return the path under a key as this machine has it."""
        return self.folder / Path(str(self.values[key])).expanduser()

    def read_material(self, key: str) -> str | None:
        """Return what stands under `KEY-data` in base64, or in the file that KEY names; None where neither is set."""
        data = self.values.get(f"{key}-data")
        try:
            if data is not None:
                return base64.b64decode(str(data), validate=True).decode()
            return self.path_of(key).read_text("utf-8") if self.values.get(key) else None
        except (OSError, ValueError):
            raise LuthierError("credential-missing", f"{key} cannot be read", where=self.where) from None

    def read_certificate(self) -> tuple[str, str] | None:
        """Return a user's certificate and its key, in PEM; None where the user has none."""
        certificate, key = self.read_material("client-certificate"), self.read_material("client-key")
        return None if certificate is None or key is None else (certificate, key)


class Config:
    """The files of a kubeconfig, read as one; where two have an entry of one name, the first counts."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.documents = [(path, _read_yaml(path)) for path in paths]
        self.where = " and ".join(str(path) for path, _ in self.documents)
        self.current = next((d["current-context"] for _, d in self.documents if d.get("current-context")), None)

    def find_entry(self, group: str, kind: str, name: object) -> Entry:
        """Return the entry of a name, or tell which names there are."""
        known = []
        for path, document in self.documents:
            for item in document.get(group) or []:
                if isinstance(item, dict) and isinstance(item.get(kind), dict):
                    if item.get("name") == name:
                        return Entry(values=item[kind], folder=path.parent, where=str(path))
                    known.append(str(item.get("name")))
        problem = f"there is no {kind} {name!r}; known: {', '.join(known) or 'none'}"
        raise LuthierError("credential-missing", problem, where=self.where)


def _check_entry(entry: Entry) -> None:
    """Refuse what a kubeconfig asks for and is not done here: nothing of it is passed over."""
    for key, remedy in UNREAD.items():
        if entry.get(key):
            raise LuthierError("part-unsupported", f"{key} is not supported", where=entry.where, remedy=remedy)


def _headers_of(user: Entry) -> Callable[[], Headers]:
    if user.get("exec"):
        return cache(lambda: _bearer(_run_exec(user.get("exec"), user.where)))
    if user.get("token"):
        held = _bearer(Secret(str(user.get("token"))))
        return lambda: held
    if user.get("tokenFile"):
        path = user.path_of("tokenFile")
        return lambda: _bearer(read_secret(f"file:{path}", user.where))
    return dict


def _run_exec(command: Mapping[str, Any], where: str) -> Secret:
    """The token that a command writes as an ExecCredential; it is asked once."""
    words = [str(command.get("command")), *map(str, command.get("args") or [])]
    given = {str(item["name"]): str(item["value"]) for item in command.get("env") or []}
    version = str(command.get("apiVersion", "client.authentication.k8s.io/v1"))
    asked = {"apiVersion": version, "kind": "ExecCredential", "spec": {"interactive": False}}
    environ = {**os.environ, **given, "KUBERNETES_EXEC_INFO": json.dumps(asked)}
    try:
        done = subprocess.run(words, capture_output=True, check=True, timeout=60, env=environ)
        return Secret(json.loads(done.stdout)["status"]["token"])
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError):
        raise LuthierError("credential-missing", f"the command {words[0]!r} gave no token", where=where) from None


def _bearer(secret: Secret) -> Headers:
    return {"authorization": secret.with_prefix("Bearer ")}


def _context(authority: str | None, certificate: tuple[str, str] | None = None) -> ssl.SSLContext:
    """Whom to trust, and with which certificate to ask; its key is on the disk, for its owner alone, to be read."""
    try:
        context = ssl.create_default_context(cadata=authority)
        if certificate is not None:
            with tempfile.TemporaryDirectory(prefix="luthier-") as folder:
                path = Path(folder) / "pair.pem"
                path.touch(mode=0o600)
                path.write_text("\n".join(certificate))
                context.load_cert_chain(path)
    except ssl.SSLError as error:
        raise LuthierError(
            "credential-missing", f"a certificate cannot be read: {error.reason}", where="kubernetes"
        ) from None
    return context


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        raise LuthierError("credential-missing", "the kubeconfig cannot be read", where=str(path)) from None
    if not isinstance(document, dict):
        raise LuthierError("credential-missing", "this is no kubeconfig", where=str(path))
    return document
