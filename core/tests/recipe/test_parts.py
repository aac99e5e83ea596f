"""From what a recipe says of a part to the part: names, mappings, options objects, objects of the caller's."""

import subprocess
import sys
from types import SimpleNamespace

import attrs
import pytest
from luthier import OptimizerRecord, Recipe, event, hookimpl, option
from luthier.builtin import AdamW
from luthier.plugins.compatibility import Chosen
from luthier.plugins.completion import REQUIRED
from luthier.plugins.registry import Plugins, Source
from luthier.recipe import resolve_parts
from luthier.testing import expect_error


class OwnOptimizer:
    """Keeps the protocol, installed nowhere."""

    needs = ("closure",)

    def build(self, groups):
        """Not called: only who it is matters here."""

    def evaluating(self):
        """Nor this."""


class OwnCallback:
    @event
    def saved(self, path):
        self.path = path


def test_each_form_of_a_part_is_resolved(make, plugins, options):
    found = resolve_parts(make(adapter={"name": "lora", "r": 4}, optimizer=AdamW(eps=1e-6), loss="sft"), plugins)
    assert (found.adapter.name, found.adapter.options) == ("lora", options.Lora(r=4))
    assert (found.optimizer.name, found.optimizer.options.eps) == ("adamw", 1e-6)
    assert (found.loss.name, found.loss.record.kind, found.loss.source.distribution) == ("sft", "loss", "luthier")
    assert [part.name for part in found.callbacks] == ["progress", "jsonl", "plot"]
    assert [part.kind for part in found][:5] == ["adapter", "loss", "optimizer", "quantizer", "provider"]


def test_what_a_run_records_of_a_part_is_its_distribution_and_version(make, plugins):
    parts = {p.kind: p.describe() for p in resolve_parts(make(adapter="lora"), plugins)}
    assert parts["adapter"] == {"kind": "adapter", "name": "lora", "distribution": "luthier-own", "version": "0.3"}


def test_an_object_that_keeps_the_protocol_is_a_part(make, plugins):
    own = OwnOptimizer()
    part = resolve_parts(make(optimizer=own), plugins).optimizer
    assert (part.local, part.record, part.options, part.source) == (own, None, None, None)
    assert part.name == f"{__name__}.OwnOptimizer"
    assert part.chosen() == Chosen(kind="optimizer", name=part.name, needs=frozenset({"closure"}))
    assert part.describe()["distribution"] is None


def test_the_tags_of_an_object_are_checked_like_a_records(make, plugins):
    class Tagged(OwnOptimizer):
        needs = "packing"
        conflicts = ("cudda",)

    part = resolve_parts(make(optimizer=Tagged()), plugins).optimizer
    with expect_error("plugin-invalid", "Tagged", "'cudda'", "'cuda'"):
        part.chosen()
    part.local.conflicts = ()
    assert part.chosen().needs == frozenset({"packing"})


def test_a_local_part_is_named_in_plain_data_and_cannot_be_loaded(make, plugins, wrong):
    plain = make(optimizer=OwnOptimizer(), exact_callbacks=["jsonl", OwnCallback()]).to_dict(plugins)
    assert plain["optimizer"] == {"local": f"{__name__}.OwnOptimizer"}
    assert plain["exact_callbacks"] == [{"name": "jsonl", "also": []}, {"local": f"{__name__}.OwnCallback"}]
    error = wrong(optimizer=plain["optimizer"])
    assert (error.code, error.where) == ("part-unknown", "optimizer")
    assert f"{__name__}.OwnOptimizer" in error.problem
    assert wrong(exact_callbacks=plain["exact_callbacks"]).where == "exact_callbacks.1"


def test_callbacks_of_every_form_stand_side_by_side(make, plugins, options):
    own = OwnCallback()
    recipe = make(exact_callbacks=["jsonl", {"name": "watch", "every": 3}, options.Watcher(every=4), own])
    parts = resolve_parts(recipe, plugins).callbacks
    assert [p.name for p in parts[:3]] == ["jsonl", "watch", "watch"]
    assert recipe.callbacks[1:] == [options.Watcher(every=3), options.Watcher(every=4), own]


