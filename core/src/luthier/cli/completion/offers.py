"""Completion: flags of a recipe, their values, recipes, runs and parts for the word that is being typed."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from luthier.cli.completion.word_table import part_names, read_words

RECIPES: Final = (".yaml", ".yml", ".toml", ".json")
HEAD: Final = 4096  # bytes of a file in which a recipe must name its model
RUNS: Final = "runs"
WIDEST: Final = 60  # characters of a word's meaning
Offered = list[tuple[str, str]]  # each word with its meaning


def offer_recipe_words(before: Sequence[str], incomplete: str) -> Offered:
    """Return the words that may replace `incomplete`, in a command that takes a recipe and its flags.

    `before` holds the words of the command line that are not the command's own options. An empty list leaves the word
    to the shell, which completes paths.
    """
    words = read_words()
    given = [word for word in before if word != "="]  # bash makes the equals sign a word of its own
    flag, equals, value = incomplete.partition("=")  # zsh and fish leave the equals sign in the word
    if flag.startswith("--") and equals:
        return [(f"{flag}={word}", meaning) for word, meaning in _fitting(_values(words, given, flag), value)]
    behind = "=" in (*before[-1:], incomplete)
    if behind and given[-2:-1] == ["--set"]:  # bash, after the equals sign of a setting
        return _fitting(_values(words, given, f"--{given[-1]}"), "" if incomplete == "=" else incomplete)
    if incomplete.startswith("-"):
        return _flags(words, given, incomplete)
    if given and given[-1].startswith("--") and "=" not in given[-1]:
        return _fitting(_values(words, given, given[-1]), "" if incomplete == "=" else incomplete)
    return [(path, "") for path in offer_recipes(incomplete)]


def offer_settings(before: Sequence[str], incomplete: str) -> Offered:
    """Return dotted names for `--set`, each with its equals sign, or the values for a name."""
    name, equals, value = incomplete.partition("=")
    words = read_words()
    if equals:
        return [(f"{name}={word}", meaning) for word, meaning in _fitting(_values(words, before, f"--{name}"), value)]
    names = _dotted(words, before, name) if "." in name else {n: o["help"] for n, o in words["settings"].items()}
    return _fitting(((f"{name}=", meaning) for name, meaning in names.items()), incomplete)


def offer_recipes(incomplete: str) -> list[str]:
    """Return the recipe files whose path begins like this, in the path's folder and in the folders directly in it."""
    folder = Path(incomplete if incomplete.endswith(os.sep) else os.path.dirname(incomplete))
    with contextlib.suppress(OSError):
        inner = sorted(path for path in Path(folder).iterdir() if not path.name.startswith("."))
        below = [file for path in inner if path.is_dir() for file in _files_of(path)]
        paths = [str(path) for path in (*inner, *below) if path.suffix in RECIPES and _is_recipe(path)]
        return [path for path in paths if path.startswith(incomplete.removeprefix("./"))]
    return []


def offer_runs(incomplete: str, *, as_paths: bool) -> list[str]:
    """Return the runs in `runs`, or in the folder that a path begins to name: as paths, or by their names."""
    from luthier.runs.find import is_run

    folder = Path(os.path.dirname(incomplete) or RUNS) if as_paths else Path(RUNS)
    with contextlib.suppress(OSError):
        runs = sorted(path for path in folder.iterdir() if path.is_dir() and is_run(path))
        names = [str(path) if as_paths else path.name for path in runs]
        return [name for name in names if name.startswith(incomplete)]
    return []


def offer_parts(kind: str, incomplete: str) -> Offered:
    """Return the installed parts of a kind that begin like this, each with its summary."""
    return _fitting(part_names(read_words(), kind), incomplete)


def offer_methods(incomplete: str) -> Offered:
    """Return the adapters and losses that begin like this, including names such as qlora for quantized weights."""
    words = read_words()
    return _fitting([*_adapters(words), *part_names(words, "loss")], incomplete)


def offer_kinds(incomplete: str) -> list[str]:
    """Return the kinds of parts that begin like this."""
    return [kind for kind in read_words()["parts"] if kind.startswith(incomplete)]


