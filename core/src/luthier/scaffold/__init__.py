"""The scaffold: a new plugin, complete and passing its own tests, from the templates beside this file."""

from __future__ import annotations

import keyword
import re
from importlib import resources
from pathlib import Path
from string import Template
from typing import Final

from luthier.errors import LuthierError, suggest_nearest, unwritable_path
from luthier.plugins import catalogue
from luthier.plugins.hookspecs import HOOKS
from luthier.plugins.records import KINDS, RECORDS
from luthier.plugins.registry import installed_plugins

PREFIX: Final = "luthier-"
NAME: Final = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
LONGEST: Final = 24  # longest name for which generated lines stay within 120 columns
SUMMARIES: Final = {
    "adapter": "Scales every output of a layer by a trained factor.",
    "loss": "Cross-entropy with label smoothing.",
    "loss-preference": "Pairs of answers compared by their mean log-probability.",
    "optimizer": "Gradient descent with momentum.",
    "quantizer": "Linear weights rounded to a few bits, with a scale for each row.",
    "callback": "Writes the best loss so far to a file in the run's folder.",
    "provider": "Jobs at a made-up service.",
    "operation": "The gated activation, with a backward that keeps its inputs alone.",
    "exporter": "Every weight of a model in one file of numpy arrays.",
    "metric": "Share of answers that are their reference, word for word.",
    "penalty": "Smooth absolute values of the trained weights.",
    "trainer": "A loop of its own, which learns the words of the prompts.",
    "benchmark": "Digits and letters, each to be continued.",
    "engine": "Says the words of a prompt backwards.",
}
DATA: Final = ("tokens", "preference")  # kinds of rows for a loss
REQUIREMENTS: Final = {  # requirements besides attrs and luthier, as they continue a TOML list
    "adapter": ', "safetensors>=0.8", "torch>=2.11"',
    "loss": ', "torch>=2.11"',
    "optimizer": ', "torch>=2.11"',
    "quantizer": ', "torch>=2.11"',
    "callback": "",
    "provider": "",
    "operation": ', "torch>=2.11"',
    "exporter": ', "numpy>=1.26", "torch>=2.11"',
    "metric": "",
    "penalty": ', "torch>=2.11"',
    "trainer": ', "torch>=2.11"',
    "benchmark": "",
    "engine": "",
}
EXTRAS: Final = {"provider": "[hosted]"}  # extras of luthier itself
TAKEN: Final = frozenset(  # names that the templates import or define
    (
        "Any",
        "Batch",
        "BenchmarkModel",
        "BenchmarkScore",
        "Callable",
        "Context",
        "EngineQuestion",
        "Group",
        "Iterable",
        "Iterator",
        "Literal",
        "LossOutput",
        "LuthierError",
    )
    + ("Mapping", "Multipliers", "Path", "Progress", "PromptRow", "RoundedLinear", "ScaledLayer", "Tensor")
    + ("Capabilities", "DataFile", "EventPage", "JobArtifact", "JobEvent", "JobSpec", "JobState", "JobStatus")
    + (
        "ProviderError",
        "Reply",
        "Secret",
        "Sequence",
        "ServiceClient",
        "ServiceRow",
        "SettingRule",
        "TrainerSession",
        "Wanted",
    )
    + tuple(record.__name__ for record in RECORDS.values())
)
COMMON: Final = {  # file of the package -> its template; further files depend on the kind
    "pyproject.toml": "pyproject.toml.txt",
    ".gitignore": "gitignore.txt",
    "README.md": "README.md.txt",
    "tests/test_$identifier.py": "test.py.txt",
}


def make_package(name: str, kind: str, folder: Path, data: str = "tokens") -> Path:
    """Write the package `luthier-<name>` with a part `name` of a kind into `folder`, and give its path.

    `data` is the kind of rows that a loss takes: "tokens" or "preference".
    Raises `part-unknown` for a kind that does not exist, and `plugin-name` for a name that cannot be one, is taken by
    another distribution, or whose package is there already. Nothing is written before all is checked.
    """
    _check_kind(kind)
    _check_data(kind, data)
    _check_name(name, kind)
    root = Path(folder) / f"{PREFIX}{name}"
    if root.exists():
        raise LuthierError("plugin-name", "this folder exists already", where=str(root), remedy="Choose another name.")
    files = render(name, kind, data)
    try:
        for path, text in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text, "utf-8")
    except OSError as error:
        raise unwritable_path(root, error) from None
    return root