@pytest.mark.parametrize(
    ("settings", "code", "says"),
    [
        ({"adapter": OwnOptimizer()}, "part-invalid", ("adapter: core.tests.recipe.test_parts.OwnOptimizer",)),
        ({"optimizer": OwnOptimizer}, "part-invalid", ("optimizer", "OwnOptimizer")),
        ({"adapter": AdamW()}, "part-invalid", ("adapter", "'adamw'", "optimizer=")),
        ({"adapter": AdamW}, "part-invalid", ("adapter",)),
        ({"adapter": None}, "recipe-wrong-type", ("adapter",)),
        ({"adapter": 3}, "recipe-wrong-type", ("adapter",)),
        ({"adapter": ["lora"]}, "recipe-wrong-type", ("adapter",)),
        ({"adapter": {}}, "recipe-missing", ("adapter.name",)),
        ({"adapter": {"name": 3}}, "recipe-wrong-type", ("adapter.name", "3")),
        ({"adapter": {"name": "osft"}}, "recipe-missing", ("adapter.unfreeze_rank_ratio",)),
        ({"adapter": {"name": "many", "inner": {"depth": 10}}}, "recipe-out-of-range", ("adapter.inner.depth", "10", "1", "9")),
        ({"adapter": {"name": "many", "ranks": {"q": 0.5}}}, "recipe-wrong-type", ("adapter.ranks.q", "0.5")),
        ({"adapter": {"name": "many", "solver": "eig"}}, "recipe-out-of-range", ("adapter.solver", "'eig'")),
        ({"adapter": {"name": "many", "form": "cor"}}, "recipe-wrong-type", ("adapter.form", "'core'", "'factored'", "'cor'")),
        ({"adapter": {"r": 3}}, "recipe-unknown-option", ("adapter.r", "'full'")),
        ({"callbacks": [OwnOptimizer()]}, "part-invalid", ("callbacks.0: ",)),
        ({"callbacks": ["nowhere"]}, "part-unknown", ("callbacks.0", "'nowhere'")),
        ({"callbacks": [3]}, "recipe-wrong-type", ("callbacks.0",)),
        ({"callbacks": 3}, "recipe-wrong-type", ("callbacks",)),
    ],
    ids=range(19),
)  # fmt: skip
def test_what_is_no_part_is_refused_at_its_place(wrong, settings, code, says):
    error = wrong(**settings)
    assert error.code == code
    assert all(fact in str(error) for fact in says)


@attrs.frozen(kw_only=True)
class Homeless:
    r: int = option(1, help="Rank.")


def test_options_that_belong_to_no_installed_part_are_refused(wrong):
    error = wrong(adapter=Homeless())
    assert error.code == "part-unknown"
    assert "Homeless" in error.problem


def test_a_recipe_made_directly_holds_what_it_was_given_and_resolves(options, plugins, make):
    recipe = attrs.evolve(make(), adapter={"name": "lora", "r": 3})
    assert resolve_parts(recipe, plugins).adapter.options == options.Lora(r=3)
    with expect_error("recipe-unknown-option", "adapter.rr", "'lora'"):
        resolve_parts(attrs.evolve(make(), adapter={"name": "lora", "rr": 3}), plugins)


def test_lazy_options_are_resolved_only_when_the_part_is_named(tmp_path, monkeypatch):
    module = tmp_path / "lazily_made.py"
    module.write_text(
        "import attrs\nfrom luthier import option\n"
        "@attrs.frozen(kw_only=True)\nclass Slow:\n    rate: float = option(0.5, help='Rate.')\n"
        "def options_for(name):\n    assert name == 'slow'\n    return Slow\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    @hookimpl
    def luthier_optimizers():
        record = dict(summary="Lazy.", options="lazily_made:options_for", build="luthier.builtin.optimizers:FusedAdamW")
        return [OptimizerRecord(name="slow", **record)]

    registry = Plugins(autoload=False)
    import luthier.builtin as builtin

    registry.register(builtin, Source(plugin="builtin", module="", distribution="luthier", version=""))
    registry.register(
        SimpleNamespace(luthier_optimizers=luthier_optimizers),
        Source(plugin="l", module="", distribution="l", version=""),
    )
    least = {"model": "demo", "data": "d.jsonl"}
    Recipe.from_dict(least, plugins=registry)
    assert "lazily_made" not in sys.modules
    recipe = Recipe.from_dict(least | {"optimizer": {"name": "slow", "rate": 0.25}}, plugins=registry)
    assert recipe.optimizer.rate == 0.25
    again = Recipe.from_dict(least | {"optimizer": recipe.optimizer}, plugins=registry)
    assert again == recipe
    assert resolve_parts(again, registry).optimizer.name == "slow"


def test_a_part_is_built_only_when_asked(make, plugins):
    found = resolve_parts(make(), plugins)
    assert set(REQUIRED["optimizer"]) <= set(dir(found.build(found.optimizer)))
    own = OwnOptimizer()
    local = resolve_parts(make(optimizer=own), plugins)
    assert local.build(local.optimizer) is own


def test_reading_a_recipe_imports_no_torch():
    code = (
        "import sys; from luthier.recipe import Recipe, load_recipe, parse_flags, recipe_hash, resolve_parts\n"
        "recipe = load_recipe(None, parse_flags(['--model', 'demo', '--data', 'd.jsonl'])).recipe\n"
        "resolve_parts(recipe); recipe.to_dict(); recipe_hash(recipe)\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'datasets', 'numpy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == ("[]\n", "")
