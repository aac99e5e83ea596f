"""What luthier-trl offers: TRL's trainers whose policy generates the answers, described without importing TRL."""

from __future__ import annotations

from typing import Any, Final

from luthier import TrainerRecord, hookimpl

__all__ = ["luthier_trainers"]

SETTINGS: Final = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "max_grad_norm"),
    *("num_train_epochs", "max_steps", "global_batch_size", "max_tokens_per_device"),
    *("precision", "gradient_checkpointing", "logging_steps", "reference"),
    *("data.max_length", "data.overlong", "data.chat_template"),
)
EVALUATING: Final = ("eval_steps", "eval_on_start")
SUMMARIES: Final = {
    "grpo": "TRL's GRPO: answers of one prompt are compared with their group's mean reward.",
    "rloo": "TRL's RLOO: REINFORCE with the mean reward of the group's other answers as baseline.",
    "gmpo": "TRL's GMPO: GRPO over the geometric mean of the tokens' ratios.",
    "online_dpo": "TRL's online DPO: of two answers to a prompt the one with the higher reward is chosen.",
}
CONFIGS: Final = {"grpo": "GRPOConfig", "rloo": "RLOOConfig", "gmpo": "GMPOConfig", "online_dpo": "OnlineDPOConfig"}


@hookimpl
def luthier_trainers() -> list[TrainerRecord]:
    """Return the records of all trainers."""
    return [
        TrainerRecord(
            name=f"trl.{name}",
            summary=summary,
            options="luthier_trl.options:options_for",
            build="luthier_trl.trl_trainer:TrlTrainer",
            needs=("trainable-weights", "reference"),
            conflicts="closure",
            settings=SETTINGS if name == "online_dpo" else (*SETTINGS, *EVALUATING),
        )
        for name, summary in SUMMARIES.items()
    ]


def __getattr__(name: str) -> Any:
    """Return an options class by the name of TRL's: `luthier_trl.GRPOConfig(reward=my_function)` is `trl.grpo`."""
    methods = [method for method, config in CONFIGS.items() if config == name]
    if not methods:
        raise AttributeError(f"module 'luthier_trl' has no attribute {name!r}")
    from luthier_trl.options import options_class

    return options_class(methods[0])