def render(name: str, kind: str, data: str = "tokens") -> dict[str, str]:
    """Path -> text of every file of the package, without writing any."""
    templates = kind if data == "tokens" else f"{kind}-{data}"
    identifier = name.replace("-", "_")
    words = {
        "name": name,
        "identifier": identifier,
        "distribution": f"{PREFIX}{name}",
        "module": f"luthier_{identifier}",
        "Class": _class_name(name),
        "kind": kind,
        "hook": HOOKS[kind],
        "summary": SUMMARIES[templates],
        "requirements": REQUIREMENTS[kind],
        "extra": EXTRAS.get(kind, ""),
        "IDENTIFIER": identifier.upper(),
    }
    words["about"] = _filled(f"{templates}/about.md.txt", words).rstrip()
    sources = {"src/$module/__init__.py": "init.py.txt", f"src/$module/{kind}.py": "part.py.txt"}
    own = {path: f"{templates}/{source}" for path, source in sources.items()}
    if _has_template(f"{templates}/test.py.txt"):
        own["tests/test_$identifier.py"] = f"{templates}/test.py.txt"
    return {Template(path).substitute(words): _filled(source, words) for path, source in {**COMMON, **own}.items()}


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise LuthierError("part-unknown", f"there is no kind {kind!r} of part", remedy=suggest_nearest(kind, KINDS))


def _check_data(kind: str, data: str) -> None:
    if data not in DATA:
        remedy = f"Choose one of: {', '.join(DATA)}."
        raise LuthierError("part-unsupported", f"there is no beginning of a loss over {data!r} rows", remedy=remedy)
    if data != "tokens" and kind != "loss":
        raise LuthierError("part-unsupported", "only a loss takes rows", where="data", remedy="Leave --data out.")


def _check_name(name: str, kind: str) -> None:
    if name.startswith(PREFIX):
        raise LuthierError("plugin-name", f"leave {PREFIX!r} out; it is added", found=name,
                           remedy=f"Write {name.removeprefix(PREFIX)!r}.")  # fmt: skip
    if not NAME.fullmatch(name) or len(name) > LONGEST:
        problem = f"a plugin's name is lower-case letters, digits and single hyphens, at most {LONGEST} of them"
        raise LuthierError("plugin-name", problem, found=name, remedy=_suggestion(name))
    if keyword.iskeyword(_class_name(name)) or _class_name(name) in TAKEN:
        problem = f"its options class would be called {_class_name(name)}, which means something else already"
        raise LuthierError("plugin-name", problem, found=name, remedy="Choose another name.")
    owner = _owner(name, kind)
    if owner == f"{PREFIX}{name}":
        raise LuthierError("plugin-name", f"a distribution {owner} is there already", remedy="Choose another name.")
    if owner:
        raise LuthierError("plugin-name", f"{owner} has {kind} {name!r} already", remedy="Choose another name.")


def _owner(name: str, kind: str) -> str | None:
    """Who has this part, or the distribution's name, of what is installed and of the catalogue."""
    taken = [(o.record.kind, o.record.name, o.source.distribution) for o in installed_plugins().offers()]
    taken += [(of, part, owner) for of, parts in catalogue.read_catalogue().items() for part, owner in parts.items()]
    owners = [owner for of, part, owner in taken if (of, part) == (kind, name) or owner == f"{PREFIX}{name}"]
    return owners[0] if owners else None


def _suggestion(name: str) -> str:
    """Return a name like the one given that would do, if there is one."""
    near = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:LONGEST].strip("-")
    return f"Write {near!r}." if NAME.fullmatch(near) else "Begin with a letter."


def _class_name(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("-"))


def _has_template(source: str) -> bool:
    return resources.files("luthier.scaffold").joinpath("templates", *source.split("/")).is_file()


def _filled(source: str, words: dict[str, str]) -> str:
    text = resources.files("luthier.scaffold").joinpath("templates", *source.split("/")).read_text("utf-8")
    return Template(text).substitute(words)