def _fitting(words: Iterable[tuple[str, str]], incomplete: str) -> Offered:
    """Return the words that begin like this, each with the beginning of its meaning, which fits one line."""
    return [(word, text if len(text) <= WIDEST else f"{text[: WIDEST - 3].rstrip()}...") for word, text in words
            if word.startswith(incomplete)]  # fmt: skip


def _files_of(folder: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from sorted(path for path in folder.iterdir() if path.suffix in RECIPES)


def _is_recipe(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return b"model" in file.read(HEAD)
    except OSError:
        return False


def _flags(words: Mapping[str, Any], given: Sequence[str], incomplete: str) -> Offered:
    """Return settings as flags; after a dot the options of a section or of the chosen part."""
    name = incomplete.lstrip("-").replace("-", "_")
    if "." in name:
        names = _dotted(words, given, name)
    else:
        names = {option: about["help"] for option, about in words["settings"].items()}
        switches = {f"no_{n}": about["help"] for n, about in words["settings"].items() if "false" in about["values"]}
        names |= switches if name.startswith("no") else {}
    return _fitting(((f"--{_spelled(option, incomplete)}", meaning) for option, meaning in names.items()), incomplete)


def _spelled(name: str, incomplete: str) -> str:
    """Return a flag with hyphens, or with underscores if the typed text has them."""
    return name if "_" in incomplete else name.replace("_", "-")


def _dotted(words: Mapping[str, Any], given: Sequence[str], name: str) -> dict[str, str]:
    """Return the dotted names of a section or a part's field, with their meanings."""
    field = name.partition(".")[0]
    options = words["sections"].get(field) or _part_options(words, given, field)
    return {f"{field}.{option}": about["help"] for option, about in options.items()}


def _part_options(words: Mapping[str, Any], given: Sequence[str], field: str) -> Mapping[str, Any]:
    """Return the options of the part that the flags or the recipe name, else of the default part."""
    if field not in words["fields"] or field == "callbacks":
        return {}
    name = _chosen(given, field) or _in_recipe(given, field) or words["settings"][field]["default"]
    part: Mapping[str, Any] = words["parts"].get(field, {}).get(name, {})
    return part.get("options", {})


def _chosen(given: Sequence[str], field: str) -> str | None:
    """Return the part that a flag names, as `--adapter lora` or `--adapter=lora`."""
    for word, following in itertools.pairwise([*given, ""]):
        flag, equals, value = word.partition("=")
        if flag == f"--{field}":
            return value if equals else following
    return None


def _in_recipe(given: Sequence[str], field: str) -> str | None:
    """Return the part that the command line's recipe names; None if there is none that can be read."""
    from luthier.errors import LuthierError
    from luthier.recipe.reading.recipe_files import find_file, read_recipe_file

    for word in given:
        if Path(word).suffix in RECIPES or Path(word).is_dir():
            with contextlib.suppress(LuthierError, OSError):
                part = read_recipe_file(find_file(Path(word)))[0].get(field)
                name = part.get("name") if isinstance(part, dict) else part
                return name if isinstance(name, str) else None
    return None


def _values(words: Mapping[str, Any], given: Sequence[str], flag: str) -> Offered:
    """Return the values of a flag: installed parts, or the few values that an option may have."""
    name = flag.removeprefix("--").replace("-", "_")
    field, _, option = name.partition(".")
    if name == "callbacks":
        return [*part_names(words, "callback"), *((f"-{n}", "Take it away.") for n in ("progress", "jsonl", "plot"))]
    if name in words["lists"]:
        return part_names(words, words["lists"][name])
    if name == "adapter":
        return _adapters(words)
    if name in words["fields"]:
        return part_names(words, name)
    options = (words["sections"].get(field) or _part_options(words, given, field)) if option else words["settings"]
    return [(value, "") for value in options.get(option or name, {}).get("values", ())]


def _adapters(words: Mapping[str, Any]) -> Offered:
    return [*part_names(words, "adapter"), *words["quantized"].items()]
