"""The settings that a service gets: only what the user set.

Each is sent, listed as a remark or refused; none is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from luthier.errors import suggest_nearest
from luthier.plugins.providing.job_records import Capabilities, Finding, SettingRule

HERE: Final = (  # options that this machine reads, whatever the provider
    *("model.name_or_path", "loss.name", "output_dir", "run_name"),
    *(f"data.{name}" for name in ("train", "validation", "format", "text_unit", "train_on", "unsupervised")),
)
MACHINE: Final = frozenset(  # how a run goes on one's own machine, which a service decides for itself
    (
        *("callbacks", "device", "distributed", "num_threads", "precision", "pure_bf16_update", "torch_compile"),
        *("gradient_checkpointing", "memory_check", "oom_recovery", "max_tokens_per_device", "packing"),
        *("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps", "gradient_flow_steps"),
        *("save_strategy", "save_steps", "save_samples", "save_final", "async_save", "save_total_limit", "save_dtype"),
        *("max_shard_size", "merge", "seed", "eval_steps", "eval_on_start", "max_eval_batches", "on_nonfinite"),
        *("data.num_proc", "data.cache", "data.streaming", "data.shuffle_buffer", "model.dtype", "training_mode"),
    )
)
NEUTRAL: Final = {"quantizer.name": "none", "optimizer.name": "adamw", "data.train_on": "assistant"}


def select_settings(
    given: Mapping[str, Any], capabilities: Capabilities, method: str
) -> tuple[dict[str, Any], list[Finding]]:
    """Return the settings to send, by dotted name, and the findings: refusals as errors, settings not sent as notes."""
    sent: dict[str, Any] = {}
    findings: list[Finding] = []
    for name, value in given.items():
        if name.startswith("provider.") or NEUTRAL.get(name) == value:
            continue
        rule = capabilities.settings.get(name)
        if rule is not None:
            sent[name] = value
            findings += _check_value(name, value, rule, method)
        elif name in MACHINE:
            findings.append(_told("note", name, "is not sent: the service decides it for itself"))
        elif name not in HERE or name == "data.train_on":
            findings.append(_refused(name, capabilities, method))
    return sent, findings


def check_method(method: str, capabilities: Capabilities) -> Iterator[Finding]:
    """Yield an error if the provider does not offer the recipe's loss."""
    if method not in capabilities.methods:
        known = ", ".join(capabilities.methods)
        yield _told("error", "loss", f"{method!r} is not offered for this model; known: {known}")


def _check_value(name: str, value: Any, rule: SettingRule, method: str) -> Iterator[Finding]:
    if rule.methods is not None and method not in rule.methods:
        yield _told("error", name, f"belongs to {' and '.join(rule.methods)}, not to {method}")
    if rule.choices is not None and value not in rule.choices:
        yield _told("error", name, f"{value!r} is not one of {', '.join(map(str, rule.choices))}")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if rule.whole and value != int(value):
            yield _told("error", name, f"the service takes whole numbers only, not {value}")
        if (rule.low is not None and value < rule.low) or (rule.high is not None and value > rule.high):
            yield _told("error", name, f"{value} is outside the service's bounds, {_bounds(rule)}")
    if rule.remark:
        yield _told("note", name, rule.remark)


def _refused(name: str, capabilities: Capabilities, method: str) -> Finding:
    offered = [n for n, rule in capabilities.settings.items() if rule.methods is None or method in rule.methods]
    hint = capabilities.instead.get(name) or suggest_nearest(name, offered) or "It takes none."
    return _told("error", name, f"the service has no such setting. {hint}")


def _bounds(rule: SettingRule) -> str:
    if rule.low is None:
        return f"at most {rule.high:g}"
    return f"at least {rule.low:g}" if rule.high is None else f"{rule.low:g} to {rule.high:g}"


def _told(level: str, name: str, message: str) -> Finding:
    return Finding(level=level, rule="setting", message=message, where=name)
