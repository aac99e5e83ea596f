"""Checks of adapters: they start as identity, train only their weights, move by state and files, and merge exactly.

Adapters are put on a tiny Llama and trained by the engine's own step, with plain gradient descent.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

from hypothesis import strategies as st

from luthier.plugins.contracts.values import Role
from luthier.plugins.records import Record
from luthier.testing.kinds.adapter_attaching import (  # noqa: F401 - checks of this kind
    attach_follows_the_seed,
    attaches_where_the_weights_are,
    generates_as_it_trains,
    training_changes_a_plain_forward,
)
from luthier.testing.kinds.adapter_sharding import trains_alike_on_two_sharded_ranks  # noqa: F401
from luthier.testing.laws import Subject, law
from luthier.testing.strategies import drawn_seeds

if TYPE_CHECKING:
    from torch import Tensor

FEW: Final = 4  # examples of a check that builds models
ROUNDING: Final = 1e-5  # relative: float32 sums in another order
CODED: Final = 0.05  # relative: a merge into int8 rows rounds every weight again
PICKLES: Final = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}


def _mergeable(record: Record) -> bool:
    return getattr(record, "mergeable", True)


def _on_codes(record: Record) -> bool:
    """Return True if the adapter works on a quantized base."""
    return "dense-weights" not in record.needs and "quantized-base" not in record.conflicts


def _attached(subject: Subject, options: Any, seed: int = 0, **more: Any) -> Any:
    from luthier.testing.contexts import Attached

    return Attached(subject, options, seed=seed, **more)


def _near(actual: Tensor, expected: Tensor, bound: float, what: str) -> None:
    """Raise `AssertionError` unless tensors agree within `bound`, relative to the expected one; 0 means bit for bit."""
    from luthier.testing.contexts import relative_distance

    __tracebackhide__ = True
    off = relative_distance(actual, expected)
    exact = "bit for bit" if bound == 0 else f"within {bound:g}"
    assert actual.equal(expected) if bound == 0 else off <= bound, f"{what}: {off:.3g} apart, not {exact}"


@law(FEW, default_only=True, seed=drawn_seeds())
def starts_as_identity(subject: Subject, options: Any, seed: int) -> None:
    """Attaching moves no output by more than the record's `tolerance`, with the default options and the examples.

    Other options may ask for another start.
    """
    from luthier.testing.contexts import batch_logits, probe_batch

    world = _attached(subject, options, seed)
    bound = subject.record.tolerance  # type: ignore[attr-defined]
    _near(
        world.outputs(), batch_logits(world.base, probe_batch()), bound, "outputs after attaching against those before"
    )


@law(FEW, seed=drawn_seeds())
def keeps_class_and_module_paths(subject: Subject, options: Any, seed: int) -> None:
    """The model keeps its class, and each of its modules is found at its old path."""
    world = _attached(subject, options, seed)
    assert type(world.model) is type(world.base), f"{type(world.base).__name__} became {type(world.model).__name__}"
    paths = {name for name, _ in world.model.named_modules()}
    lost = [name for name, _ in world.base.named_modules() if name not in paths]
    assert not lost, f"modules that are no longer where they were: {', '.join(lost[:4])}"


@law(FEW, seed=drawn_seeds())
def groups_cover_every_trainable_parameter_once(subject: Subject, options: Any, seed: int) -> None:
    """`groups()` holds exactly the parameters that ask for a gradient, each once, each with a name and a role."""
    world = _attached(subject, options, seed)
    groups = world.part.groups()
    counts = Counter(id(p) for group in groups for p in group.parameters)
    trainable = {id(p): name for name, p in world.model.named_parameters() if p.requires_grad}
    assert trainable, "no parameter trains"
    missing = [name for key, name in trainable.items() if key not in counts]
    assert not missing, f"parameters that train but are in no group: {', '.join(missing[:4])}"
    assert max(counts.values()) == 1, "a parameter is in two groups"
    assert counts.keys() <= trainable.keys(), "a group holds a parameter that does not train or is not the model's"
    for group in groups:
        assert len(group.names) == len(group.parameters), "a group has not one name for each parameter"
        assert group.role in get_args(Role), f"no role is called {group.role!r}"
    names = [name for group in groups for name in group.names]
    assert len(set(names)) == len(names), "two parameters of the groups share a name"


@law(FEW, seed=drawn_seeds())
def trains_only_its_own_weights(subject: Subject, options: Any, seed: int) -> None:
    """Two steps change no weight of the model that is not in a group, and no buffer that the base had."""
    world = _attached(subject, options, seed)
    own, buffers = {id(p) for p in world.parameters}, {id(b) for b in world.own_buffers}
    others = {n: p for n, p in world.model.named_parameters() if id(p) not in own}
    others |= {n: b for n, b in world.model.named_buffers() if id(b) in buffers}
    before = {name: tensor.detach().clone() for name, tensor in others.items()}
    world.train(2)
    changed = [name for name, tensor in others.items() if not tensor.detach().equal(before[name])]
    assert not changed, f"changed, but in no group: {', '.join(changed[:4])}"
    reached = [n for n, p in world.model.named_parameters() if n in others and p.grad is not None]
    assert not reached, f"got a gradient, but in no group: {', '.join(reached[:4])}"


@law(FEW, seed=drawn_seeds())
def every_parameter_gets_a_gradient(subject: Subject, options: Any, seed: int) -> None:
    """After one step, by which a part that begins at zero has left it, every parameter has a gradient other than 0."""
    import torch

    from luthier.testing.contexts import probe_batch

    world = _attached(subject, options, seed)
    world.train(1)
    world.model.eval()
    world.differentiate(probe_batch())
    for group in world.part.groups():
        for name, parameter in zip(group.names, group.parameters, strict=True):
            assert parameter.grad is not None, f"{name} gets no gradient"
            assert torch.isfinite(parameter.grad).all(), f"the gradient of {name} is not finite"
            assert parameter.grad.any(), f"the gradient of {name} is 0 everywhere"


@law(FEW, seed=drawn_seeds())
def state_moves_to_a_fresh_model(subject: Subject, options: Any, seed: int) -> None:
    """`state()`, carried through a checkpoint, makes a fresh model give the same outputs, bit for bit."""
    import torch

    from luthier.testing.states import carry_tree

    world, fresh = _attached(subject, options, seed), _attached(subject, options, seed, resumed=True)
    world.train(2)
    torch.manual_seed(seed + 1)
    fresh.part.load_state(carry_tree(world.part.state()))
    _near(fresh.outputs(), world.outputs(), 0.0, "outputs of the fresh model against those of the trained one")


@law(FEW, seed=drawn_seeds())
def resumes_exactly(subject: Subject, options: Any, seed: int) -> None:
    """Two steps, a checkpoint of `state()`, and two more on a fresh model equal four steps, bit for bit, dropout
    included.
    """
    from luthier.testing.states import carry_tree

    straight, halted = _attached(subject, options, seed), _attached(subject, options, seed)
    resumed = _attached(subject, options, seed, resumed=True)
    straight.train(4)
    halted.train(2)
    resumed.part.load_state(carry_tree(halted.part.state()))
    resumed.steps_done = 2
    resumed.train(2)
    _near(resumed.outputs(), straight.outputs(), 0.0, "outputs of a resumed run against those of a straight one")


@law(FEW, seed=drawn_seeds())
def saved_files_move_to_a_fresh_model(subject: Subject, options: Any, seed: int) -> None:
    """`load` puts the files of `save` into a fresh adapter with another seed; no file is a pickle."""
    import torch

    world, fresh = _attached(subject, options, seed), _attached(subject, options, seed)
    world.train(2)
    torch.manual_seed(seed + 1)
    with tempfile.TemporaryDirectory() as folder:
        world.part.save(Path(folder))
        written = sorted(p for p in Path(folder).rglob("*") if p.is_file())
        assert written, "save wrote no file"
        pickles = [p.name for p in written if p.suffix in PICKLES]
        assert not pickles, f"written as pickles: {', '.join(pickles)}; use safetensors and JSON"
        fresh.part.load(Path(folder))
    _near(fresh.outputs(), world.outputs(), ROUNDING, "outputs after loading against those of the trained model")


@law(FEW, when=_mergeable, seed=drawn_seeds())
def merge_keeps_outputs(subject: Subject, options: Any, seed: int) -> None:
    """The merged model gives the outputs of the adapted one."""
    from luthier.testing.contexts import batch_logits, probe_batch

    world = _attached(subject, options, seed)
    world.train(3)
    before = world.outputs()
    merged = world.part.merge(world.context)
    _near(batch_logits(merged, probe_batch()), before, ROUNDING, "outputs after merging against those before")


@law(FEW, when=_mergeable, seed=drawn_seeds())
def merge_leaves_plain_modules(subject: Subject, options: Any, seed: int) -> None:
    """The merged model has the modules, classes, and tensors' names and shapes that the base has, and no others."""
    world = _attached(subject, options, seed)
    world.train(1)
    merged = world.part.merge(world.context)
    before = {name: type(m).__name__ for name, m in world.base.named_modules()}
    after = {name: type(m).__name__ for name, m in merged.named_modules()}
    differ = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    assert not differ, f"modules that differ from the base's after merging: {', '.join(differ[:4])}"
    shapes = [{n: tuple(t.shape) for n, t in m.state_dict().items()} for m in (world.base, merged)]
    odd = sorted(n for n in shapes[0].keys() | shapes[1].keys() if shapes[0].get(n) != shapes[1].get(n))
    assert not odd, f"tensors that differ from the base's in name or shape: {', '.join(odd[:4])}"


