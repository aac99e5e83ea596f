"""The surroundings of a part in a check: a context around a tiny model, an adapter on it, and the engine's steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from luthier.builtin import Sft
from luthier.builtin.none import Unquantized
from luthier.builtin.sft import SupervisedLoss
from luthier.data.batches.batch import Batch, collate_examples
from luthier.data.examples import TokenExample
from luthier.errors import LuthierError
from luthier.model import attention
from luthier.model.policy import ModelPolicy
from luthier.model.weights.quantized import apply_quantizer
from luthier.plugins.completion import complete_part
from luthier.plugins.contracts.values import Context, Progress
from luthier.plugins.records import NoOptions
from luthier.step.context import ContextSources, attach_adapter, context_for, encode_with
from luthier.step.module import Step
from luthier.testing.laws import Subject
from luthier.testing.worlds import random_batch, tiny_model, tiny_tokenizer

STEPS: Final = 10  # total_steps of a context
LENGTHS: Final = (5, 9, 3)


def context(
    model: Any,
    seed: int = 0,
    total_steps: int = STEPS,
    quantizer: Any = None,
    *,
    originals: Mapping[str, Tensor] | None = None,
    batches: Callable[[int], Iterable[Batch]] | None = None,
) -> Context:
    """Return the engine's context for a model. `quantizer` None means an unquantized model, `batches` None random
    batches.

    `originals` maps a layer's path to its unquantized weight [out, in]; without it `original` raises `LuthierError`.
    """
    quantizer = quantizer or plain_quantizer()
    return context_for(
        model,
        complete_part(quantizer, "quantizer", type(quantizer).__name__),
        ContextSources(seed=seed, total_steps=total_steps, original=_original(model, originals),
                       batches=batches or _batches, encode=_encode),
    )  # fmt: skip


def plain_quantizer() -> Unquantized:
    """Return the quantizer of a model that is not quantized."""
    return Unquantized(NoOptions())


def _original(model: nn.Module, originals: Mapping[str, Tensor] | None) -> Callable[[nn.Module], Tensor]:
    paths = {id(module): path for path, module in model.named_modules()}  # taken before an adapter wraps anything

    def original(layer: nn.Module) -> Tensor:
        path = paths.get(id(layer), "")
        if originals is None or path not in originals:
            raise LuthierError("part-unsupported", f"no checkpoint holds the layer {path!r}")
        return originals[path].float()

    return original


def _encode(text: str) -> list[int]:
    return encode_with(tiny_tokenizer())(text)


def _batches(count: int) -> Iterable[Batch]:
    return (random_batch(LENGTHS, seed=index) for index in range(count))


class Attached:
    """An adapter on a tiny Llama, with the engine's own step around both."""

    def __init__(
        self, subject: Subject, options: Any, *, seed: int = 0, quantizer: Any = None, resumed: bool = False
    ) -> None:
        """`seed` is the run's; `quantizer` is applied to the base first.

        A resumed run does not begin its task again.
        """
        torch.manual_seed(seed)
        self.base = base_model(quantizer=quantizer)
        self.model = base_model(quantizer=quantizer)
        self.own_buffers = list(self.model.buffers())  # those of the model, before the adapter adds any
        self.context = context(self.model, seed=seed, quantizer=quantizer)
        self.part = subject.build(options)
        self.model = attach_adapter(self.part, self.model, self.context).train()
        loss: Any = SupervisedLoss(Sft())  # without the protocol's defaults, which no step here uses
        self.step = Step(self.model, self.part, loss)
        if not resumed:
            self.part.begin_task(0, 1)
        self.steps_done = 0

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.part.groups() for p in group.parameters]

    def differentiate(self, batch: Batch) -> None:
        """Compute the gradients of the loss over one batch, and of the adapter's penalty."""
        self.model.zero_grad(set_to_none=True)
        weight = sum(self.step.terms(batch).values())
        total = sum(self.step(batch).sums.values()) / weight
        penalty = self.part.penalty()
        (total if penalty is None else total + penalty).backward()
        self.part.gradients_ready()

    def train(self, steps: int, rate: float = 0.1) -> None:
        """Take steps of plain gradient descent. Step i has the same batch and the same random numbers in every run."""
        for _ in range(steps):
            torch.manual_seed(self.steps_done)
            self.differentiate(random_batch(LENGTHS, seed=self.steps_done))
            with torch.no_grad():
                for group in self.part.groups():
                    for parameter in group.parameters:
                        if parameter.grad is not None:
                            parameter.sub_(parameter.grad, alpha=rate * group.lr_scale)
            self.steps_done += 1
            self.part.stepped(Progress(step=self.steps_done, total_steps=STEPS, epoch=self.steps_done / STEPS))

    def outputs(self, batch: Batch | None = None) -> Tensor:
        """Return [S, V] logits of every label, without dropout, with the adapter on."""
        return batch_logits(self.model, probe_batch() if batch is None else batch, self.part)


def attach_on_meta(part: Any, seed: int) -> Any:
    """Return the adapter attached to a tiny Llama without weights, as on a rank that waits for them."""
    whole = tiny_model()
    with torch.device("meta"):
        model = type(whole)(whole.config)
    attention.install_attention(model)
    around = context_for(
        model, Unquantized(NoOptions()),
        ContextSources(purpose="hollow", seed=seed, total_steps=STEPS, original=_original(model, None),
                       batches=_batches),
    )  # fmt: skip
    attach_adapter(part, model, around)
    return part


def base_model(seed: int = 0, quantizer: Any = None) -> Any:
    """Return a tiny Llama with packed attention, quantized if a quantizer is given."""
    model = tiny_model(seed=seed)
    attention.install_attention(model)
    return model if quantizer is None else apply_quantizer(quantizer, model, context(model, quantizer=quantizer))


def probe_batch() -> Batch:
    """Return three packed documents in which every label counts."""
    return random_batch(LENGTHS, seed=99, supervised=1.0)


def separate_documents(batch: Batch) -> list[Batch]:
    """Return each document of a batch as a batch of its own. All labels must count."""
    rows = [ids.numpy() for ids in batch.input_ids.split(batch.lengths.tolist())]
    return [collate_examples([TokenExample(input_ids=row, labels=row)]) for row in rows]


def batch_logits(model: Any, batch: Batch, adapter: Any = None) -> Tensor:
    """Return logits [S, V] without dropout or gradient; the model's mode is restored."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = ModelPolicy(model, adapter).map_logits(batch, lambda values, labels: values)
    finally:
        model.train(training)
    return logits[batch.supervised].float()


def relative_distance(actual: Tensor, expected: Tensor) -> float:
    """Return the relative (Frobenius) difference; NaN counts as infinite."""
    difference = float((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-12))
    return math.inf if math.isnan(difference) else difference
