"""The functions of `import luthier`: train, plan, inspect and others. Torch is imported when they are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from luthier.errors import LuthierError
from luthier.logs import get_logger
from luthier.recipe import Recipe
from luthier.recipe.gather_arguments import gather_arguments, read_arguments
from luthier.recipe.objects import Objects

if TYPE_CHECKING:
    from luthier.artifacts.export import Export
    from luthier.data.inspect_examples import Inspection
    from luthier.recipe import Reading
    from luthier.training.continual.forgetting_report import TaskReport
    from luthier.training.continual.sequence_plan import SequencePlan
    from luthier.training.planning.overfit_batch import Overfit
    from luthier.training.planning.plan_run import Plan
    from luthier.training.run import Run

SequenceGiven = str | Path | Mapping[str, Any] | None
Given = Recipe | str | Path | Mapping[str, Any] | None
PARTS = ("adapter", "loss", "optimizer", "quantizer", "callbacks", "output_dir")


@overload
def train(recipe: Given = None, *, overfit_one_batch: Literal[True] | int, **settings: Any) -> Overfit: ...


@overload
def train(recipe: Given = None, *, overfit_one_batch: Literal[False] = False, **settings: Any) -> Run: ...


def train(
    recipe: Recipe | str | Path | Mapping[str, Any] | None = None, *,
    model: Any = None, tokenizer: Any = None, data: Any = None, eval_data: Any = None, adapter: Any = None,
    loss: Any = None, optimizer: Any = None, quantizer: Any = None, callbacks: Sequence[Any] | None = None,
    output_dir: str | Path | None = None, resume: str | Path | None = None, fresh: bool = False,
    re_decide: bool = False, allow_changed: str | Sequence[str] = (), overfit_one_batch: bool | int = False,
    **settings: Any,
) -> Run | Overfit:  # fmt: skip
    """Train here, and return the `Run`. `recipe` is a file, a mapping or a `Recipe`; what is given beside it wins.

    `model` is a hub name, a folder, `demo`, or a loaded model with its `tokenizer` (also as a pair). `data` is a path,
    a hub name, rows, or a dataset. A part is a name, a mapping, its options object, or an object that keeps the
    protocol. `settings` have the recipe's names (`learning_rate=2e-4`). An unfinished run of the same recipe in the
    same folder goes on; a finished one is returned as it is, or trained anew with `fresh`. `resume` is a checkpoint.
    What the run chose by itself when it began (precision, threads and the like) holds when it goes on, unless
    `re_decide`. What else differs from what it began with is refused, but for what `allow_changed` names: `data`,
    `parts`, `model`, `settings`. `overfit_one_batch` only tries, in a folder apart, whether a hundred steps (or as
    many as it says) learn the first batch by heart, and returns an `Overfit`.
    """
    require_local()
    from luthier.training.planning.overfit_batch import STEPS, overfit_first_batch
    from luthier.training.trainers.start_training import start_training

    given = _given(adapter, loss, optimizer, quantizer, callbacks, output_dir, settings)
    recipe, objects = _gather_named(recipe, model, tokenizer, data, eval_data, given)
    if overfit_one_batch:
        return overfit_first_batch(recipe, objects, STEPS if overfit_one_batch is True else overfit_one_batch)
    return start_training(recipe, objects, resume, allow_changed, fresh=fresh, re_decide=re_decide)


@overload
def continual(recipe: SequenceGiven = None, *, dry_run: Literal[True], **settings: Any) -> SequencePlan: ...


@overload
def continual(recipe: SequenceGiven = None, *, dry_run: Literal[False] = False, **settings: Any) -> TaskReport: ...


def continual(
    recipe: str | Path | Mapping[str, Any] | None = None, *, output_dir: str | Path | None = None, fresh: bool = False,
    dry_run: bool = False, allow_changed: str | Sequence[str] = (), **settings: Any,
) -> TaskReport | SequencePlan:  # fmt: skip
    """Train tasks one after the other in one adapter, and return the report of what each task has done to the others.

    `recipe` is an ordinary recipe, a file or a mapping, with `tasks: [{name:, data:}, ...]`, or with `num_runs`,
    `steps_per_run` and `samples_per_run`, which cut its own data into runs; `settings` win over it. Each task is a run
    in a folder inside `output_dir`; the same call goes on where it was cut off, and another where `allow_changed` names
    what differs, as in `train`. `fresh` starts again in a new folder beside the existing one. With `dry_run` all is
    checked, nothing is trained or written, and what each task would be is returned as a `SequencePlan`.
    """
    require_local()
    from luthier.runs.writing.differences import read_allowed
    from luthier.training.continual.start import plan_sequence, train_sequence

    allowed = read_allowed(allow_changed)
    if dry_run:
        return plan_sequence(recipe, settings, {}, output_dir, allowed, fresh=fresh)
    return train_sequence(recipe, settings, {}, output_dir, allowed, fresh=fresh)


def multi_run(
    recipe: str | Path | Mapping[str, Any] | None = None, *, num_runs: int, output_dir: str | Path | None = None,
    **settings: Any,
) -> TaskReport:  # fmt: skip
    """Cut one data set into `num_runs` runs and train them one after the other; see `continual`."""
    return continual(recipe, output_dir=output_dir, num_runs=num_runs, **settings)


def plan(
    recipe: Recipe | str | Path | Mapping[str, Any] | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    data: Any = None,
    eval_data: Any = None,
    adapter: Any = None,
    loss: Any = None,
    optimizer: Any = None,
    quantizer: Any = None,
    callbacks: Sequence[Any] | None = None,
    output_dir: str | Path | None = None,
    **settings: Any,
) -> Plan:
    """Return what a run would be: parts, parameters, memory, steps, packing, time; nothing is trained or written.

    Of a model that is named the config alone is read, so that any size is planned in seconds. `data` may be left out:
    steps are then unknown, and memory is that of rows of `data.max_length` tokens.
    """
    require_local()
    from luthier.recipe.rowless import with_or_without_rows
    from luthier.training.planning.plan_run import plan as plan_run

    given = _given(adapter, loss, optimizer, quantizer, callbacks, output_dir, settings)
    return plan_run(
        *with_or_without_rows(lambda more: _gather_named(recipe, model, tokenizer, data, eval_data, {**given, **more}))
    )


def _gather_named(recipe: Any, model: Any, tokenizer: Any, data: Any, eval_data: Any,
                  given: dict[str, Any]) -> tuple[Recipe, Objects]:  # fmt: skip
    """Return the recipe and the objects of a call; a model that is handed over is named by its checkpoint."""
    from luthier.training.handed_model import name_base

    read, objects = gather_arguments(recipe, model, tokenizer, data, eval_data, given)
    return name_base(read, objects), objects


def inspect(
    recipe: Recipe | str | Path | Mapping[str, Any] | None = None,
    *,
    rows: int = 3,
    model: Any = None,
    tokenizer: Any = None,
    data: Any = None,
    eval_data: Any = None,
    **settings: Any,
) -> Inspection:
    """Examples as the loss would see them, what was dropped and why, and how long the rows are.

    A recipe that names no loss may have rows of any kind. Neither torch nor transformers is imported where the
    tokenizer's files say all that it does.
    """
    reading, objects = read_arguments(recipe, model, tokenizer, data, eval_data, settings)
    return inspect_reading(reading, objects, rows=rows)


def inspect_reading(reading: Reading[Recipe], objects: Objects | None = None, *, rows: int) -> Inspection:
    """Return what `inspect` does, of a recipe that was read."""
    from luthier.data.formats.wanted import Wanted
    from luthier.data.inspect_examples import inspect as look
    from luthier.data.prepare import prepare_data
    from luthier.data.stream.row_stream import sampled_rows
    from luthier.recipe import resolve_parts

    recipe, objects = reading.recipe, objects or Objects()
    tokenizer = objects.tokenizer or _light_tokenizer(recipe.model, recipe.data.chat_template_kwargs or {})
    names_loss = any(name.partition(".")[0] == "loss" for name in reading.given)
    wanted = Wanted.of_part(resolve_parts(recipe).loss) if names_loss else Wanted(kind="any")
    prepared = prepare_data(recipe.data, tokenizer, seed=recipe.seed, wanted=wanted, given=objects.data,
                            given_validation=objects.eval_data)  # fmt: skip
    if wanted.kind == "any" and len(sampled_rows(prepared.train).names) > 1:
        problem = "these rows are pairs, which the loss of this recipe does not take"
        get_logger().warning(problem, remedy="name a loss that takes pairs, such as --loss dpo")
    return look(prepared, tokenizer, rows=rows)


def generate(
    model: str | Path, prompt: str | Sequence[Mapping[str, Any]], *,
    base: str | None = None, system: str | None = None, max_new_tokens: int = 128, temperature: float = 0.0,
    top_p: float = 1.0, seed: int = 0, device: str = "auto", step: int | None = None, best: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> str:  # fmt: skip
    """Return the answer to `prompt` of the model at `model`: a run, an adapter's folder, a model folder, or a hub name.

    Of a run that is not done its newest checkpoint answers; `step` and `best` choose one, as its folder does. `on_text`
    is called with each piece of the answer as it comes.
    """
    require_local()
    from luthier.hardware.devices import choose_device
    from luthier.model.generation.generate import PromptForm, Sampling, generate_text, prompt_messages
    from luthier.training.trained.open_weights import open_weights
    from luthier.training.trained.weights_place import find_weights

    opened = open_weights(find_weights(model, step=step, best=best), choose_device(device), base)
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    asked, form = prompt_messages(prompt, system), PromptForm.of_note(opened.note)
    return generate_text(
        opened.model, opened.tokenizer, asked, adapter=opened.adapter, form=form, sampling=sampling, on_text=on_text
    )


def merge(
    path: str | Path,
    output_dir: str | Path | None = None,
    *,
    base: str | None = None,
    save_dtype: str | None = None,
    max_shard_size: str | None = None,
    onto: Literal["dequantized", "original"] = "dequantized",
    step: int | None = None,
    best: bool = False,
) -> Path:
    """Fold the adapter of a run or an adapter's folder into its base: a folder that plain transformers loads.

    Its files have the dtype and the size that the run's recipe gives them, where those are not given here. Of a run
    that is not done its newest checkpoint is taken; `step` and `best` choose one, as a checkpoint's folder does.
    `onto` chooses the weights that the update of a quantized layer is added to: what the layer computes, or the
    checkpoint's. How far the outputs of either are from those that were trained stands in the folder's `luthier.json`,
    under `merge`. A merge whose update the files' dtype would round away is refused.
    """
    require_local()
    from luthier.training.trained.merge_weights import merge_weights
    from luthier.training.trained.weights_place import find_weights

    place = find_weights(path, step=step, best=best)
    return merge_weights(place, None if output_dir is None else Path(output_dir), base=base, onto=onto,
                         save_dtype=save_dtype, max_shard_size=max_shard_size)  # fmt: skip


def export(
    path: str | Path,
    format: str | Mapping[str, Any],  # noqa: A002 - the word that people know it by
    output_dir: str | Path | None = None,
    *,
    base: str | None = None,
    dry_run: bool = False,
    step: int | None = None,
    best: bool = False,
) -> Export:
    """Write the model of a run, of an adapter's folder or of a model in the format of an installed exporter.

    `format` is its name, or `{name: ..., options}`. Returns the folder, its files, and the differences that the
    exporter found when it read them back. With `dry_run` everything is checked that needs no weights. Of a run that
    is not done its newest checkpoint is taken; `step` and `best` choose one, as a checkpoint's folder does.
    """
    require_local()
    from luthier.training.trained.export_weights import export_weights
    from luthier.training.trained.weights_place import find_weights

    folder, place = None if output_dir is None else Path(output_dir), find_weights(path, step=step, best=best)
    return export_weights(place, format, folder, base=base, dry_run=dry_run)


def _given(adapter: Any, loss: Any, optimizer: Any, quantizer: Any, callbacks: Any, output_dir: Any,
           settings: dict[str, Any]) -> dict[str, Any]:  # fmt: skip
    values = (adapter, loss, optimizer, quantizer, callbacks, None if output_dir is None else str(output_dir))
    return {**settings, **{name: v for name, v in zip(PARTS, values, strict=True) if v is not None}}


def _light_tokenizer(model: Any, template_settings: Mapping[str, Any]) -> Any:
    """Return the model's tokenizer from its own files, by transformers if they or the template's settings need it."""
    require_local("numpy", "tokenizers", "jinja2")
    from luthier.data.tokenise.plain.file_tokenizer import read_tokenizer

    if (light := read_tokenizer(model, template_settings)) is not None:
        return light
    require_local()
    from luthier.model.load import tokenizer_of

    return tokenizer_of(model)


def require_local(*needed: str) -> None:
    """Training needs torch; the core alone does not. `needed` names the libraries; without any, those of training."""
    from importlib.util import find_spec

    libraries = needed or ("torch", "transformers", "safetensors", "numpy")
    missing = [name for name in libraries if find_spec(name) is None]
    if missing:
        raise LuthierError("dependency-missing", f"{', '.join(missing)} not installed",
                           remedy='pip install "luthier[local]"')  # fmt: skip
