"""The settings of a recipe: each with its type, default, bounds and meaning."""

from __future__ import annotations

from typing import Any, Literal, get_args

import attrs

from luthier.errors import LuthierError
from luthier.plugins.options import option

Overlong = Literal["drop", "truncate", "split", "error"]
Role = Literal["system", "developer", "user", "assistant", "tool"]


@attrs.frozen(kw_only=True)
class Model:
    """The base model. In a recipe a string stands for `name_or_path`."""

    name_or_path: str = option(help="A hub name, a folder, or `demo` for the embedded model.")
    revision: str | None = option(None, help="Branch, tag or commit of a hub model.")
    tokenizer: str | None = option(None, help="Another tokenizer than the model's own: a hub name or folder.")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = option(
        "float32", help="The dtype that the weights are loaded in; auto: the checkpoint's own."
    )
    dropout: float | None = option(
        None,
        help="The rate of every dropout that the model has; none: its own rates, or 0 with a loss such as dpo.",
        low=0.0,
        high=0.99,
    )


@attrs.frozen(kw_only=True)
class OtherModel:
    """A frozen model besides the one that trains: a teacher or a reference."""

    model: Model = option(help="The model: a hub name, a folder, or a run of Luthier or its adapter.")
    quantizer: Any = option("none", help="How its weights are stored: a quantizer's name, or {name: ..., options}.")
    adapter: str | None = option(None, help="The folder of a trained adapter to put on this model.")


@attrs.frozen(kw_only=True)
class Source:
    """A source of rows. In a recipe a string stands for `path`."""

    path: str = option(help="A file, a glob of files, or a hub dataset's name.")
    split: str = option("train", help="The split, for a hub dataset.")
    name: str | None = option(None, help="The configuration's name (or subset), for a hub dataset.")
    revision: str | None = option(None, help="Branch, tag or commit of a hub dataset.")
    columns: dict[str, str] = option(factory=dict, help="Our column: the data's column, such as {prompt: question}.")
    template: dict[str, str] = option(
        factory=dict, help="Our column: a text with {fields} of the row, such as {prompt: 'Q: {question}'}."
    )
    max_rows: int | None = option(None, help="Read at most this many rows.", low=1, high=10**15)
    share: float | None = option(
        None, help="The share of an epoch that its rows make up, such as 0.3; sources without share fill the rest.",
        low=1e-6, high=1.0,
    )  # fmt: skip
    repeat: int = option(1, help="How often its rows come in an epoch.", low=1, high=10_000)
    weight: float = option(
        1.0, help="Multiplies the loss of its rows, and counts in the denominator.", low=1e-6, high=1e6
    )


@attrs.frozen(kw_only=True)
class Data:
    """The rows, and how they become supervised tokens. In a recipe a path or a list of sources stands for `train`."""

    train: list[Source] = option(help="Where the training rows come from.")
    validation: float | list[Source] = option(0.0, help="A share of the rows (0 to 0.5), or sources like train.")
    format: Literal[
        "auto",
        "messages",
        "sharegpt",
        "alpaca",
        "prompt_completion",
        "chatml",
        "text",
        "tokens",
        "preference",
        "unpaired",
    ] = option("auto", help="The rows' format; auto recognises it.")
    text_unit: Literal["line", "paragraph", "file"] = option("paragraph", help="One document of a plain text file.")
    max_length: int = option(2048, help="Tokens of the longest example.", low=2)
    overlong: Overlong | Literal["auto"] = option(
        "auto", help="Longer examples: drop, truncate, split or error; auto: split documents, drop the rest."
    )
    chat_template: str | None = option(
        None, help="A Jinja chat template, or the path of one, instead of the tokenizer's."
    )
    chat_template_kwargs: dict[str, Any] = option(
        factory=dict, help="Variables for the chat template, such as {enable_thinking: false}; a row's own come first."
    )
    train_on: Literal["assistant", "last", "all"] | list[Role] = option(
        "assistant",
        help="Supervise the assistant's tokens, those of the last answer alone, all, or those of a list of roles.",
    )
    bad_rows: Literal["error", "drop"] = option(
        "error", help="Rows that are broken, empty, unsupervised or unprovable: an error that lists them, or drop them."
    )
    max_bad_rows: int | float | None = option(
        None, help="With bad_rows: drop, fail above so many rows, or above such a share (0.01).", low=0
    )
    unrendered: Literal["error", "warn"] = option(
        "error", help="What to do with a message, tools or a thought that the chat template leaves out."
    )
    unsupervised: Literal["error", "drop"] | None = option(
        None, help="What to do with a row without supervised tokens; none: as bad_rows says."
    )
    block_size: int | None = option(
        None, help="Pretraining: join documents with EOS and cut them into blocks of so many tokens.", low=2
    )
    streaming: bool = option(False, help="Read and tokenise rows as the run goes, in bounded memory.")
    shuffle_buffer: int = option(1024, help="Streaming: examples held in memory to shuffle and pack from.", low=1)
    num_proc: int | None = option(
        None, help="Processes that tokenise; none: chosen by the number of rows and free cores.", low=1
    )
    cache: bool = option(True, help="Keep tokenised rows on disk, found again by the hash of all that made them.")

    def __attrs_post_init__(self) -> None:
        """Put roles into one order. The assistant alone is the default."""
        if isinstance(self.train_on, str):
            return
        if not self.train_on:
            remedy = f"Name some of: {', '.join(get_args(Role))}."
            raise LuthierError("recipe-missing", "no role is named", where="Data.train_on", found=[], remedy=remedy)
        roles = [role for role in get_args(Role) if role in self.train_on]
        object.__setattr__(self, "train_on", "assistant" if roles == ["assistant"] else roles)