@law(FEW, when=lambda record: "reference" in record.provides, seed=drawn_seeds())
def disabled_gives_the_base(subject: Subject, options: Any, seed: int) -> None:
    """Within `disabled()` a trained model gives the base's outputs, and afterwards its own again."""
    from luthier.testing.contexts import batch_logits, probe_batch

    world = _attached(subject, options, seed)
    world.train(2)
    before = world.outputs()
    with world.part.disabled():
        within = batch_logits(world.model, probe_batch())
    bound = subject.record.tolerance  # type: ignore[attr-defined]
    _near(within, batch_logits(world.base, probe_batch()), bound, "outputs within disabled() against the base's")
    _near(world.outputs(), before, 0.0, "outputs after disabled() against those before it")
    assert not within.equal(before), "training moved no output: disabled() cannot be told from enabled"


@law(FEW, seed=drawn_seeds(), lengths=st.lists(st.integers(2, 9), min_size=2, max_size=3))
def keeps_documents_apart(subject: Subject, options: Any, seed: int, lengths: list[int]) -> None:
    """Documents packed into one batch give the outputs that each gives alone, also with a trained adapter."""
    import torch

    from luthier.testing.contexts import separate_documents
    from luthier.testing.worlds import random_batch

    world = _attached(subject, options, seed)
    world.train(2)
    batch = random_batch(lengths, seed=seed, supervised=1.0)
    alone = torch.cat([world.outputs(part) for part in separate_documents(batch)])
    _near(world.outputs(batch), alone, 10 * ROUNDING, "outputs of packed documents against separate ones")


