"""Layers with a norm of their own: where it stands, at what size it begins, and what is refused."""

import attrs
import pytest
import torch
from luthier import LuthierError
from luthier.testing.contexts import context
from luthier.testing.worlds import tiny_model
from luthier_bitnet import Bitnet, Ternary
from luthier_bitnet.layer import TernaryLinear
from luthier_bitnet.packed import write_packed
from luthier_bitnet.quantizer import TernaryQuantizer, find_layers

NAMES = ["o_proj", "down_proj"]


def quantized(options, **changes):
    model = tiny_model(hidden_size=32, intermediate_size=48)
    part = TernaryQuantizer(options)
    return part.apply(model, attrs.evolve(context(model), **changes)), part


def layer_of(share, size=2.0):
    part = TernaryQuantizer(Ternary())
    part.stage.share = share
    layer = TernaryLinear(torch.nn.Linear(6, 4), part.form, part.stage)
    layer.add_norm(size)
    return layer


def test_named_layers_alone_get_a_norm_and_it_begins_at_the_size_of_their_inputs():
    dense, seen = tiny_model(hidden_size=32, intermediate_size=48), {}
    given = context(dense)
    for path, module in dense.named_modules():
        if path.rpartition(".")[2] in NAMES:
            module.register_forward_pre_hook(lambda m, inputs, path=path: seen.setdefault(path, []).append(inputs[0]))
    for batch in given.batches(8):
        given.forward(dense, batch)
    layers = find_layers(quantized(Ternary(sub_norms=NAMES))[0])
    assert {path for path, layer in layers.items() if layer.sub_norm is not None} == seen.keys()
    for path, states in seen.items():
        size = torch.cat([s.flatten() for s in states]).square().mean().sqrt()
        weight = layers[path].sub_norm.weight
        torch.testing.assert_close(weight, size.detach().expand_as(weight), rtol=1e-5, atol=0)
        assert weight.requires_grad


def test_before_the_schedule_a_layer_is_what_it_was_and_at_its_end_it_is_normalized():
    states = torch.randn(3, 6)
    for share in (0.0, 0.5, 1.0):
        layer = layer_of(share)
        normed = 2.0 * states / (states.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        expected = torch.nn.functional.linear(states + share * (normed - states), layer.dense(), layer.bias)
        torch.testing.assert_close(layer(states), expected)


def test_a_size_that_was_measured_is_kept_and_not_measured_again():
    def kept(name, function, bound=None):
        assert name == "sub_norms"
        return dict.fromkeys(bound, 3.0)

    layers = find_layers(quantized(Ternary(sub_norms=["o_proj"]), decide=kept)[0])
    assert {layer.sub_norm.weight[0].item() for path, layer in layers.items() if path.endswith("o_proj")} == {3.0}


def test_a_name_of_no_layer_is_refused_with_the_nearest():
    with pytest.raises(LuthierError, match="down_proj") as caught:
        quantized(Bitnet(sub_norms=["down_porj"]))
    assert (caught.value.code, caught.value.where) == ("model-target", "sub_norms")


def test_files_that_know_no_such_norm_are_refused_and_so_is_a_merge(tmp_path):
    model, part = quantized(Bitnet(sub_norms=["o_proj"]))
    with pytest.raises(LuthierError, match="sub_norms"):
        write_packed(model, tmp_path / "packed", "divide")
    assert not (tmp_path / "packed").exists()
    assert not part.mergeable
    assert not quantized(Ternary(sub_norms=["o_proj"]))[1].mergeable
    assert quantized(Ternary())[1].mergeable
