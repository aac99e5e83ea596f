"""Checks of quantizers: weights and outputs stay near, sizes are as declared, dequantized weights can be put back."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from luthier.plugins.contracts.values import Multipliers, Progress
from luthier.plugins.records import Record
from luthier.testing.laws import Subject, law
from luthier.testing.quantizers.quantized_world import TOTAL, Quantized, lets_train
from luthier.testing.quantizers.quantizer_training import (  # noqa: F401 - checks of this kind
    follows_progress_alone,
    resumes_exactly,
    saves_what_it_trained,
    takes_back_what_is_worse,
    trains_its_weights,
)
from luthier.testing.quantizers.quantizer_worlds import (  # noqa: F401 - checks of this kind
    applies_without_values,
    apply_follows_the_seed,
)
from luthier.testing.strategies import drawn_seeds

if TYPE_CHECKING:
    from torch import Tensor

FEW: Final = 4  # examples of a check that builds models
SLACK: Final = 1.5  # the relative error of outputs for random inputs, in multiples of the weights' error
OVERHEAD: Final = 1.0  # bits per weight for scales, besides 8 bytes for each row
ENDS: Final = (0, TOTAL)  # steps done at the beginning and at the end of a schedule


def _quantizes(record: Record) -> bool:
    return getattr(record, "bits", None) is not None


def _trains(record: Record) -> bool:
    return bool(getattr(record, "trains", False))


def _is_stored_small(record: Record) -> bool:
    """Return True if the layers hold only codes; layers that are trained have a latent weight too."""
    return _quantizes(record) and not _trains(record)


def _freezes(record: Record) -> bool:
    """Return True if no weight of a quantized layer is trained."""
    return not lets_train(record)


def _far(actual: Tensor, expected: Tensor) -> float:
    from luthier.testing.contexts import relative_distance

    return relative_distance(actual, expected)


@law(FEW, seed=drawn_seeds())
def keeps_weights_near(subject: Subject, options: Any, seed: int) -> None:
    """The relative (Frobenius) error of every quantized weight is at most the record's `tolerance`."""
    world = Quantized(subject, options, seed)
    record: Any = subject.record
    layers = world.layers()
    agreed = bool(layers) == _quantizes(record)
    assert agreed, f"{len(layers)} layers are quantized, and the record's bits are {record.bits}"
    for step in ENDS:
        world.tell(step)
        for path, layer in layers.items():
            off = _far(world.part.dequantize(layer), world.original(path))
            assert off <= record.tolerance, f"{path} is {off:.3g} off; the record's tolerance is {record.tolerance:g}"


@law(FEW, seed=drawn_seeds())
def keeps_outputs_near(subject: Subject, options: Any, seed: int) -> None:
    """Each quantized layer, run on random inputs, gives the original layer's outputs, within 1.5 of the tolerance."""
    import torch

    world = Quantized(subject, options, seed)
    bound = SLACK * subject.record.tolerance  # type: ignore[attr-defined]
    for step in ENDS:
        world.tell(step)
        for path, layer in world.layers().items():
            states = torch.randn(64, layer.in_features)
            with torch.no_grad():
                off = _far(layer(states), world.originals[path](states))
            assert off <= bound, f"outputs of {path} are {off:.3g} off, which is more than {bound:.3g}"
    ids = torch.arange(12)[None]
    with torch.no_grad():
        logits = world.model.eval()(input_ids=ids, use_cache=False).logits
    assert torch.isfinite(logits).all(), "outputs of the quantized model are not finite"


@law(FEW, when=_freezes, seed=drawn_seeds())
def freezes_base_weights(subject: Subject, options: Any, seed: int) -> None:
    """No weight of a quantized layer requires a gradient."""
    world = Quantized(subject, options, seed)
    left = [f"{n}.{k}" for n, m in world.own_layers().items() for k, p in m.named_parameters() if p.requires_grad]
    left = [name for name in left if not name.endswith("bias")]
    assert not left, f"still asks for a gradient: {', '.join(left[:4])}"


@law(FEW, seed=drawn_seeds())
def passes_gradients_to_its_inputs(subject: Subject, options: Any, seed: int) -> None:
    """The gradient of a quantized layer's input is that of the layer's dequantized weight, within the tolerance."""
    import torch

    world = Quantized(subject, options, seed)
    world.tell(TOTAL)
    bound = SLACK * subject.record.tolerance  # type: ignore[attr-defined]
    for path, layer in world.own_layers().items():
        states = torch.randn(64, layer.in_features, requires_grad=True)
        upstream = torch.randn(64, layer.out_features)
        (gradient,) = torch.autograd.grad(layer(states), states, upstream)
        off = _far(gradient, upstream @ world.original(path))
        assert off <= bound, f"the gradient through {path} is {off:.3g} off, which is more than {bound:.3g}"


@law(FEW, seed=drawn_seeds())
def is_idempotent(subject: Subject, options: Any, seed: int) -> None:
    """A second `apply` changes nothing."""
    world = Quantized(subject, options, seed)
    before = {path: world.part.dequantize(layer).clone() for path, layer in world.own_layers().items()}
    world.model = world.part.apply(world.model, world.context)
    after = world.own_layers()
    assert after.keys() == before.keys(), "a second apply quantized other layers"
    for path, weight in before.items():
        assert world.part.dequantize(after[path]).equal(weight), f"a second apply changed {path}"


