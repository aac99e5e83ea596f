"""Access to a cluster: its address, its authority and who asks, by a kubeconfig, by options, or as a pod of its own."""

from __future__ import annotations

import base64
import os
import ssl
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import attrs
import yaml
from luthier import LuthierError, Secret, read_secret

from luthier_kubernetes import Kubernetes
from luthier_kubernetes.bearer_token import BearerToken, Headers, Token, run_exec

ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
UNREAD: Final = {  # what a kubeconfig may hold and is not done: what to do instead
    "insecure-skip-tls-verify": "Give the cluster's certificate-authority.",
    "proxy-url": "Set HTTPS_PROXY.",
    "tls-server-name": "Name the server as its certificate does.",
    "auth-provider": "Use a token, a certificate, or an exec command.",
    "username": "Use a token, a certificate, or an exec command.",
    "as": "Use an account of its own.",
}


@attrs.frozen(kw_only=True)
class Access:
    """A cluster, and who asks it. `tls` and the token read files and keys, when they are first needed."""

    server: str
    namespace: str
    tls: Callable[[], ssl.SSLContext | None]
    token: BearerToken | None

    def headers(self) -> Headers:
        """Return what tells the cluster who asks; nothing where a certificate does."""
        return {} if self.token is None else self.token.headers()

    def renew(self) -> None:
        """Let a token that the cluster has refused be read again."""
        if self.token is not None:
            self.token.forget()


def find_access(options: Kubernetes, now: Callable[[], float] = time.time) -> Access:
    """Return the access that the options name; only the kubeconfig is read, and no key of it is kept in clear.

    `now` is the time, in seconds since 1970, that a token's end is compared with.
    """
    if options.server is not None:
        return _by_options(options, now)
    paths = _config_paths(options)
    if not paths and (ACCOUNT / "token").exists() and "KUBERNETES_SERVICE_HOST" in os.environ:
        return _by_account(options, now)
    if not paths:
        remedy = "Set KUBECONFIG, provider.kubeconfig, or provider.server and provider.token."
        raise LuthierError("credential-missing", "no kubeconfig is here", where="kubernetes.kubeconfig", remedy=remedy)
    return _by_config(options, paths, now)


def _by_options(options: Kubernetes, now: Callable[[], float]) -> Access:
    reference, authority = options.token, options.certificate_authority
    if authority is not None:
        _read_authority(authority)  # before a job is packed for it

    def read() -> Token:
        return Token(secret=read_secret(str(reference), "kubernetes.token"))

    return Access(
        server=str(options.server),
        namespace=options.namespace or "default",
        tls=lambda: None if authority is None else _read_authority(authority),
        token=None if reference is None else BearerToken(read, now),
    )


def _read_authority(path: str) -> ssl.SSLContext:
    """Return whom to trust by the file that the option names."""
    where, remedy = "kubernetes.certificate_authority", "Name a file that holds the authority's certificate, in PEM."
    try:
        return _context(Path(path).expanduser().read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        problem = f"the file cannot be read: {getattr(error, 'strerror', None) or 'not text'}"
        raise LuthierError("credential-missing", problem, where=where, found=path, remedy=remedy) from None
    except LuthierError as error:
        raise LuthierError(error.code, error.problem, where=where, found=path, remedy=remedy) from None


def _by_account(options: Kubernetes, now: Callable[[], float]) -> Access:
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    return Access(
        server=f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}",
        namespace=options.namespace or (ACCOUNT / "namespace").read_text("utf-8").strip(),
        tls=lambda: _context((ACCOUNT / "ca.crt").read_text("utf-8")),
        token=_file_token(ACCOUNT / "token", "kubernetes", now),
    )


def _config_paths(options: Kubernetes) -> list[Path]:
    if options.kubeconfig is not None:
        return [Path(options.kubeconfig).expanduser()]
    named = [Path(name).expanduser() for name in os.environ.get("KUBECONFIG", "").split(os.pathsep) if name]
    return [path for path in named or [Path.home() / ".kube" / "config"] if path.exists()]


def _by_config(options: Kubernetes, paths: Iterable[Path], now: Callable[[], float]) -> Access:
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
        token=_token_of(user, now),
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
            found = "base64 that is damaged" if data is not None else str(self.path_of(key))
            remedy = f"Correct {key} of the kubeconfig, or have your cluster's tool write it again."
            raise LuthierError(
                "credential-missing", f"{key} cannot be read", where=self.where, found=found, remedy=remedy
            ) from None

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


def _token_of(user: Entry, now: Callable[[], float]) -> BearerToken | None:
    """Return how a user's token is read; None where the user has none."""
    if user.get("exec"):
        return BearerToken(lambda: run_exec(user.get("exec"), user.where), now)
    if user.get("token"):
        held = Token(secret=Secret(str(user.get("token"))))
        return BearerToken(lambda: held, now)
    if user.get("tokenFile"):
        return _file_token(user.path_of("tokenFile"), user.where, now)
    return None


def _file_token(path: Path, where: str, now: Callable[[], float]) -> BearerToken:
    """A token that is written anew in its file from time to time: it is read for every request."""
    return BearerToken(lambda: Token(secret=read_secret(f"file:{path}", where), ends=0.0), now)


def _context(authority: str | None, certificate: tuple[str, str] | None = None) -> ssl.SSLContext:
    """Whom to trust, and with which certificate to ask; its key is on the disk, for its owner alone, to be read."""
    if authority is not None and not authority.strip():  # which Python reads as: trust this machine's own
        raise LuthierError("credential-missing", "the file of the authority is empty", where="kubernetes")
    try:
        context = ssl.create_default_context(cadata=authority)
        if certificate is not None:
            with tempfile.TemporaryDirectory(prefix="luthier-") as folder:
                path = Path(folder) / "pair.pem"
                path.touch(mode=0o600)
                path.write_text("\n".join(certificate))
                context.load_cert_chain(path)
    except (ssl.SSLError, ValueError) as error:  # ValueError: of text that holds no certificate at all
        reason = getattr(error, "reason", None) or "it is not PEM"
        raise LuthierError(
            "credential-missing", f"a certificate cannot be read: {reason}", where="kubernetes"
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