@law(FEW, when=_on_codes, seed=drawn_seeds())
def works_on_a_quantized_base(subject: Subject, options: Any, seed: int) -> None:
    """On a base of int8 codes it trains, changes outputs but no code, and its state moves to a fresh model."""
    import torch

    from luthier.testing.contexts import batch_logits, probe_batch
    from luthier.testing.quantizers.kit_quantizer import CodedQuantizer
    from luthier.testing.states import carry_tree

    world = _attached(subject, options, seed, quantizer=CodedQuantizer())
    fresh = _attached(subject, options, seed, quantizer=CodedQuantizer(), resumed=True)
    base = batch_logits(world.base, probe_batch())
    codes = {name: b.clone() for name, b in world.model.named_buffers() if name.endswith((".codes", ".scales"))}
    world.train(2)
    buffers = dict(world.model.named_buffers())
    assert all(buffers[name].equal(before) for name, before in codes.items()), "training changed the quantized base"
    trained = world.outputs()
    assert torch.isfinite(trained).all(), "outputs on a quantized base are not finite"
    assert not trained.equal(base), "two steps on a quantized base changed no output"
    fresh.part.load_state(carry_tree(world.part.state()))
    _near(fresh.outputs(), trained, 0.0, "outputs of a fresh quantized model against those of the trained one")


@law(FEW, when=lambda record: _on_codes(record) and _mergeable(record), seed=drawn_seeds())
def merges_on_a_quantized_base(subject: Subject, options: Any, seed: int) -> None:
    """Merged over int8 codes, into dense or requantized layers, the model's outputs stay close."""
    from luthier.testing.contexts import batch_logits, probe_batch
    from luthier.testing.quantizers.kit_quantizer import CodedQuantizer

    world = _attached(subject, options, seed, quantizer=CodedQuantizer())
    world.train(2)
    before = world.outputs()
    _near(batch_logits(world.part.merge(world.context), probe_batch()), before, CODED, "outputs merged over int8 codes")


def live(subject: Subject, options: Any) -> None:
    """Use an adapter in every way that a run of two tasks does."""
    from luthier.testing.states import carry_tree

    world = _attached(subject, options)
    world.train(2)
    world.outputs()
    world.part.load_state(carry_tree(world.part.state()))
    with tempfile.TemporaryDirectory() as folder:
        world.part.save(Path(folder))
        world.part.load(Path(folder))
    if "reference" in subject.record.provides:
        with world.part.disabled():
            world.outputs()
    world.part.end_task(0, 2)
    world.part.begin_task(1, 2)
    world.train(1)
    world.part.end_task(1, 2)
    world.part.review_task(lambda: 0.0)
    if _mergeable(subject.record):
        world.part.merge(world.context)
