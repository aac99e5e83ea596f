"""Every error a user can meet: a stable code, where it happened, what was found, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import attrs


@attrs.frozen
class Code:
    """The meaning of a code: its usual cause, the remedy, and the exit status of a command that ends with it."""

    cause: str
    remedy: str
    exit_status: int = 2


CODES: Final[dict[str, Code]] = {
    # the command line
    "usage": Code("The command line cannot be understood.", "Compare it with the command's --help."),
    "interrupted": Code("Ctrl-C or a signal ended the command.", "Run the same command again.", 130),
    "path-unwritable": Code("A file or folder cannot be written.", "Choose another path, or change its permissions."),
    # recipes
    "recipe-not-found": Code("The recipe file does not exist.", "Check the path, or pass --model and --data instead."),
    "recipe-syntax": Code("The file is not valid YAML, TOML or JSON.", "Correct the line that the message names."),
    "recipe-unknown-option": Code("No option has this name.", "Use the nearest name, or list them with --help."),
    "recipe-wrong-type": Code("A value has another type than its option.", "Write a value of the type named."),
    "recipe-out-of-range": Code("A value is outside its option's bounds or choices.", "Choose a value inside them."),
    "recipe-missing": Code("A required value is absent.", "Give it in the recipe, by flag or by environment."),
    "recipe-conflict": Code("Two options contradict each other.", "Keep one of the two."),
    # parts and plugins
    "part-unknown": Code(
        "No installed plugin offers a part of this name.", "Install the distribution named, or fix it."
    ),
    "part-broken": Code("The plugin that offers this part failed to load.", "Repair or reinstall that distribution."),
    "part-ambiguous": Code("Two distributions offer a part of this name.", "Uninstall one, or disable it."),
    "part-incompatible": Code("Two chosen parts do not work together.", "Replace one of the two parts named."),
    "part-invalid": Code("An object does not keep the protocol of its kind.", "Add the members that are named."),
    "part-unsupported": Code("A part cannot work here, for the reason given.", "Choose another part or setting."),
    "plugin-invalid": Code("A plugin's record is malformed.", "The plugin's author must correct the record."),
    "plugin-name": Code("A new plugin cannot be made under this name.", "Use lower-case letters, digits and hyphens."),
    "dependency-missing": Code("A library that this needs is not installed.", "Run the pip line in the message."),
    # data
    "data-not-found": Code("A data file or hub dataset does not exist.", "Check the path or name."),
    "data-unreadable": Code("A file cannot be read as its format.", "Check that it is whole, text, and named rightly."),
    "data-row": Code("One row is broken.", "Correct or remove the row at the file and line named."),
    "data-format": Code("The rows fit no known format, or several.", "Set data.format, or map columns."),
    "data-column": Code("A mapped column is not in the data.", "Use one of the columns that are listed."),
    "data-empty": Code("No rows are left to train on.", "Check the file, the filters and the drop counts."),
    "data-unsupervised": Code("A row has no supervised token.", "Check the roles, the template, and truncation."),
    "data-avoided": Code("A row says that its answer is one to avoid.", "Drop such rows, or choose a loss for them."),
    "data-unrendered": Code(
        "The chat template does not write a message, tools or a thought of a row.",
        "Use a template that writes it, take it out of the rows, or set data.unrendered: warn.",
    ),
    "data-overlong": Code("A row is longer than max_length and overlong is error.", "Raise max_length or drop rows."),
    "data-worker": Code("A process that tokenises rows died, twice.", "Free memory, or set data.num_proc: 1.", 1),
    "data-changed": Code("The data differs from what this run was started on.", "Restore it, or start with --fresh."),
    "template-missing": Code(
        "The tokenizer has no chat template.", "Set data.chat_template, or use prompt/completion."
    ),
    "template-unprovable": Code(
        "Supervised spans cannot be found for this template.", "Use a template with generation tags, or another one."
    ),
    # models and devices
    "model-not-found": Code(
        "The model cannot be found or read.", "Check the folder or hub name; `luthier runs` lists the runs."
    ),
    "model-weights": Code(
        "A checkpoint's weights are not those that its config asks for, or are no numbers.",
        "Check the sizes in the model's config.json, or copy its files again.",
    ),
    "model-vocabulary": Code("The tokenizer makes ids that the model has not.", "Use the model's own tokenizer."),
    "model-architecture": Code(
        "The engine's result differs from the model's own forward.",
        "Set packing: false, or report the architecture.",
        1,
    ),
    "model-target": Code("An adapter's target matches no layer.", "Use one of the near misses that are listed."),
    "device-unavailable": Code("The device asked for is not here.", "Choose another, or device: auto."),
    "device-lost": Code("The device stopped answering in the middle of a run.", "Run the same command again.", 1),
    "device-unsafe": Code(
        "The GPU did not come below its limits.", "Let it cool, or raise the limits; the same command goes on.", 75
    ),
    "distributed-setup": Code("The processes of a run cannot work together.", "Change what the message names."),
    "distributed-lost": Code("Another process of the run ended or fell silent.", "Run the same command again.", 1),
    "memory-too-small": Code(
        "The run is predicted to need more memory than the device has free.",
        "Change what the message names, or set memory_check: false to try.",
    ),
    "memory-exhausted": Code(
        "The device's memory ran out, and smaller micro-batches did not help.", "Change what the message names.", 1
    ),
    # runs
    "run-folder-other": Code("The output folder holds another run.", "Choose another output_dir, or use --fresh."),
    "run-folder-locked": Code(
        "Another process trains in this folder.", "Wait for it, or choose another output_dir.", 75
    ),
    "run-not-found": Code("There is no run at this path.", "Check the path."),
    "run-ambiguous": Code("Several runs match this name.", "Write more of the id, or the folder's path."),
    "run-not-running": Code("Nobody trains in this folder.", "Go on with it by the command that began it."),
    "run-silent": Code("The run has not answered in time.", "Wait longer with --timeout: it saves after a step.", 75),
    "disk-full": Code("The disk is full; the last checkpoint is whole.", "Free space, then run the same command.", 1),
    "checkpoint-corrupt": Code("A checkpoint is damaged or of another run.", "Resume from the one before.", 1),
    "format-newer": Code(
        "A checkpoint or an artifact was written by a newer luthier; nothing of it was touched.",
        "Use that version, or a newer one.",
    ),
    "checkpoint-other": Code(
        "A checkpoint is of another run: other settings, parts or base model.",
        "Resume with what it was trained with, or name what may differ with --allow-changed.",
    ),
    "checkpoint-state": Code(
        "A part's state cannot be stored as tensors and JSON.", "The part's author must mend it.", 1
    ),
    "train-nonfinite": Code(
        "The loss or gradient became NaN or infinite.", "Lower the learning rate; check the data.", 1
    ),
    "train-nothing": Code("No parameter is trainable.", "Choose an adapter, or targets that match."),
    # artifacts
    "artifact-mismatch": Code("A saved artifact does not give the outputs it should.", "Do not use it; report it.", 1),
    "artifact-uncarried": Code(
        "What is to be trained could not be saved and read back as it is.", "Leave out the option that the files lose."
    ),
    "artifact-dtype": Code(
        "A weight is too large for the dtype of the files.",
        "Write save_dtype: bfloat16 or float32; --allow-changed settings goes on with the trained run.",
        1,
    ),
    "artifact-unmergeable": Code("This adapter cannot be merged here.", "Save the adapter itself."),
    "artifact-not-found": Code("There is no adapter or model in this folder.", "Check the path."),
    "file-damaged": Code("A file of a model or an adapter was cut off or changed.", "Copy or download the file again."),
    "operation-differs": Code(
        "An installed operation gives other numbers than its reference.", "Uninstall it, or set kernels: reference.", 1
    ),
    "operation-failed": Code(
        "An installed operation that kernels: require asks for cannot be used.", "Set kernels: auto or reference.", 1
    ),
    "compile-failed": Code("A region of the model cannot be compiled here.", "Set torch_compile: auto or false.", 1),
    # jobs and providers
    "credential-missing": Code("A key is not where it is read from.", "Set the variable or file that is named."),
    "credential-literal": Code(
        "A key stands where its source should be named.", "Write env:NAME, file:PATH or cmd:COMMAND."
    ),
    "insecure-url": Code("An address would send a key in clear text.", "Use https."),
    "provider-auth": Code("The service refused the key, or what it may do.", "Check the key and its rights."),
    "provider-quota": Code(
        "The account's quota or credit is used up.", "Raise the limit or the credit at the service.", 1
    ),
    "provider-limited": Code("The service asks to be asked less often.", "Try again later.", 75),
    "provider-invalid": Code("The service refused a request as wrong.", "Change what the message names."),
    "provider-unsupported": Code(
        "The service cannot do what the recipe asks for.", "Change what the message names, or the provider."
    ),
    "provider-not-found": Code("The service does not know this job, file or model.", "Check its name and the account."),
    "provider-exists": Code("The service has this already.", "Look at it with `luthier status JOB`.", 1),
    "provider-ended": Code("The service has been shut down.", "Choose another provider."),
    "provider-failed": Code("The service failed again and again.", "Try again later.", 75),
    "provider-unreachable": Code("The service cannot be reached.", "Check the network and the address.", 75),
    "provider-lost": Code(
        "No answer came to a request that may have been carried out.",
        "Run `luthier attach JOB`: it looks before it asks again.",
        75,
    ),
    "provider-protocol": Code("The service's answer cannot be understood.", "Try again later, or report it.", 1),
    "job-not-found": Code("There is no such job.", "List them with `luthier jobs`."),
    "job-ambiguous": Code("Several jobs match this name.", "Write more of the id."),
    "job-busy": Code("Another process acts for this job.", "Wait for it.", 75),
    "job-unclear": Code(
        "Whether the service made the job cannot be told.",
        "Look there, then `luthier attach ID --provider NAME` or submit anew.",
        1,
    ),
    "job-failed": Code("The job failed.", "Read its events with `luthier logs JOB`.", 1),
    "job-canceled": Code("The job was canceled.", "Submit it anew.", 1),
    "job-timeout": Code("The job has not ended in time; it goes on.", "Come back with `luthier attach JOB`.", 75),
    "job-elsewhere": Code(
        "The job belongs to another account or address.", "Use the settings that it was submitted with."
    ),
    "job-store-damaged": Code(
        "The store of jobs cannot be used.", "Restore the file, or set LUTHIER_JOBS to another folder.", 1
    ),
    "cost-above": Code(
        "The job would cost more than max_cost, or its price is unknown.", "Raise max_cost, or change the recipe."
    ),
    "download-damaged": Code("A downloaded file is not what was promised.", "Run the same command again.", 1),
    "archive-unsafe": Code("An archive would write outside its folder.", "Do not use it; report it to the service.", 1),
    "archive-damaged": Code("An archive cannot be unpacked.", "Run the same command again.", 1),
    "internal": Code("A defect of Luthier or of a plugin.", "Please report it with the traceback.", 1),
}


NAME: Final = 100  # characters of the longest name for which a similar one is searched: the search is quadratic
PLACE: Final = 1000  # the most characters of a place that are shown


class LuthierError(Exception):
    """An error that a user caused or met, with `code`, `where`, `found` and `remedy` as attributes.

    `problem` is one sentence. `remedy` defaults to the code's. A plugin may use its own code, written `name:code`.
    `also` holds the other errors of the same input, each with its own place and remedy; they are told together.
    """

    def __init__(
        self, code: str, problem: str, *, where: str | None = None, found: object = None, remedy: str | None = None,
        also: Sequence[LuthierError] = (),
    ) -> None:  # fmt: skip
        assert code in CODES or ":" in code, f"unlisted error code {code}"
        self.code, self.problem, self.where, self.found, self.also = code, problem, where, found, tuple(also)
        self.remedy = remedy or (CODES[code].remedy if code in CODES else "")
        # the number of errors it stands for: the last of many is a count of those that are not shown
        self.stands_for = 1
        super().__init__(self.__str__())

    @property
    def exit_status(self) -> int:
        return CODES[self.code].exit_status if self.code in CODES else 1

    @property
    def line(self) -> str:
        """Return the place, the problem and what was found, without code and remedy."""
        place = f"{self.where if len(self.where) <= PLACE else self.where[:PLACE] + '…'}: " if self.where else ""
        value = "" if self.found is None else f" (found {show_value(self.found)})"
        return f"{place}{self.problem}{value}"

    def __str__(self) -> str:
        stop = "" if self.line.endswith((".", "?", "!")) else "."
        remedy = f"{stop} {self.remedy}" if self.remedy else ""
        return "\n".join([f"{self.line}{remedy} [{self.code}]", *map(str, self.also)])

    def at(self, where: str) -> LuthierError:
        """Return the same error with `where` in front of its place."""
        return self.relocated(lambda place: f"{where}: {place}" if place else where)

    def relocated(self, move: Callable[[str | None], str | None]) -> LuthierError:
        """Return the same error, and those joined to it, each with its place changed by `move`."""
        if self.stands_for > 1:
            return self
        also = [error.relocated(move) for error in self.also]
        return LuthierError(self.code, self.problem, where=move(self.where), found=self.found, remedy=self.remedy,
                            also=also)  # fmt: skip

    def to_dict(self) -> dict[str, object]:
        value = None if self.found is None else show_value(self.found)
        return {
            "code": self.code,
            "message": str(self),
            "problem": self.problem,
            "where": self.where,
            "found": value,
            "remedy": self.remedy,
            **({"also": [error.to_dict() for error in self.also]} if self.also else {}),
        }


def unwritable_path(path: object, error: OSError) -> LuthierError:
    """Return what the disk refused, in words of ours where the system's mislead."""
    blocked = isinstance(error, (FileExistsError, NotADirectoryError))
    problem = "a file stands where a folder must be" if blocked else error.strerror or str(error)
    return LuthierError("path-unwritable", problem, where=str(path))


def refuse_newer(record: Mapping[str, Any], known: int, where: object) -> None:
    """Raise `format-newer` where plain data that was read says that it has a later format than the `known` one."""
    form, version = record.get("format"), record.get("luthier")
    if isinstance(form, int) and form > known:
        writer = f"luthier {version}" if isinstance(version, str) else "a newer luthier"
        problem = f"written by {writer}, in format {form}; this one reads up to {known}"
        remedy = f"Use {writer if isinstance(version, str) else 'the luthier that wrote it,'} or newer."
        raise LuthierError("format-newer", problem, where=str(where), remedy=remedy)


def show_value(value: object, limit: int = 80) -> str:
    """Return `repr` of a value, cut to `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def suggest_nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint such as ` Did you mean 'r'?`, or the known names when none is near; empty when there are none."""
    names = sorted(set(known))
    near = difflib.get_close_matches(name, names, n=2, cutoff=0.6) if len(name) <= NAME else []
    if near:
        return "Did you mean " + " or ".join(repr(n) for n in near) + "?"
    return f"Known: {', '.join(names)}." if names else ""
