"""The benchmark `lm_eval`: the harness loads its tasks and counts, and the model of a run answers."""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from luthier import LuthierError, get_logger

from luthier_lm_eval import SAMPLE, LmEval
from luthier_lm_eval.policy_model import PolicyModel
from luthier_lm_eval.sample import SAMPLE_TASK
from luthier_lm_eval.task_errors import explain_scoring, load_each

try:
    from lm_eval import evaluate
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise LuthierError("dependency-missing", f"the harness cannot be imported: {error}", where="benchmark 'lm_eval'",
                       remedy="Run: pip install luthier-lm-eval lm-eval") from error  # fmt: skip

if TYPE_CHECKING:
    from luthier import BenchmarkModel, BenchmarkScore  # which import torch

PLACE: Final = "benchmark 'lm_eval'"
FEWSHOT_SEED: Final = 1234  # the harness's own default, so that the same solved examples are shown
UNKNOWN: Final = ("N/A", None)

log = get_logger()


class Harness:
    """Tasks of the harness, each loaded by its own settings."""

    def __init__(self, options: LmEval) -> None:
        self.options = options
        self.manager: Any = None

    def check(self, tasks: Sequence[str]) -> None:
        """Load the rows of every task, and so raise for a task that does not exist or cannot be had."""
        self._load(tasks)

    def run(self, model: BenchmarkModel, tasks: Sequence[str]) -> list[BenchmarkScore]:
        """Return every metric of every task, and of every group that has numbers of its own."""
        options, loaded = self.options, self._load(tasks)
        if options.apply_chat_template and not model.tokenizer.chat_template:
            raise LuthierError("template-missing", "the tokenizer has no chat template", remedy="Leave it out.",
                               where=f"{PLACE}: apply_chat_template")  # fmt: skip
        try:
            with quiet_harness():
                results = evaluate(
                    lm=PolicyModel(model), task_dict=loaded, limit=options.limit, log_samples=False,
                    bootstrap_iters=options.bootstrap_iters, system_instruction=options.system_instruction,
                    apply_chat_template=options.apply_chat_template,
                    fewshot_as_multiturn=options.apply_chat_template,
                    confirm_run_unsafe_code=options.confirm_run_unsafe_code,
                )  # fmt: skip
        except Exception as error:
            explained = explain_scoring(error, tasks)
            if explained is None:
                raise
            raise explained from error
        return list(read_scores(results))

    def _load(self, tasks: Sequence[str]) -> Any:
        """Return the loaded tasks with their few-shot settings."""
        with quiet_harness():
            loaded = load_rows(self._manager_of(tasks), tasks)
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            asked = self.options.num_fewshot
            task.set_config(key="num_fewshot", value=own or 0 if asked is None or own == 0 else asked)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        return loaded

    def _manager_of(self, tasks: Sequence[str]) -> Any:
        """Return an index that has the tasks: one of the user's own, or the harness's, which takes seconds to make."""
        folder = self.options.include_path
        if folder is not None and not Path(folder).is_dir():
            raise LuthierError("data-not-found", "there is no such folder", where=f"{PLACE}: include_path",
                               found=folder, remedy="Give a folder of YAML files.")  # fmt: skip
        own = TaskManager(include_path=folder, include_defaults=False)
        if {*tasks} <= {*own.all_subtasks, SAMPLE}:
            return own
        if self.manager is None:
            self.manager = TaskManager(include_path=folder)
        known = [*self.manager.all_tasks, SAMPLE]
        for name in tasks:
            if name not in known:
                raise LuthierError("part-unknown", f"the harness has no task {name!r}", where="--tasks",
                                   remedy=nearest_names(name, known))  # fmt: skip
        return self.manager


def load_rows(manager: Any, tasks: Sequence[str]) -> Any:
    """Return the tasks with their rows, which `datasets` reads from its cache, from a file or from the hub."""
    given = [SAMPLE_TASK if name == SAMPLE else name for name in tasks]
    return load_each(manager.load, given, tasks)


def read_scores(results: Mapping[str, Any]) -> Iterator[BenchmarkScore]:
    """Yield the numbers of the harness's answer: `{task: {"acc,none": value, "acc_stderr,none": error}}`."""
    from luthier import BenchmarkScore

    tables = {**results["results"], **results.get("groups", {})}
    for task, table in tables.items():
        for key, value in table.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, str):
                continue
            error = table.get(f"{metric}_stderr,{chosen}")
            yield BenchmarkScore(
                task=task,
                metric=metric if chosen == "none" else key,
                value=float(value),
                stderr=None if error in UNKNOWN else float(error),
                samples=count_samples(results, task),
                greater_is_better=results["higher_is_better"].get(task, {}).get(metric),
            )


def count_samples(results: Mapping[str, Any], task: str) -> int:
    """Return how many examples a task was measured over; of a group the sum of its tasks'."""
    own = results["n-samples"].get(task)
    if own is not None:
        return int(own["effective"])
    return sum(count_samples(results, name) for name in results.get("group_subtasks", {}).get(task, ()))


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """Keep the harness's bars and messages off the screen; what it warns of goes to the log."""
    harness = logging.getLogger("lm_eval")
    before, told = harness.level, io.StringIO()
    handler = logging.StreamHandler(told)
    harness.addHandler(handler)
    harness.setLevel(logging.WARNING)
    propagated, harness.propagate = harness.propagate, False
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        harness.removeHandler(handler)
        harness.setLevel(before)
        harness.propagate = propagated
        for line in dict.fromkeys(told.getvalue().splitlines()):
            log.debug("harness_said", text=line)


def nearest_names(name: str, known: Sequence[str]) -> str:
    """Return which names of the harness's thousands look like this one, and how tasks of one's own are named."""
    near = difflib.get_close_matches(name, known, n=3)
    known_as = f"Did you mean {' or '.join(map(repr, near))}?" if near else "See `lm-eval ls tasks`."
    return f'{known_as} A task of your own: --benchmark "{{name: lm_eval, include_path: FOLDER}}".'
