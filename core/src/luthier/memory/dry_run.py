"""Rehearsal: the run's own assembly and step on ghosts, to know what it would hold and compute before it is loaded."""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs
import numpy as np
import torch

from luthier.data.batches.batch import collate_examples
from luthier.data.batches.example_feed import Portion
from luthier.data.examples import TokenDataset, TokenExample
from luthier.data.prepare import Prepared, Report
from luthier.errors import LuthierError
from luthier.hardware.memory_meter import Ledger
from luthier.logs import muted_logs
from luthier.memory.cache_filling import fill_once, kept_bytes
from luthier.memory.isolation import isolated_parts
from luthier.model.fake_tensors import Ghosts, tensor_storages
from luthier.model.model_config import build_model, config_of, experts_of
from luthier.model.operations.kernel_choice import find_kernels
from luthier.plugins.contracts.values import Purpose
from luthier.randomness import keep_randomness
from luthier.recipe.objects import TaskPlace
from luthier.recipe.reading.draft import default_of
from luthier.runs.writing.decisions import Decisions
from luthier.step.adapter_start import load_start
from luthier.step.attach import attach_parts, quantize_model
from luthier.step.attachment import Attachment, BuiltParts
from luthier.step.over_batches import run_over
from luthier.step.reference.company import Company, find_caches
from luthier.step.schedule.total_steps import feed_of
from luthier.step.setup import START
from luthier.step.start_weights import begin_penalties
from luthier.step.update import update_weights

if TYPE_CHECKING:
    from luthier.recipe import Recipe
    from luthier.recipe.parts import Part, Resolved
    from luthier.recipe.settled import SettledRecipe
    from luthier.step.setup import Setup

CUDA_GRAIN: Final = 512  # bytes to which torch's CUDA allocator rounds up
CAUSES: Final = ("weights", "gradients", "optimizer", "activations", "head", "batch")
COMPANIONS: Final = ("reference", "teacher", START)  # causes that most runs do not have


class Unknown(Exception):
    """A part needs weights to be attached or to step, so that nothing can be said before they are loaded."""


@attrs.frozen(kw_only=True)
class Footprint:
    """The peak memory of a step whose largest micro-batch has `tokens` tokens, in bytes by cause.

    `fills_cache` is True where the peak is not a step's, but that of the passes before the first one that fill a cache.
    """

    tokens: int
    causes: dict[str, int]
    fills_cache: bool = False
    flops_per_token: float = 0.0  # of products and attention, in forward and backward

    @property
    def peak(self) -> int:
        return sum(self.causes.values())