@attrs.frozen(kw_only=True)
class Distributed:
    """How several processes train one model. In a recipe a string stands for `strategy`."""

    strategy: Literal["auto", "ddp", "fsdp"] = option(
        "auto", help="ddp: a copy in each process; fsdp: shards (FSDP2); auto: fsdp where a copy would not fit."
    )
    backend: Literal["auto", "nccl", "gloo", "mpi"] = option(
        "auto", help="The library of collectives; auto: nccl for CUDA, else gloo."
    )
    timeout: float = option(1800.0, help="Seconds until a silent process counts as lost.", low=1.0)


@attrs.frozen(kw_only=True, eq=False)
class Settings:
    """Every setting of one run. `Recipe` says what a part field may hold."""

    model: Model = option(help="The base model.")
    data: Data = option(help="The rows.")
    adapter: Any = option("full", help="What of the model trains.")
    loss: Any = option("sft", help="What is minimised.")
    optimizer: Any = option("adamw", help="How a gradient becomes a step.")
    quantizer: Any = option("none", help="How the base model's weights are stored.")
    callbacks: list[Any] = option(
        factory=lambda: ["progress", "jsonl", "plot"],
        help="Who watches the run besides progress, jsonl and plot; '-plot' removes one of these, [] removes all.",
    )
    provider: Any = option("local", help="Where it trains.")
    penalties: list[Any] = option(
        factory=list, help="Functions of the trained weights that are added to the objective: names, or {name: ..., "
        "options}.",
    )  # fmt: skip
    trainer: Any = option(None, help="Another library's loop, which takes the steps; none: Luthier's own.")

    adapter_from: str | None = option(None, help="A trained adapter, or its run: its weights begin the run.")
    reference: Literal["auto", "initial", "base"] | OtherModel = option(
        "auto", help="What a loss compares the policy with: the policy before training (initial, auto), the base model "
        "without adapter (base), or another model.",
    )  # fmt: skip
    reference_cache: bool = option(False, help="Compute the reference's log-probabilities once, before the first step.")
    teacher: OtherModel | None = option(None, help="The model that a loss learns from, loaded once and frozen.")
    teacher_cache: bool = option(
        False, help="Compute the teacher's most likely tokens of each row once, before the first step."
    )

    learning_rate: float | Literal["auto"] = option(
        2e-4, help="The peak learning rate; auto: by the model's size and the share that trains.", low=0.0
    )
    lr_scheduler_type: str = option(
        "linear", help="constant, linear, cosine, one_cycle, or a name of transformers' or torch's schedulers."
    )
    lr_scheduler_kwargs: dict[str, Any] = option(
        factory=dict, help="The schedule's own settings: min_lr_ratio, num_cycles, decay_steps and the like."
    )
    warmup_steps: int = option(0, help="Optimizer steps of linear warm-up.", low=0)
    warmup_ratio: float = option(
        0.0, help="Warm-up as a share of all steps, where warmup_steps is 0.", low=0.0, high=1.0
    )
    num_train_epochs: float = option(1.0, help="Passes over the training rows.", low=0.0)
    max_steps: int | None = option(
        None, help="Stop after this many optimizer steps; overrides num_train_epochs.", low=1
    )
    max_tokens: int | None = option(None, help="Stop once this many supervised tokens were trained on.", low=1)
    training_mode: Literal["auto", "epoch", "step", "token", "infinite"] = option(
        "auto",
        help="What ends the run: num_train_epochs, max_steps, max_tokens, or a signal alone; auto: by what is given.",
    )
    global_batch_size: int | Literal["auto"] = option(
        16, help="Examples of one optimizer step, over all ranks; auto: by the number of rows.", low=1
    )
    max_tokens_per_device: int | Literal["auto"] = option(
        4096, help="Tokens of one packed micro-batch; auto: as many as fit the device and help.", low=1
    )
    memory_check: bool = option(True, help="Refuse a run that is predicted not to fit the device's memory.")
    oom_recovery: bool = option(True, help="Split a micro-batch that does not fit the device's memory, and try again.")
    per_device_train_batch_size: int | None = option(None, help="With gradient_accumulation_steps: another way to say "
                                                     "global_batch_size.", low=1)  # fmt: skip
    gradient_accumulation_steps: int | None = option(None, help="See per_device_train_batch_size.", low=1)
    packing: bool = option(True, help="Several documents in one micro-batch; false: one in each.")
    max_grad_norm: float | None = option(1.0, help="Clip the global gradient norm to this; none: do not.", low=0.0)
    router_aux_loss_coef: float | None = option(
        None, help="Weight of the experts' load-balancing loss; none: the model's own where it asks for one.", low=0.0
    )
    on_nonfinite: Literal["stop", "skip"] = option(
        "stop", help="A NaN or infinite loss or gradient: stop the run, or skip the step and count it."
    )

    precision: Literal["auto", "float32", "bf16", "pure_bf16", "fp16"] = option(
        "auto", help="What products are computed in: bf16 and fp16 keep float32 master weights, pure_bf16 keeps none; "
        "auto: the fastest at equal loss on this device.",
    )  # fmt: skip
    pure_bf16_update: Literal["stochastic_rounding", "float32_masters"] = option(
        "stochastic_rounding", help="How pure_bf16 keeps updates smaller than a bf16 step."
    )
    num_threads: int | None = option(None, help="CPU threads; none: the free physical cores.", low=1)
    torch_compile: bool | Literal["auto"] = option(
        "auto", help="Compile the model's elementwise regions; auto: where it pays back within the run."
    )
    kernels: Literal["auto", "reference", "require"] = option(
        "auto",
        help="auto: installed operations where they fit; reference: plain torch; require: an error if one fails.",
    )
    gradient_checkpointing: bool | Literal["selective", "offload"] = option(
        False,
        help="Recompute each layer in backward; selective: all but its products; offload: inputs kept on the host.",
    )
    layerwise_lr_decay: float = option(
        1.0, help="Factor of the learning rate, once for each layer between a layer and the head.", low=0.0, high=1.0
    )
    lr_multipliers: dict[str, float] = option(
        factory=dict, help="A regular expression for parameter names: a factor of their learning rate.", low=0.0
    )
    distributed: Distributed = option(factory=Distributed, help="How several processes train one model.")

    eval_steps: int | None = option(None, help="Evaluate every so many steps; none: at the end.", low=1)
    eval_on_start: bool = option(False, help="Evaluate before the first step as well.")
    metrics: list[Any] = option(
        factory=list, help="Metrics that an evaluation reports besides the loss's: names, or {name: ..., options}."
    )
    max_eval_answers: int = option(32, help="Held-out rows that metrics over answers generate answers for.", low=1)
    max_eval_batches: int | None = option(None, help="Micro-batches of one evaluation; none: all.", low=1)
    save_strategy: Literal["auto", "steps", "epoch", "samples", "no"] = option(
        "auto", help="When a checkpoint is due: save_steps, each epoch, save_samples, nothing; auto: by what is given."
    )
    save_steps: int | None = option(None, help="A checkpoint every so many steps; none: at the end.", low=1)
    save_samples: int | None = option(None, help="A checkpoint every so many examples.", low=1)
    save_final: bool = option(
        True, help="Write a checkpoint after the last step; false with save_strategy no: only on request."
    )
    async_save: bool = option(True, help="Write checkpoints in the background while training goes on.")
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", help="The dtype of a full or merged model's files; auto: the base checkpoint's."
    )
    max_shard_size: str = option("5GB", help="The largest file of a saved model.")
    save_total_limit: int | None = option(None, help="Keep so many of the newest checkpoints, and the best one.", low=1)
    metric_for_best_model: str = option("eval_loss", help="The metric that decides which checkpoint is best.")
    greater_is_better: bool | None = option(None, help="Whether higher is better; none: unless it is a loss.")
    load_best_model_at_end: bool = option(False, help="End with the weights of the best checkpoint.")
    logging_steps: int = option(1, help="Metrics every so many steps; the last step always.", low=1)
    gradient_flow_steps: int | None = option(
        None, help="Each layer's gradient norm and update-to-weight ratio, every so many steps; none: never.", low=1
    )

    output_dir: str | None = option(None, help="The run's folder; none: one in runs/, named after model and recipe.")
    run_name: str | None = option(None, help="A name for people and trackers.")
    merge: bool = option(False, help="Write the merged model at the end, beside the adapter.")
    seed: int = option(0, help="The seed of order, initialisation and dropout.", low=0)
    device: str = option("auto", help="auto, cpu, cuda, cuda:N or mps.")


def setting_names() -> frozenset[str]:
    """Return the names of all settings of a run as a trainer's record writes them; those of rows begin with `data.`."""
    return frozenset((*Settings.__annotations__, *(f"data.{name}" for name in Data.__annotations__)))
