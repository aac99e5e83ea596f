"""Nothing in the table is guessed: each method is tried, and what the table says of it is what came out."""

import inspect
import re
from importlib.util import find_spec
from pathlib import Path

import peft
import pytest
import torch
from luthier import LuthierError
from luthier.testing import expect_error
from luthier_peft import injection, packing
from luthier_peft.listing import config_names
from luthier_peft.methods import METHODS, REFUSED, ROUNDING, offered
from luthier_peft.options import config_class, options_class, to_config

from .conftest import IDS, World, context_of, distance, every_method, fitting, outputs

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
ROWS = dict(re.findall(r"^\| `([A-Z0-9_]+)` \| (.*) \|$", README, flags=re.M))
EXACT_STARTS = {"c3a": {"init_weights": True}, "fourierft": {"init_weights": True}}  # of those with a random default


def mixing(model):
    """Why packed documents differ from separate ones; transformers isolates documents by their restarting positions."""
    model.eval()
    first, second = IDS[:, :5], IDS[:, 5:]
    positions = torch.cat([torch.arange(5), torch.arange(9)])[None]
    with torch.no_grad():
        packed = model(input_ids=IDS, position_ids=positions, use_cache=False).logits
        apart = torch.cat([model(input_ids=part, use_cache=False).logits for part in (first, second)], 1)
    return None if torch.allclose(packed, apart, atol=1e-4) else "they differ"


def loss_of(model):
    """Without dropout and sampling."""
    return float(torch.nn.functional.cross_entropy(outputs(model)[0, :-1], IDS[0, 1:]))


def test_there_are_34_methods_and_45_types():
    assert len(peft.PeftType) == len(peft.PEFT_TYPE_TO_CONFIG_MAPPING) == 45
    assert set(METHODS) == set(offered()) and len(METHODS) == 34
    assert set(REFUSED) | set(METHODS) == set(config_names())


@pytest.mark.parametrize("method", every_method())
def test_a_fresh_adapter_starts_as_the_table_says(method):
    tolerance = METHODS[method].tolerance
    world = World(fitting(method))
    before, after = outputs(world.base), world.outputs()
    off = float((after - before).norm() / before.norm())
    assert after.equal(before) == (tolerance == 0)
    assert tolerance == 0 or tolerance / 1000 < off <= tolerance
    if tolerance > ROUNDING and method in EXACT_STARTS:
        exact = World(fitting(method, **EXACT_STARTS[method]))
        assert exact.outputs().equal(before)


@pytest.mark.parametrize("method", every_method())
def test_a_trained_adapter_keeps_documents_apart_as_the_table_says(method):
    world = World(fitting(method))
    world.train(4)
    assert (mixing(world.model) is None) == (METHODS[method].packing == "")


@pytest.mark.parametrize("method", every_method())
def test_it_merges_as_the_table_says(method):
    world = World(fitting(method))
    world.train(4)
    before, names = world.outputs(), set(world.base.state_dict())
    if METHODS[method].merging:
        with pytest.raises(LuthierError) as caught:
            world.part.merge(world.context)
        assert caught.value.code == "artifact-unmergeable"
        assert world.outputs().equal(before)  # and nothing was touched
        with pytest.raises((ValueError, NotImplementedError)):  # PEFT itself cannot either
            world.part._handle.merge_and_unload()
        return
    merged = world.part.merge(world.context)
    assert merged is world.model and set(merged.state_dict()) == names
    assert distance(outputs(merged), before) < 1e-5


@pytest.mark.parametrize("method", every_method())
def test_a_few_steps_lower_the_loss_and_move_nothing_of_the_base(method):
    world = World(fitting(method))
    frozen = {n: p.detach().clone() for n, p in world.model.named_parameters() if not p.requires_grad}
    before = loss_of(world.model)
    world.train(8, rate=1e-2)
    assert loss_of(world.model) < before - 1e-3
    now = dict(world.model.named_parameters())
    assert all(now[name].equal(tensor) for name, tensor in frozen.items())


def test_the_probe_sees_what_mixes_documents_only_with_noise_on_it():
    world = World(fitting("lily"))
    assert mixing(world.model) is None  # it starts as the identity
    kept = {n: p.detach().clone() for n, p in world.model.named_parameters()}
    modes = [m.training for m in world.model.modules()]
    with expect_error("part-unsupported", "adapter peft.lily") as caught:
        packing.check(world.model, world.parameters, context_of(world.model, probe=mixing), "adapter peft.lily")
    assert caught.value.code == "part-unsupported"
    assert all(p.equal(kept[n]) for n, p in world.model.named_parameters())
    assert [m.training for m in world.model.modules()] == modes


def test_attaching_refuses_a_method_that_fails_the_probe(monkeypatch):
    """A method of another version, of which the table knows nothing, is caught by the probe alone."""
    monkeypatch.delitem(METHODS, "lily")
    world = World(fitting("lora"))
    part = world.part.__class__(fitting("lily"))
    with pytest.raises(LuthierError, match="unsupported: packing"):
        part.attach(world.base, context_of(world.base, probe=mixing))


def test_a_known_failure_is_kept_away_by_its_record_and_works_unpacked():
    world = World(fitting("lily"))  # its context has no probe; the next one would complain
    part = world.part.__class__(fitting("lily"))
    part.attach(world.base, context_of(world.base, probe=mixing))
    assert part.conflicts == {"packing", "quantized-base"} and part.groups()


def test_adamss_is_refused_because_it_needs_scikit_learn():
    if find_spec("sklearn"):
        pytest.skip("scikit-learn is installed here")
    with pytest.raises(LuthierError, match="scikit-learn") as caught:
        to_config(options_class("adamss")())
    assert caught.value.code == "dependency-missing"


def test_poly_is_refused_because_it_needs_task_ids():
    world = World(fitting("lora"))
    config = config_class("poly")(target_modules=["q_proj"])
    injection.inject(world.base, config, world.context, "adapter peft.poly")
    with pytest.raises(ValueError, match="task_ids"):
        outputs(world.base)


def test_xlora_is_refused_because_it_needs_trained_adapters():
    with pytest.warns(UserWarning, match="No value was provided for `adapters`"):
        config = config_class("xlora")(hidden_size=32)
    world = World(fitting("lora"))
    with pytest.raises(LuthierError):
        injection.inject(world.base, config, world.context, "adapter peft.xlora")


def test_prompt_methods_and_the_second_network_change_no_layers():
    from peft.tuners.tuners_utils import BaseTuner

    tuners = peft.PEFT_TYPE_TO_TUNER_MAPPING
    layered = {t.value.lower() for t, cls in tuners.items() if inspect.isclass(cls) and issubclass(cls, BaseTuner)}
    assert set(METHODS) <= layered
    assert "adaption_prompt" not in layered
    assert layered - set(METHODS) == {"adamss", "poly", "xlora", "shadow"}


def test_the_readme_has_every_type_and_what_the_table_says_of_it():
    assert set(ROWS) == {t.value for t in peft.PeftType}
    for kind, row in ROWS.items():
        method = METHODS.get(kind.lower())
        if method is None:
            assert row.startswith(f"not offered: {REFUSED.get(kind.lower(), '')}") and row.endswith("| | |")
            continue
        name, start, packs, merges = (cell.strip() for cell in row.split("|"))
        assert name == f"`peft.{kind.lower()}`"
        assert start == (str(method.tolerance) if method.tolerance else "exact")
        assert packs == (f"no: {method.packing}" if method.packing else "yes")
        assert (merges == "yes") == method.mergeable
