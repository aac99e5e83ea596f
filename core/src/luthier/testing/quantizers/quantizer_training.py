"""Checks of quantizers in training: schedules, resumed runs, and layers whose latent weight is trained."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from luthier.plugins.records import Record
from luthier.testing.laws import Subject, law, not_run
from luthier.testing.quantizers.quantized_world import TOTAL, Quantized, lets_train
from luthier.testing.strategies import drawn_seeds

if TYPE_CHECKING:
    from torch import Tensor, nn

FEW: Final = 2  # examples of a check that trains
STEPS: Final = 4  # steps of a run, which is interrupted after half of them
RATE: Final = 0.05
ROUNDING: Final = 1e-4  # relative, the bound by which artifacts are checked


def _trains(record: Record) -> bool:
    return bool(getattr(record, "trains", False))


class Trained(Quantized):
    """A quantized model trained by plain gradient descent: all weights, or else those that are left dense."""

    def __init__(self, subject: Subject, options: Any, seed: int = 0) -> None:
        super().__init__(subject, options, seed)
        own = {id(p) for layer in self.layers().values() for p in layer.parameters()}
        for parameter in self.model.parameters():
            is_left = parameter.is_floating_point() and (lets_train(subject.record) or id(parameter) not in own)
            parameter.requires_grad_(is_left)
        self.done = 0

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def step(self) -> float:
        """Take the next step of the schedule, and return the loss before it."""
        import torch

        multipliers = self.tell(self.done)
        self.model.zero_grad(set_to_none=True)
        row = torch.randint(7, 260, (1, 16), generator=torch.Generator().manual_seed(self.done))
        loss = self.model(input_ids=row, labels=row, use_cache=False).loss
        loss.backward()
        with torch.no_grad():
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=RATE * multipliers.lr)
        self.done += 1
        return float(loss.detach())

    def saved(self) -> dict[str, Any]:
        """Return the contents of a checkpoint, as it comes back from disk."""
        from luthier.testing.states import carry_tree

        weights = {name: p.detach() for name, p in self.parameters.items()}
        return carry_tree({"weights": weights, "quantizer": self.part.state(), "done": self.done})

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        import torch

        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(checkpoint["weights"][name])
        self.part.load_state(checkpoint["quantizer"])
        self.done = checkpoint["done"]
        self.tell(self.done)


@law(FEW, seed=drawn_seeds())
def follows_progress_alone(subject: Subject, options: Any, seed: int) -> None:
    """The layers' outputs depend on the last `progressed` alone, even if it repeats a step or goes back."""
    world = Quantized(subject, options, seed)
    steps = (0, TOTAL // 2, TOTAL)
    forward = {step: _told_outputs(world, step) for step in steps}
    for step in reversed(steps):
        for time in ("again", "a third time"):
            agreed = _told_outputs(world, step).equal(forward[step])
            assert agreed, f"told {time} that {step} steps are done, the model has other outputs"


def _told_outputs(world: Quantized, step: int) -> Tensor:
    world.tell(step)
    return world.outputs()


@law(FEW, seed=drawn_seeds())
def resumes_exactly(subject: Subject, options: Any, seed: int) -> None:
    """A run that was interrupted, and evaluated meanwhile, equals an undisturbed one bit for bit."""
    straight, halted = Trained(subject, options, seed), Trained(subject, options, seed)
    expected = [straight.step() for _ in range(STEPS)]
    losses = []
    for _ in range(STEPS // 2):
        losses.append(halted.step())
        _told_outputs(halted, halted.done)
    resumed = Trained(subject, options, seed)
    resumed.restore(halted.saved())
    losses += [resumed.step() for _ in range(STEPS - STEPS // 2)]
    assert losses == expected, f"the losses are {losses}, and {expected} in an undisturbed run"
    for name, parameter in straight.parameters.items():
        assert resumed.parameters[name].equal(parameter), f"{name} differs from that of an undisturbed run"


@law(FEW, when=lets_train, seed=drawn_seeds())
def trains_its_weights(subject: Subject, options: Any, seed: int) -> None:
    """Each layer whose weight may be trained passes it the loss's gradient, also at the end of a schedule."""
    world = Trained(subject, options, seed)
    for done in (0, TOTAL):
        world.done = done
        before = {path: world.part.dequantize(layer).clone() for path, layer in world.own_layers().items()}
        world.step()
        for path, layer in world.layers().items():
            gradients = [p.grad for p in layer.parameters() if p.numel() == before[path].numel() and p.grad is not None]
            reached = any(bool(g.isfinite().all()) and bool(g.any()) for g in gradients)
            assert reached, f"after {done} steps no gradient reaches a weight of {path}"


@law(FEW, when=_trains, seed=drawn_seeds())
def saves_what_it_trained(subject: Subject, options: Any, seed: int) -> None:
    """A fresh model that `load` fills from the files of `save`, none of them a pickle, has the trained outputs."""
    from luthier.model.weights.quantized import write_trained
    from luthier.testing.contexts import relative_distance
    from luthier.testing.kinds.adapter_checks import PICKLES

    world = Trained(subject, options, seed)
    for _ in range(STEPS):
        world.step()
    fresh = Quantized(subject, options, seed + 1, purpose="open", has_values=False)
    with tempfile.TemporaryDirectory() as folder:
        write_trained(world.model, Path(folder), world.part)
        pickles = [p.name for p in Path(folder).rglob("*") if p.suffix in PICKLES]
        assert not pickles, f"written as pickles: {', '.join(pickles)}"
        fresh.model = fresh.part.load(Path(folder), fresh.model)
    for done in (STEPS, TOTAL):
        off = relative_distance(_told_outputs(fresh, done), _told_outputs(world, done))
        assert off <= ROUNDING, f"read from its files, the model's outputs are {off:.3g} off after {done} steps"


@law(FEW, seed=drawn_seeds())
def takes_back_what_is_worse(subject: Subject, options: Any, seed: int) -> None:
    """`tune` leaves the outputs as they were if every trial is worse, and if the evaluation of one is cut off."""
    world = Trained(subject, options, seed)
    if not world.part.needs_metrics:
        not_run("it does not tune by metrics")
    before, trials = world.outputs(), []

    def evaluate(cut: int) -> dict[str, float]:
        trials.append(world.outputs())
        if len(trials) == cut:
            raise InterruptedError
        return dict.fromkeys(reported, 2.0 + len(trials))

    reported = dict.fromkeys(world.part.needs_metrics.values(), 1.0)
    result = world.part.tune(reported, lambda: evaluate(0))
    assert dict(result) == reported, f"tune gave {dict(result)}, though every trial was worse than {reported}"
    assert world.outputs().equal(before), "what every trial made worse was not taken back"
    assert any(not trial.equal(before) for trial in trials), "no trial changed what the model computes"
    tried, trials[:] = len(trials), []
    with contextlib.suppress(InterruptedError):
        world.part.tune(reported, lambda: evaluate(tried))
    assert world.outputs().equal(before), "a trial whose evaluation was cut off was not taken back"
