"""Access to a cluster: its address, its authority and the user, from a kubeconfig, options or the own pod."""

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
UNREAD: Final = {  # unsupported key of a kubeconfig -> what to do instead
    "insecure-skip-tls-verify": "Give the cluster's certificate-authority.",
    "proxy-url": "Set HTTPS_PROXY.",
    "tls-server-name": "Name the server as its certificate does.",
    "auth-provider": "Use a token, a certificate, or an exec command.",
    "username": "Use a token, a certificate, or an exec command.",
    "as": "Use an account with these rights.",
}


@attrs.frozen(kw_only=True)
class Access:
    """A cluster and its user. `tls` and the token read files and keys at their first use."""

    server: str
    namespace: str
    tls: Callable[[], ssl.SSLContext | None]
    token: BearerToken | None

    def headers(self) -> Headers:
        """Return the headers that identify the user. They are empty if a certificate does."""
        return {} if self.token is None else self.token.headers()

    def renew(self) -> None:
        """Read the token again before the next request, because the cluster has refused it."""
        if self.token is not None:
            self.token.forget()


def find_access(options: Kubernetes, now: Callable[[], float] = time.time) -> Access:
    """Return the access that the options name. Only the kubeconfig is read, and no key in it is kept in clear text.

    `now` returns the time in seconds since 1970, which is compared with the end of a token.
    """
    if options.server is not None:
        return _by_options(options, now)
    paths = _config_paths(options)
    if not paths and (ACCOUNT / "token").exists() and "KUBERNETES_SERVICE_HOST" in os.environ:
        return _by_account(options, now)
    if not paths:
        remedy = "Set KUBECONFIG, provider.kubeconfig, or provider.server and provider.token."
        raise LuthierError(
            "credential-missing", "no kubeconfig was found", where="kubernetes.kubeconfig", remedy=remedy
        )
    return _by_config(options, paths, now)


def _by_options(options: Kubernetes, now: Callable[[], float]) -> Access:
    reference, authority = options.token, options.certificate_authority
    if authority is not None:
        _read_authority(authority)  # read now, so that an error comes before a job is packed

    def read() -> Token:
        return Token(secret=read_secret(str(reference), "kubernetes.token"))

    return Access(
        server=str(options.server),
        namespace=options.namespace or "default",
        tls=lambda: None if authority is None else _read_authority(authority),
        token=None if reference is None else BearerToken(read, now),
    )


def _read_authority(path: str) -> ssl.SSLContext:
    """Return a TLS context that trusts the authority in the file."""
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
        problem = "a command that the kubeconfig names gives the token, and Luthier does not run it unasked"
        raise LuthierError("credential-missing", problem, where=user.where, remedy="Set provider.run_exec: true.")
    return Access(
        server=str(cluster.get("server") or ""),
        namespace=options.namespace or context.get("namespace") or "default",
        tls=lambda: _context(cluster.read_material("certificate-authority"), user.read_certificate()),
        token=_token_of(user, now),
    )


@attrs.frozen(kw_only=True, repr=False)
class Entry:
    """A cluster, user or context of a kubeconfig, and the folder to which its paths are relative."""

    values: Mapping[str, Any] = attrs.field(factory=dict)
    folder: Path = Path()
    where: str = ""

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def path_of(self, key: str) -> Path:
        """Return the path under a key, made absolute."""
        return self.folder / Path(str(self.values[key])).expanduser()

    def read_material(self, key: str) -> str | None:
        """Return the content of `KEY-data` (base64) or of the file that KEY names, or None if neither is set."""
        data = self.values.get(f"{key}-data")
        try:
            if data is not None:
                return base64.b64decode(str(data), validate=True).decode()
            return self.path_of(key).read_text("utf-8") if self.values.get(key) else None
        except (OSError, ValueError):
            cause = "damaged base64" if data is not None else str(self.path_of(key))
            remedy = f"Correct {key} of the kubeconfig, or have your cluster's tool write it again."
            raise LuthierError(
                "credential-missing", f"{key} cannot be read", where=self.where, found=cause, remedy=remedy
            ) from None

    def read_certificate(self) -> tuple[str, str] | None:
        """Return certificate and key of a user, in PEM, or None if the user has none."""
        certificate, key = self.read_material("client-certificate"), self.read_material("client-key")
        return None if certificate is None or key is None else (certificate, key)


class Config:
    """The files of a kubeconfig, merged. Of two entries with the same name the first counts."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.documents = [(path, _read_yaml(path)) for path in paths]
        self.where = " and ".join(str(path) for path, _ in self.documents)
        self.current = next((d["current-context"] for _, d in self.documents if d.get("current-context")), None)

    def find_entry(self, group: str, kind: str, name: object) -> Entry:
        """Return the entry of a name. Raises an error that lists the names if there is none."""
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
    """Raise `part-unsupported` for a key that is not supported, instead of ignoring it."""
    for key, remedy in UNREAD.items():
        if entry.get(key):
            raise LuthierError("part-unsupported", f"{key} is not supported", where=entry.where, remedy=remedy)


def _token_of(user: Entry, now: Callable[[], float]) -> BearerToken | None:
    """Return the reader of a user's token, or None if the user has none."""
    if user.get("exec"):
        return BearerToken(lambda: run_exec(user.get("exec"), user.where), now)
    if user.get("token"):
        token = Token(secret=Secret(str(user.get("token"))))
        return BearerToken(lambda: token, now)
    if user.get("tokenFile"):
        return _file_token(user.path_of("tokenFile"), user.where, now)
    return None


def _file_token(path: Path, where: str, now: Callable[[], float]) -> BearerToken:
    """Return the reader of a token file, which is read for every request because tokens are replaced."""
    return BearerToken(lambda: Token(secret=read_secret(f"file:{path}", where), ends=0.0), now)


def _context(authority: str | None, certificate: tuple[str, str] | None = None) -> ssl.SSLContext:
    """Return a TLS context with an authority and a certificate. Loading a key needs a private temporary file."""
    if authority is not None and not authority.strip():  # Python would then trust the authorities of this machine
        raise LuthierError("credential-missing", "the file of the authority is empty", where="kubernetes")
    try:
        context = ssl.create_default_context(cadata=authority)
        if certificate is not None:
            with tempfile.TemporaryDirectory(prefix="luthier-") as folder:
                path = Path(folder) / "pair.pem"
                path.touch(mode=0o600)
                path.write_text("\n".join(certificate))
                context.load_cert_chain(path)
    except (ssl.SSLError, ValueError) as error:  # ValueError: the text holds no certificate
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
        raise LuthierError("credential-missing", "this is not a kubeconfig", where=str(path))
    return document
