"""Options classes made from TRL's configs: the same names, types, defaults and help, without what does not map."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import typing
import warnings
from typing import Any, Final

import attrs
import transformers
from luthier import LuthierError, option

from luthier_trl import CONFIGS
from luthier_trl.rewards import name_function

PREFIX: Final = "trl."
HOMES: Final = {
    "grpo": "trl",
    "rloo": "trl",
    "gmpo": "trl.experimental.gmpo",
    "online_dpo": "trl.experimental.online_dpo",
}
OMITTED: Final = frozenset(
    (
        *("model_init_kwargs", "trust_remote_code", "router_aux_loss_coef", "cast_lm_head_to_fp32"),  # Luthier's model
        *("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),  # the reference has no weights of its own
        *("generation_batch_size", "steps_per_generation", "ds3_gather_for_generation", "pad_to_multiple_of"),
        *("use_transformers_continuous_batching", "transformers_continuous_batching_config", "use_transformers_paged"),
        *("chat_template_kwargs", "max_tool_calling_iterations", "reward_model_path", "max_length"),
        *("log_completions", "log_multimodal", "num_completions_to_print", "log_unique_prompts"),
        *("log_completions_hub_repo", "off_policy_mask_threshold", "use_bias_correction_kl", "num_generations_eval"),
    )
)
ENGINES: Final = ("vllm_", "use_vllm")  # engines that cannot run Luthier's adapters


@functools.cache
def trl_classes(method: str) -> tuple[Any, Any]:
    """Return TRL's config and trainer of a method. Experimental ones would warn when they are imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        home = importlib.import_module(HOMES[method])
    name = CONFIGS[method]
    return getattr(home, name), getattr(home, name.replace("Config", "Trainer"))


def options_for(record_name: str) -> type:
    """Return the options class of `trl.<method>`, the same object each time."""
    return options_class(record_name.removeprefix(PREFIX))


@functools.cache
def options_class(method: str) -> type:
    """Return a frozen class whose attribute `method` names the trainer."""
    fields = offered_fields(method)
    hints: dict[str, Any] = {"reward": Any, **{field.name: hint_of(method, field) for field in fields}}
    text = "The reward: the name of an entry point, `module:function`, or in Python the function; or a list of these."
    body = {"reward": option(help=text), **{field.name: _option(method, field) for field in fields}}
    about = {"__doc__": f"Options of `trl.{method}`.", "__module__": __name__, "method": method,
             "__annotations__": hints, "__attrs_post_init__": _settle_reward}  # fmt: skip
    return attrs.frozen(kw_only=True)(type(trl_classes(method)[0].__name__, (), {**body, **about}))


def offered_fields(method: str) -> list[dataclasses.Field[Any]]:
    """Return the fields of TRL's config that are offered."""
    common = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    own = [field for field in dataclasses.fields(trl_classes(method)[0]) if field.name not in common | OMITTED]
    return [field for field in own if not field.name.startswith(ENGINES)]


def hint_of(method: str, field: dataclasses.Field[Any]) -> Any:
    """Return the type of a field for a recipe, in which a mapping cannot be a text."""
    hint = typing.get_type_hints(trl_classes(method)[0])[field.name]
    if dict in typing.get_args(hint):
        return dict[str, Any] | None
    return hint | None if _default(field) is None else hint


def given_options(options: Any) -> dict[str, Any]:
    """Return the arguments for TRL's config from these options."""
    return {field.name: getattr(options, field.name) for field in offered_fields(options.method)}


def _option(method: str, field: dataclasses.Field[Any]) -> Any:
    text = " ".join(str(field.metadata.get("help") or f"See {trl_classes(method)[0].__name__} of TRL.").split())
    if field.default_factory is not dataclasses.MISSING:
        return option(factory=field.default_factory, help=text)
    return option(_default(field), help=text)


def _default(field: dataclasses.Field[Any]) -> Any:
    return attrs.NOTHING if field.default is dataclasses.MISSING else field.default


def _settle_reward(self: Any) -> None:
    """Replace functions by names, so that the options are plain data."""
    given = self.reward if isinstance(self.reward, (list, tuple)) else [self.reward]
    names = [name_function(each) if callable(each) else each for each in given]
    if not names or not all(isinstance(name, str) for name in names):
        remedy = "Write a name, module:function, or a list of these."
        raise LuthierError("recipe-wrong-type", "no reward", where="reward", found=self.reward, remedy=remedy)
    object.__setattr__(self, "reward", names if len(names) > 1 else names[0])
