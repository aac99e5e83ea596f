"""What a plugin builds lazily in a rehearsal on fake tensors is not there afterwards."""

import importlib
import sys
import types

import luthier
import pytest
import torch
from luthier.memory.isolation import isolated_parts
from luthier.memory.lazy_values import holds_numbers, list_kept

TABLE = "torch.linspace(-1.0, 1.0, 16)"
LAYER = """
import functools
import torch
from torch import nn
from torch.nn import functional as F

class Layer(nn.Module):
    def __init__(self, layer, table):
        super().__init__()
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        scale = layer.weight.detach().abs().amax().float()
        places = (layer.weight.detach().float() / scale)[..., None] - table()
        self.register_buffer("codes", places.abs().argmin(-1).to(torch.uint8))
        self.register_buffer("scale", scale)
        self.table = table

    def dense(self):
        return self.table()[self.codes.long()] * self.scale

    def forward(self, states):
        return F.linear(states, self.dense().to(states.dtype), self.bias)

class Coded:
    def __init__(self, options=None):
        pass

    def apply(self, model, context):
        for path, layer in [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear and "lm_head" not in n]:
            model.set_submodule(path, Layer(layer, table))
        return model

    def dequantize(self, layer):
        return layer.dense() if isinstance(layer, Layer) else None

    def requantize(self, layer, weight):
        layer.scale.copy_(weight.abs().amax())
        layer.codes.copy_(((weight / layer.scale)[..., None] - table()).abs().argmin(-1))
"""
WAYS = {
    "a cached function": "@functools.cache\ndef table():\n    return torch.linspace(-1.0, 1.0, 16)\n",
    "a cache of few": "@functools.lru_cache(maxsize=2)\ndef table():\n    return torch.zeros(16) + torch.linspace(-1, 1, 16)\n",
    "a global": "MADE = None\ndef table():\n    global MADE\n    if MADE is None:\n        MADE = torch.zeros(16) + torch.linspace(-1, 1, 16)\n    return MADE\n",
    "a dict": "MADE = {}\ndef table():\n    if 16 not in MADE:\n        MADE[16] = torch.rand(16).sort().values\n    return MADE[16]\n",
    "a list in a dict": "MADE = {'tables': []}\ndef table():\n    if not MADE['tables']:\n        MADE['tables'].append(torch.zeros(16) + 1)\n    return MADE['tables'][0]\n",
    "an attribute of a class": "class Tables:\n    made = None\ndef table():\n    if Tables.made is None:\n        Tables.made = torch.zeros(16) + torch.linspace(-1, 1, 16)\n    return Tables.made\n",
    "an object": "class Tables:\n    pass\nTABLES = Tables()\ndef table():\n    if not hasattr(TABLES, 'made'):\n        TABLES.made = torch.zeros(16) + torch.linspace(-1, 1, 16)\n    return TABLES.made\n",
    "a closure": "def make():\n    made = None\n    def table():\n        nonlocal made\n        if made is None:\n            made = torch.zeros(16) + torch.linspace(-1, 1, 16)\n        return made\n    return table\ntable = make()\n",
    "an attribute of a function": "def table():\n    if not hasattr(table, 'made'):\n        table.made = torch.zeros(16) + torch.linspace(-1, 1, 16)\n    return table.made\n",
    "a list of numbers": "@functools.cache\ndef levels():\n    return torch.linspace(-1.0, 1.0, 16).tolist()\ndef table():\n    return torch.tensor(levels())\n",
    "a module imported late": "def table():\n    from {name}_tables import LEVELS\n    return LEVELS\n",
    "a late module's cache": "def table():\n    from {name}_tables import cached\n    return cached()\n",
}  # fmt: skip
TABLES = "import functools\nimport torch\nLEVELS = torch.linspace(-1.0, 1.0, 16)\n@functools.cache\ndef cached():\n    return torch.zeros(16) + LEVELS\n"


@pytest.fixture
def coded(tmp_path, monkeypatch, request):
    """A quantizer's module that builds its table in one of the ways, and makes the part."""
    name = f"lazy{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(LAYER + WAYS[request.param].replace("{name}", name))
    (tmp_path / f"{name}_tables.py").write_text(TABLES)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module(name)
    for loaded in (name, f"{name}_tables"):
        sys.modules.pop(loaded, None)


@pytest.mark.parametrize("coded", WAYS, indirect=True)
def test_a_plan_leaves_no_fake_table_to_the_run_that_follows(coded, train, model_folder, rows):
    torch.manual_seed(0)
    found = luthier.plan(model=str(model_folder), data=rows, quantizer=coded.Coded(), adapter="lora")
    assert found.notes == []  # it was rehearsed
    table = coded.table()
    assert type(table) is torch.Tensor and table.isfinite().all()
    run = train(quantizer=coded.Coded(), adapter="lora", max_steps=2)
    assert all(loss > 0 for loss in run.loss_history)


@pytest.mark.parametrize("coded", ["a cached function"], indirect=True)
def test_a_table_that_was_there_before_stays(coded):
    before = coded.table()
    with isolated_parts([coded.Coded()]):
        pass
    assert coded.table() is before


@pytest.mark.parametrize("coded", ["a global"], indirect=True)
def test_what_is_no_number_stays_as_a_rehearsal_left_it(coded):
    """A library that was registered once must not be registered again."""
    coded.REGISTERED = False
    with isolated_parts([coded.Coded()]):
        coded.REGISTERED, coded.MADE = True, torch.zeros(1)
    assert coded.REGISTERED and coded.MADE is None


@pytest.mark.parametrize("coded", ["a module imported late"], indirect=True)
def test_a_module_that_is_imported_meanwhile_keeps_its_own_loader(coded):
    with isolated_parts([coded.Coded()]):
        coded.table()
    late = sys.modules[f"{coded.__name__}_tables"]
    assert type(late.__loader__).__module__ == type(late.__spec__.loader).__module__ == "_frozen_importlib_external"


def test_numbers_are_found_wherever_they_are_kept():
    assert holds_numbers({"a": [None, (1.0,)]}, set())
    assert holds_numbers(torch.nn.Linear(1, 1), set())
    assert not holds_numbers({"a": [None, ("b", True)]}, set())
    loop = []
    loop.append(loop)
    assert not holds_numbers(loop, set())


def test_a_mapping_that_makes_what_it_holds_is_not_looked_into():
    """Such as transformers' activations, which another package has a name for."""

    class Making(dict):
        def __getitem__(self, key):
            raise TypeError("made without its arguments")

        def items(self):
            return [(key, self[key]) for key in self]

        def values(self):
            return [self[key] for key in self]

    module = types.ModuleType("has_a_making_mapping")
    module.MAKING = Making(a=1)
    kept = list(list_kept(module, {"has_a_making_mapping"}, set()))
    module.MAKING["b"] = 2.0
    for one in kept:
        one.restore()
    assert dict.items(module.MAKING) == {("a", 1), ("b", 2.0)}


def test_an_object_that_answers_for_any_name_is_not_asked():
    """Such as wandb's summary, which asks its service, and fails in a forked rank."""

    class Answering:
        def __getattr__(self, name):
            raise ValueError(f"asked for {name}")

    module = types.ModuleType("has_an_answering_object")
    Answering.__module__ = module.__name__
    module.SUMMARY = Answering()
    kept = list(list_kept(module, {module.__name__}, set()))
    module.SUMMARY.step = 2.0
    for one in kept:
        one.restore()
    assert vars(module.SUMMARY) == {}
