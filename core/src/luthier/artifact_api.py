"""The Python functions for trained models: evaluate, load, combine, unmerge, push. Torch is imported when they run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from luthier.api import require_local

if TYPE_CHECKING:
    from luthier.artifacts.push import Push
    from luthier.training.trained.evaluate_weights import Evaluation
    from luthier.training.trained.loaded import Loaded


def evaluate(
    path: str | Path, data: str | Path | None = None, *, metrics: Sequence[str | Mapping[str, Any]] = (),
    step: int | None = None, best: bool = False, against: str | Path | None = None, gate: str = "eval_loss",
    max_regression: float | None = None, resamples: int = 1000, max_answers: int | None = None,
    max_new_tokens: int | None = None, device: str | None = None, tasks: Sequence[str] = (),
    benchmark: str | Mapping[str, Any] = "lm_eval", engine: Any = None,
) -> Evaluation:  # fmt: skip
    """Measure a run, a checkpoint, an adapter or a model over `data`, or over the run's own validation rows.

    With `tasks` it is measured over these tasks of a `benchmark`, a plugin's, and over rows only if `data` is given.
    With an `engine`, a plugin's or an object, nothing but the metrics over answers is measured, and the engine answers:
    a server that has the exported model loaded, for example. No weights are then read.

    Each number has its bootstrap interval of so many `resamples` (0: none; rows then share passes). `metrics` are
    added to the recipe's. `against` is measured on the same rows by the same loss; with `max_regression` the result
    says whether `gate` is worse by no more than that. Of a run that is not done its newest checkpoint is measured.
    """
    require_local()
    from luthier.training.trained.evaluate_weights import Measuring, evaluate_weights
    from luthier.training.trained.weights_place import find_weights

    how = Measuring(data=None if data is None else str(data), metrics=tuple(metrics), resamples=resamples,
                    max_answers=max_answers, max_new_tokens=max_new_tokens, device=device, gate=gate,
                    max_regression=max_regression, tasks=tuple(tasks), benchmark=benchmark, engine=engine)  # fmt: skip
    other = None if against is None else find_weights(against)
    return evaluate_weights(find_weights(path, step=step, best=best), how, other)


def load(path: str | Path, *, device: str = "auto") -> Loaded:
    """Return the model of a run or an artifact's folder, ready to answer.

    `loaded.with_adapter(other)` puts another adapter over the same weights in memory; both then answer.
    """
    require_local()
    from luthier.hardware.devices import choose_device
    from luthier.training.trained.loaded import load_artifact

    return load_artifact(path, choose_device(device))


def combine(
    paths: Sequence[str | Path], output_dir: str | Path, *,
    method: Literal["linear", "ties", "dare_linear", "dare_ties", "cat", "slao"] = "linear",
    weights: Sequence[float] | None = None, density: float | None = None, seed: int | None = None,
) -> Path:  # fmt: skip
    """Make one low-rank adapter of several runs' or folders' of one base, and return its folder.

    `linear`, `ties` and the two of DARE work on each factor, as PEFT's `add_weighted_adapter`; `cat` adds up the
    updates themselves, and the ranks; `slao` merges them in their order. `weights`: one of each, None for equal ones.
    `density` is the share of numbers that TIES and DARE keep, `seed` decides which DARE does.
    """
    require_local()
    from luthier.artifacts.combine import Combination, combine_folders
    from luthier.step.opened import artifact_folder

    asked = Combination(method=method, weights=None if weights is None else tuple(weights), density=density, seed=seed)
    return combine_folders([artifact_folder(Path(path)) for path in paths], asked, Path(output_dir))


def unmerge(merged: str | Path, adapter: str | Path, output_dir: str | Path, *, save_dtype: str | None = None) -> Path:
    """Take an adapter's update out of the model that it was merged into, and return the folder of the base.

    Where the base that the adapter names still lies here, its weights come back bit for bit; else to the rounding of
    the merged files. An adapter that does more than add to weights (DoRA, whole modules) is refused.
    """
    require_local()
    import torch

    from luthier.artifacts.unmerge import unmerge_folder
    from luthier.model.weights.dense_files import file_options
    from luthier.step.opened import artifact_folder

    dtype = file_options(save_dtype, None).get("dtype")
    return unmerge_folder(Path(merged), artifact_folder(Path(adapter)), Path(output_dir),
                          None if dtype is None else getattr(torch, dtype))  # fmt: skip


def push(
    path: str | Path, repository: str, *, private: bool = True, revision: str = "main", message: str | None = None,
    dry_run: bool = False,
) -> Push:  # fmt: skip
    """Send the artifact of a run, or an artifact's folder, to a repository of the Hugging Face hub.

    With `dry_run` nothing is asked of the hub; the files that would be sent are returned. The key is the one that
    `hf auth login` or HF_TOKEN has left; it stands in no output.
    """
    require_local()
    from luthier.artifacts.push import push_folder
    from luthier.step.opened import artifact_folder

    return push_folder(artifact_folder(Path(path)), repository, private=private, revision=revision, message=message,
                       dry_run=dry_run)  # fmt: skip
