"""The trainer: it turns a recipe into TRL's config, and runs TRL's loop over a session of Luthier."""

from __future__ import annotations

import copy
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import datasets
import transformers
from luthier import LuthierError, PromptRow, Recipe, TrainerSession
from torch import nn
from trl.trainer.utils import add_fused_lm_head

from luthier_trl.bridge import SessionCallback, connected_trainer
from luthier_trl.loop_state import place_state
from luthier_trl.options import given_options, trl_classes
from luthier_trl.rewards import ROW, CheckedReward, check_names, find_reward

SCHEDULES: Final = tuple(kind.value for kind in transformers.SchedulerType)
CHOICES: Final = {
    "precision": ("auto", "float32", "bf16"),
    "gradient_checkpointing": (False, True),
    "lr_scheduler_type": SCHEDULES,
    "reference": ("auto", "initial", "base"),
    "data.overlong": ("auto", "drop", "error"),
}
HEAD: Final = "lm_head"  # its name in most models; other names are found when the model is loaded
REWARD: Final = "trainer.reward"
NUMBERS: Final = (
    "learning_rate",
    "global_batch_size",
    "max_tokens_per_device",
)  # settings that may be `auto` in other runs


class TrlTrainer:
    """The trainer of TRL that `options.method` names."""

    def __init__(self, options: Any) -> None:
        self.options = options
        self.config_class, self.trainer_class = trl_classes(options.method)
        self.where = f"trainer trl.{options.method}"
        self.told: SessionCallback | None = None

    def check(self, recipe: Recipe) -> None:
        """Raise for settings that TRL does not have, options that it refuses, and rewards that do not exist."""
        self._check_settings(recipe)
        if self._group is None or self._group < 1:
            problem = f"{self.where} compares several answers to a prompt, so it needs their number"
            raise LuthierError("recipe-out-of-range", problem, where="trainer.num_generations", found=self._group,
                               remedy="Set it to 2 or more.")  # fmt: skip
        refuse_head(recipe.to_dict()["adapter"])
        check_names(self.reward_names, REWARD)
        arguments = self.configuration(recipe, "unused", use_cpu=True)
        if recipe.reference != "auto" and not self._needs_reference(arguments):
            raise LuthierError("recipe-conflict", f"nothing reads it: {self.where} has a beta of 0", where="reference",
                               found=recipe.reference, remedy="Leave it out, or set trainer.beta.")  # fmt: skip

    def _check_settings(self, recipe: Recipe) -> None:
        """Raise for a value of a setting that TRL does not support."""
        for name, known in CHOICES.items():
            value = getattr(recipe.data, name[5:]) if name.startswith("data.") else getattr(recipe, name)
            if value not in known:
                raise LuthierError("recipe-out-of-range", f"{self.where} has no such choice", where=name, found=value,
                                   remedy=f"Choose one of: {', '.join(map(str, known))}.")  # fmt: skip
        for name in NUMBERS:
            if getattr(recipe, name) == "auto":
                raise LuthierError("recipe-out-of-range", f"{self.where} needs a number", where=name, found="auto",
                                   remedy="Write one.")  # fmt: skip
        if self.options.method == "online_dpo" and recipe.data.validation:
            raise LuthierError("recipe-conflict", f"nothing reads it: {self.where} does not evaluate",
                               where="data.validation", remedy="Leave it out.")  # fmt: skip

    def check_rows(self, recipe: Recipe, rows: Sequence[PromptRow], validation: Sequence[PromptRow]) -> None:
        """Raise if the rows lack a column that a reward reads, or do not fill one step of TRL."""
        self._rewards((*rows, *validation))
        size = int(recipe.global_batch_size)
        if self.options.method != "online_dpo" and len(rows) < size:  # online DPO takes a smaller step
            problem = f"a step needs {size} prompts, but there are only {len(rows)}"
            raise LuthierError("recipe-out-of-range", problem, where="global_batch_size", found=size,
                               remedy="Lower it, or give more rows.")  # fmt: skip

    @property
    def reward_names(self) -> list[str]:
        """Return the names of the rewards, in the order of `reward_weights`."""
        reward = self.options.reward
        return reward if isinstance(reward, list) else [reward]

    def train(self, session: TrainerSession) -> None:
        """Run all steps of the session with TRL."""
        head = session.model.get_output_embeddings()
        if type(head) is not nn.Linear:
            raise LuthierError("part-unsupported", "TRL reads the weight of the head, which has an adapter or another "
                               "form", where="adapter.target_modules", found=type(head).__name__)  # fmt: skip
        with tempfile.TemporaryDirectory() as folder, _unpatched(session.model):
            use_cpu = session.model.device.type == "cpu"
            arguments = self.configuration(session.recipe, folder, use_cpu=use_cpu)
            arguments.eval_on_start &= session.resumed is None
            trainer = self._made(session, arguments)
            if session.resumed is not None:
                place_state(trainer, session.resumed, Path(folder))
            trainer.train(resume_from_checkpoint=None if session.resumed is None else folder)

    def state(self) -> dict[str, Any] | None:
        """Return what TRL's loop needs to go on after the step that ends."""
        return None if self.told is None else self.told.state()

    def _rewards(self, rows: Sequence[PromptRow]) -> list[CheckedReward]:
        return [CheckedReward.of_function(name, find_reward(name, REWARD), rows) for name in self.reward_names]

    def _made(self, session: TrainerSession, arguments: Any) -> Any:
        """Return TRL's trainer for the session's model, with a reference if the objective has one."""
        reference = session.reference() if self._needs_reference(arguments) else None
        beta = arguments.beta
        rows, val_set = numbered_prompts(session.rows, 0), numbered_prompts(session.validation, len(session.rows))
        rewards = self._rewards((*session.rows, *session.validation))
        also = {"ref_model": reference} if self.options.method == "online_dpo" else {}
        if not also:
            arguments.beta = 0.0  # otherwise TRL loads the model a second time, by its name
        callback = self.told = SessionCallback(session)
        with explained(self.where):
            trainer = connected_trainer(self.trainer_class, session)(
                model=session.model, reward_funcs=rewards, args=arguments, train_dataset=rows,
                eval_dataset=val_set if session.validation else None, processing_class=copy.deepcopy(session.tokenizer),
                optimizers=(session.optimizer, None), callbacks=[callback], **also,
            )  # fmt: skip
        callback.trainer = trainer
        trainer.remove_callback(transformers.PrinterCallback)
        if not also:
            arguments.beta = trainer.beta = beta
            trainer.ref_model = reference
        if isinstance(reference, transformers.PreTrainedModel) and not also:
            add_fused_lm_head(reference, temperature=arguments.temperature)  # as TRL does with its own reference
        return trainer

    def _needs_reference(self, arguments: Any) -> bool:
        return self.options.method == "online_dpo" or arguments.beta != 0.0

    def configuration(self, recipe: Recipe, folder: str, *, use_cpu: bool) -> Any:
        """Return TRL's config for a recipe. Raises `recipe-out-of-range` with TRL's words if it refuses."""
        size, accumulation = self._batch(recipe)
        arguments = {
            **given_options(self.options),
            **run_settings(recipe),
            "output_dir": folder,
            "per_device_train_batch_size": size,
            "per_device_eval_batch_size": self._group,
            "gradient_accumulation_steps": accumulation,
            "dataloader_pin_memory": not use_cpu,
            "use_cpu": use_cpu,
        }
        if self.options.method == "online_dpo":
            arguments["max_length"] = recipe.data.max_length + self.options.max_new_tokens
        with explained(self.where), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about names that TRL itself sets
            return self.config_class(**arguments)

    @property
    def _group(self) -> Any:
        """Return the answers that TRL counts for each prompt. Online DPO counts prompts."""
        return 1 if self.options.method == "online_dpo" else self.options.num_generations

    def _batch(self, recipe: Recipe) -> tuple[int, int]:
        """Return the largest size of a pass that divides the step and fits `max_tokens_per_device`, and the number."""
        is_online = self.options.method == "online_dpo"
        answer = self.options.max_new_tokens if is_online else self.options.max_completion_length
        longest = (recipe.data.max_length + (answer or 0)) * (2 if is_online else 1)
        total = int(recipe.global_batch_size) * self._group
        most = max(int(recipe.max_tokens_per_device) // longest, 1)
        size = max(number for number in range(1, min(most, total) + 1) if total % number == 0)
        return size, total // size


def run_settings(recipe: Recipe) -> dict[str, Any]:
    """Return transformers' training arguments for a recipe. TRL itself reports, saves and sends nothing."""
    return {
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": recipe.lr_scheduler_type,
        "warmup_steps": recipe.warmup_steps or recipe.warmup_ratio,
        "num_train_epochs": recipe.num_train_epochs,
        "max_steps": -1 if recipe.max_steps is None else recipe.max_steps,
        "max_grad_norm": recipe.max_grad_norm or 0.0,
        "bf16": recipe.precision == "bf16",
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "logging_steps": recipe.logging_steps,
        "eval_strategy": "no" if recipe.eval_steps is None else "steps",
        "eval_steps": recipe.eval_steps,
        "eval_on_start": recipe.eval_on_start,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": recipe.seed,
    }


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Raise `recipe-out-of-range` with TRL's words if it refuses something inside the block."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        problem, remedy = f"TRL says: {error}", "Change the option that it names."
        raise LuthierError("recipe-out-of-range", problem, where=where, remedy=remedy) from error


def numbered_prompts(rows: Sequence[PromptRow], start: int) -> datasets.Dataset:
    """Return the prompts as TRL takes them, each with the number of its row, which counts from `start`.

    The table holds only numbers, because an Arrow column has one type, and would fill messages with missing keys.
    """
    prompts = [row.prompt for row in rows]

    def look_up(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        return {"prompt": [copy.deepcopy(prompts[number - start]) for number in batch[ROW]], ROW: batch[ROW]}

    return datasets.Dataset.from_dict({ROW: list(range(start, start + len(rows)))}).with_transform(look_up)


def refuse_head(adapter: Mapping[str, Any]) -> None:
    """Raise `part-unsupported` if an adapter's options name the head, whose plain weight TRL reads."""
    for option in ("target_modules", "modules_to_save"):
        named = adapter.get(option) or ()
        if _fits_head(named) if isinstance(named, str) else any(name.rpartition(".")[2] == HEAD for name in named):
            raise LuthierError("part-unsupported", "TRL reads the weight of the head, which may have no adapter",
                               where=f"adapter.{option}", found=HEAD, remedy="Leave the head out.")  # fmt: skip


def _fits_head(pattern: str) -> bool:
    try:
        return re.fullmatch(pattern, HEAD) is not None
    except re.error:  # the adapter itself reports a broken pattern
        return False


@contextmanager
def _unpatched(model: Any) -> Iterator[None]:
    """Restore the model afterwards: TRL replaces its forward, and sets a padding token in its configs."""
    configs = (model.config.get_text_config(), model.generation_config)
    before, had_forward = [config.pad_token_id for config in configs], "forward" in vars(model)
    try:
        yield
    finally:
        if not had_forward:
            vars(model).pop("forward", None)
        for config, token in zip(configs, before, strict=True):
            config.pad_token_id = token