class Rehearsal:
    """A run assembled on ghosts: `setup` is what assembly makes of it, without weights; `footprint` tries its step.

    `model` is one that is loaded; None: one of `config`, or of the recipe's, of which only the config is read. Raises
    what assembly raises, and `Unknown` where a part cannot do without weights.
    """

    def __init__(
        self,
        recipe: SettledRecipe,
        resolved: Resolved,
        device: torch.device,
        *,
        prepared: Prepared,
        model: Any = None,
        config: Any = None,
        task: TaskPlace | None = None,
    ) -> None:
        config = config or (config_of(recipe.model) if model is None else model.config)
        ledger = Ledger(CUDA_GRAIN if device.type == "cuda" else 1)
        vocabulary = config.get_text_config().vocab_size
        self.ghosts = Ghosts(ledger, device, experts=experts_of(config), vocabulary=vocabulary)
        with _explained():
            built, self.packages = rehearsed_parts(resolved), resolved.plugins.packages
            kernels, company = find_kernels(recipe, resolved, device), Company.of(recipe, resolved)
            self.built = attrs.evolve(built, kernels=kernels, company=company)
        with self._rehearsing():
            ghost = build_model(config, recipe.model, device) if model is None else self.ghosts.copy(model)
            self.setup = assemble_weightless(recipe, ghost, self.built, prepared, device, task=task)
        self._blame()
        self._begun = False

    def start_from(self, folder: Path | None) -> None:
        """Hold the adapter that the run begins from against the model; None: it begins from none."""
        if folder is not None:
            with self._rehearsing():
                load_start(self.setup.adapter, folder)

    def footprint(self, turns: Sequence[Sequence[TokenExample]]) -> Footprint:
        """Return the footprint of a step with these micro-batches, of which the first is the largest.

        Where passes before the first step, which fill a cache, take more, it is that of these.
        """
        step = self._step_footprint(turns)
        if not find_caches(self.setup):
            return step
        filling, kept = self.filling_footprint(turns[0]), kept_bytes(self.setup)
        step = attrs.evolve(step, causes=step.causes | {r: step.causes.get(r, 0) + size for r, size in kept.items()})
        return step if step.peak >= filling.peak else attrs.evolve(filling, flops_per_token=step.flops_per_token)

    def filling_footprint(self, turn: Sequence[TokenExample]) -> Footprint:
        """Return the footprint of the passes that fill the caches, at whose time the optimizer has no state.

        `turn` is the largest micro-batch of a step.
        """
        ledger = self.ghosts.ledger
        with self._rehearsing(), self.built.company.rehearsed_filling(self.setup) as held:
            for role, tensors in held.items():
                ledger.blame(tensor_storages(tensors), role)
            ledger.reset()
            tokens = fill_once(self.setup, turn)
            causes = {**self._causes(), "optimizer": 0}
        for role, size in kept_bytes(self.setup).items():
            causes[role] = causes.get(role, 0) + size
        return Footprint(tokens=tokens, causes=causes, fills_cache=True)

    def _causes(self) -> dict[str, int]:
        """Return the bytes at the peak, by cause."""
        at_peak = self.ghosts.ledger.at_peak
        causes = {cause: at_peak.get(cause, 0) for cause in CAUSES}
        return causes | {cause: size for cause in COMPANIONS if (size := at_peak.get(cause, 0))}

    def _step_footprint(self, turns: Sequence[Sequence[TokenExample]]) -> Footprint:
        ledger = self.ghosts.ledger
        self._begin(min(turns[0], key=lambda e: len(e.input_ids)))
        ledger.reset()
        self.ghosts.flops = 0
        self._step(turns)
        counts = [sum(self.setup.packing.sizes(turn)) for turn in turns]
        return Footprint(tokens=counts[0], causes=self._causes(), flops_per_token=self.ghosts.flops / sum(counts))

    def _begin(self, example: TokenExample) -> None:
        """Take the first step of all, after which the optimizer has its state."""
        if self._begun:
            return
        self._begin_loss()
        self._step([[example]])
        states = self.setup.optimizer.state.values()
        tensors = [v for state in states for v in state.values() if isinstance(v, torch.Tensor)]
        self.ghosts.ledger.blame(tensor_storages(tensors), "optimizer")
        self._begun = True

    def _begin_loss(self) -> None:
        """Let the loss prepare itself, over one batch in the place of all."""
        setup = self.setup
        with self._rehearsing():
            context = attrs.evolve(setup.context, over=lambda batches, work: run_over(setup, islice(batches, 1), work))
            setup.loss.begin(context)
            begin_penalties(setup, setup.constant_owners)

    def _step(self, turns: Sequence[Sequence[TokenExample]]) -> None:
        setup = self.setup
        with self._rehearsing():
            made = [collate_examples(turn).to(setup.device) for turn in turns]
            examples = [example for turn in turns for example in turn]
            update_weights(
                setup, 0, Portion(step=0, examples=examples, begun=0.0, ended=1.0, ready=(setup.packing, made))
            )
            setup.optimizer.zero_grad(set_to_none=True)

    def _blame(self) -> None:
        """Say which bytes are the weights', and which will be their gradients'."""
        model, ledger = self.setup.model, self.ghosts.ledger
        ledger.blame(tensor_storages([*model.parameters(), *model.buffers(), *self.setup.precision.kept]), "weights")
        for role, tensors in self.setup.frozen_tensors().items():
            ledger.blame(tensor_storages(tensors), role)
        for group in self.setup.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(
                    lambda p: ledger.blame(tensor_storages([p.grad]), "gradients") if p.grad is not None else None
                )

    @contextmanager
    def _rehearsing(self) -> Iterator[None]:
        """Silent, without a trace in the random states or in what plugins keep, and defects as `_explained`."""
        isolated, eager = isolated_parts(self.built.objects(), self.packages), torch.compiler.set_stance("force_eager")
        with _explained(), keep_randomness(), muted_logs(), _uncollected(), isolated, eager, self.ghosts:
            yield


@contextmanager
def _explained() -> Iterator[None]:
    """Raise every defect of a part that meets a ghost as `Unknown`."""
    try:
        yield
    except LuthierError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        raise Unknown(f"{type(error).__name__}: {reason}") from error


@contextmanager
def _uncollected() -> Iterator[None]:
    """Collect no garbage cycles within this context: torch once aborted over a tensor that Python collected."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def rehearsed_parts(resolved: Resolved) -> BuiltParts:
    """Return the parts of a run, built for a rehearsal: what they import is imported with real tensors."""
    return BuiltParts.of_recipe(resolved, functools.partial(_built, resolved))


def assemble_weightless(
    recipe: SettledRecipe,
    model: Any,
    parts: BuiltParts,
    prepared: Prepared,
    device: torch.device,
    purpose: Purpose = "plan",
    task: TaskPlace | None = None,
) -> Setup:
    """Return a run's setup around a model without values; `task` None: the run is no task of a sequence."""
    if parts.quantizer.load_arguments():
        raise Unknown("the quantizer works while weights are loaded")
    feed = feed_of(recipe, prepared.train)
    try:
        model = quantize_model(recipe, feed, model, parts.quantizer, purpose)
    except LuthierError as error:  # about numbers that are not finite
        raise Unknown(f"the quantizer needs the weights: {error.line}") from error
    return attach_parts(
        Attachment(
            recipe=recipe,
            model=model,
            tokenizer=None,
            parts=parts,
            prepared=prepared,
            device=device,
            decisions=Decisions(is_logged=False),
            purpose=purpose,
            task=task or TaskPlace(),
        )
    )


def _built(resolved: Resolved, part: Part) -> Any:
    """Build a part for the rehearsal alone, so that the run's part is not touched."""
    return resolved.build(part) if part.offer else copy.deepcopy(part.local)


def stand_in(recipe: Recipe, length: int | None = None) -> Prepared:
    """Return rows for a recipe without any: `length` tokens each (None: data.max_length), every one supervised."""
    tokens = np.zeros(length or recipe.data.max_length, np.int32)
    row = TokenExample(input_ids=tokens, labels=tokens)
    asked = recipe.global_batch_size
    count: int = default_of("global_batch_size") if asked == "auto" else asked
    return Prepared(train=TokenDataset.of([row] * count), validation=None, report=Report())