@law(FEW, seed=drawn_seeds())
def requantize_takes_back_what_dequantize_gave(subject: Subject, options: Any, seed: int) -> None:
    """A dequantized weight can be put back within a tenth of the tolerance, and another weight within the tolerance.

    If layers are trained, the weight that is put in is the latent one, which the layer rounds within the tolerance.
    """
    world = Quantized(subject, options, seed)
    world.tell(TOTAL)
    tolerance = subject.record.tolerance  # type: ignore[attr-defined]
    own = tolerance if _trains(subject.record) else tolerance / 10
    for path, layer in world.own_layers().items():
        weight = world.part.dequantize(layer).clone()
        world.part.requantize(layer, weight.clone())
        off = _far(world.part.dequantize(layer), weight)
        assert off <= own + 1e-6, f"{path}: its own weight, put back, is {off:.3g} off"
        other = world.original(path).flip(0).contiguous()
        world.part.requantize(layer, other.clone())
        off = _far(world.part.dequantize(layer), other)
        assert off <= tolerance, f"{path}: another weight, put in, is {off:.3g} off; tolerance {tolerance:g}"


@law(FEW, seed=drawn_seeds())
def state_dict_round_trips(subject: Subject, options: Any, seed: int) -> None:
    """The model's `state_dict`, carried through safetensors, gives another quantized model the same weights."""
    from safetensors.torch import load_file, save_file

    world, other = Quantized(subject, options, seed), Quantized(subject, options, seed + 1)
    world.tell(TOTAL)
    other.tell(TOTAL)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        save_file({name: t.detach().clone().contiguous() for name, t in world.model.state_dict().items()}, path)
        other.model.load_state_dict(load_file(path))
    layers = other.layers()
    for path_of, layer in world.own_layers().items():
        same = other.part.dequantize(layers[path_of]).equal(world.part.dequantize(layer))
        assert same, f"{path_of} holds another weight after a round trip of state_dict"


@law(FEW, when=_is_stored_small, default_only=True, seed=drawn_seeds())
def is_smaller(subject: Subject, options: Any, seed: int) -> None:
    """A quantized layer takes the record's `bits` per weight, and at most one bit and 8 bytes a row for scales.

    This holds for the default options and the examples; other options may use more scales for exactness.
    """
    world = Quantized(subject, options, seed)
    bits = subject.record.bits  # type: ignore[attr-defined]
    for path, layer in world.own_layers().items():
        rows, columns = world.original(path).shape
        tensors = [t for n, t in [*layer.named_parameters(), *layer.named_buffers()] if not n.endswith("bias")]
        size = sum(t.numel() * t.element_size() for t in tensors)
        allowed = math.ceil(rows * columns * (bits + OVERHEAD) / 8) + 8 * rows
        assert size <= allowed, f"{path} takes {size} bytes; {bits:g} bits a weight and scales are {allowed}"


@law(FEW, seed=drawn_seeds())
def keeps_in_and_out_features(subject: Subject, options: Any, seed: int) -> None:
    """Quantized layers keep `in_features` and `out_features`; `dequantize` gives float32 [out, in], None for others."""
    import torch

    world = Quantized(subject, options, seed)
    for path, layer in world.own_layers().items():
        shape = tuple(world.original(path).shape)
        sizes = (getattr(layer, "out_features", None), getattr(layer, "in_features", None))
        assert sizes == shape, f"{path} has (out_features, in_features) = {sizes}, not {shape}"
        weight = world.part.dequantize(layer)
        assert (tuple(weight.shape), weight.dtype) == (shape, torch.float32), f"{path} dequantizes to {weight.dtype}"
    assert world.part.dequantize(torch.nn.Linear(2, 2)) is None, "dequantize takes a layer that is not the quantizer's"


@law(FEW, seed=drawn_seeds())
def leaves_head_and_embeddings(subject: Subject, options: Any, seed: int) -> None:
    """Embeddings, output head and norms keep their class and every bit."""
    world = Quantized(subject, options, seed)
    paths = {n for n, m in world.originals.items() if "norm" in type(m).__name__.lower()}
    dense = world.dense
    ends = (dense.get_input_embeddings(), dense.get_output_embeddings())
    paths |= {n for n, m in world.originals.items() if any(m is end for end in ends)}
    for path in sorted(paths):
        one, two = world.originals[path], world.model.get_submodule(path)
        assert type(one) is type(two), f"{path} became a {type(two).__name__}"
        assert two.weight.detach().equal(one.weight.detach()), f"the weight of {path} changed"


@law(FEW)
def multipliers_are_finite(subject: Subject, options: Any) -> None:
    """`progressed` returns for every step factors of rate and decay that are finite and at least 0."""
    world = Quantized(subject, options)
    for step in range(TOTAL + 1):
        multipliers = world.part.progressed(Progress(step=step, total_steps=TOTAL, epoch=step / TOTAL))
        assert isinstance(multipliers, Multipliers), f"progressed gave {multipliers!r}, not luthier.Multipliers"
        for name, value in (("lr", multipliers.lr), ("weight_decay", multipliers.weight_decay)):
            assert math.isfinite(value) and value >= 0, f"at step {step} the multiplier of {name} is {value}"


def live(subject: Subject, options: Any) -> None:
    """Use a quantizer in every way that a run does."""
    world = Quantized(subject, options)
    for layer in world.layers().values():
        world.part.requantize(layer, world.part.dequantize(layer))
    for step in (0, TOTAL):
        world.part.progressed(Progress(step=step, total_steps=TOTAL, epoch=1.0))
    if world.part.trains:
        with tempfile.TemporaryDirectory() as folder:
            world.part.save(world.model, Path(folder))
