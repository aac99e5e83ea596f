"""Checks of an adapter when it is attached, and that its training has an effect on generation."""

from __future__ import annotations

from typing import Any, Final

from luthier.testing.laws import Subject, law
from luthier.testing.strategies import drawn_seeds

FEW: Final = 4  # examples of a check that builds models
ROUNDING: Final = 1e-4  # relative: float32 through another attention in two layers


@law(FEW, seed=drawn_seeds())
def attach_follows_the_seed(subject: Subject, options: Any, seed: int) -> None:
    """An adapter's initial values depend on the run's seed alone: two attaches with one seed hold the same."""
    from luthier.testing.contexts import Attached
    from luthier.testing.states import carry_tree

    first, second = (carry_tree(Attached(subject, options, seed=seed).part.state()) for _ in range(2))
    _same_state(first, second, "two attaches of one seed")


@law(FEW, seed=drawn_seeds())
def attaches_where_the_weights_are(subject: Subject, options: Any, seed: int) -> None:
    """On a model whose weights are on meta, as on a rank that waits for them, its trained weights are on meta too.

    A part that refuses to be attached there passes: such ranks then read the weights themselves.
    """
    import torch

    from luthier.errors import LuthierError
    from luthier.testing.contexts import attach_on_meta

    try:
        part = attach_on_meta(subject.build(options), seed)
    except (LuthierError, RuntimeError, TypeError, ValueError):
        return
    for group in part.groups():
        for name, parameter in zip(group.names, group.parameters, strict=True):
            place = parameter.device
            assert place == torch.device("meta"), f"{name} is on {place}, not on context.device, which is meta"


@law(FEW, seed=drawn_seeds())
def training_changes_a_plain_forward(subject: Subject, options: Any, seed: int) -> None:
    """Two steps change the output of the model's own forward for a prompt, as generation calls it."""
    import torch

    from luthier.model.attention import generating_attention
    from luthier.model.generation.generation_inputs import compute_logits
    from luthier.testing.contexts import Attached

    world = Attached(subject, options, seed=seed)
    world.model.eval()
    tokens = torch.arange(1, 9)
    with generating_attention(world.model), torch.no_grad():
        before = compute_logits(world.model, tokens, world.part)
    world.train(2)
    world.model.eval()
    with generating_attention(world.model), torch.no_grad():
        after = compute_logits(world.model, tokens, world.part)
    assert not after.equal(before), "two steps changed nothing of a plain forward, as generation calls it"


@law(FEW, seed=drawn_seeds())
def generates_as_it_trains(subject: Subject, options: Any, seed: int) -> None:
    """A trained adapter's logits for a prompt are the same in training and in generation.

    An adapter with virtual tokens or prefixes must give generation something that replaces them.
    """
    import torch

    from luthier.model.attention import generating_attention
    from luthier.model.generation.generation_inputs import compute_logits
    from luthier.testing.contexts import Attached, relative_distance
    from luthier.testing.worlds import random_batch

    world = Attached(subject, options, seed=seed)
    world.train(2)
    batch = random_batch((12,), seed=seed, supervised=1.0)
    trained = world.outputs(batch)
    with generating_attention(world.model), torch.no_grad():
        generated = compute_logits(world.model, batch.input_ids, world.part)[:-1].float()
    off = relative_distance(generated, trained)
    assert off <= ROUNDING, f"logits as generation calls the model against those of the run's pass: {off:.3g} apart"


def _same_state(first: Any, second: Any, what: str) -> None:
    """Raise `AssertionError` unless two state trees are equal, bit for bit."""
    import torch

    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), f"{what} differ in a tensor"
    elif isinstance(first, dict):
        for name, value in first.items():
            _same_state(value, second[name], f"{what} ({name})")
    elif isinstance(first, (list, tuple)):
        for one, other in zip(first, second, strict=True):
            _same_state(one, other, what)
    else:
        assert first == second, f"{what} differ: {first!r} and {second!r}"
