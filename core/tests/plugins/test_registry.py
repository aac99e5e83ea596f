"""Which parts are there, who brings them, and what is said of those that are not."""

import os
import subprocess
import sys
from types import SimpleNamespace

import attrs
import luthier.builtin
import pytest
from luthier import LuthierError, OptimizerRecord, PenaltyRecord, event, hookimpl, option
from luthier.plugins import catalogue
from luthier.plugins.completion import PENALISES, REQUIRED
from luthier.plugins.records import KINDS
from luthier.plugins.registry import Plugins, Source, check_part
from luthier.testing import expect_error

HERE = Source(plugin="here", module="here", distribution="luthier-here", version="1")


@attrs.frozen(kw_only=True)
class Options:
    r: int = option(8, help="Rank.", low=1)


def record(name, **settings):
    build = "luthier.builtin.optimizers:FusedAdamW"
    return OptimizerRecord(**{"name": name, "summary": "Made up.", "options": Options, "build": build, **settings})


def registry(*records):
    plugins = Plugins(autoload=False)
    plugins.register(SimpleNamespace(luthier_optimizers=hookimpl(lambda: list(records))), HERE)
    return plugins


def test_an_installed_distribution_is_found_with_its_version(distribution):
    distribution("luthier-lion2", parts="lion2")
    offer = Plugins().get("optimizer", "lion2")
    assert (offer.record.name, offer.source.distribution, offer.source.version) == ("lion2", "luthier-lion2", "1.2")
    assert str(offer.source) == "lion2 (luthier-lion2 1.2)"
    assert offer.rivals == ()


def test_the_cores_own_parts_are_an_ordinary_plugin():
    plugins = Plugins()
    assert plugins.get("adapter", "full").source.distribution == "luthier"
    assert "full" not in [o.record.name for o in Plugins(blocked=["builtin"]).offers("adapter")]


def test_offers_are_sorted_by_kind_and_name():
    keys = [(o.record.kind, o.record.name) for o in Plugins().offers()]
    assert keys == sorted(keys, key=lambda k: (KINDS.index(k[0]), k[1]))
    assert [o.record.kind for o in Plugins().offers("loss")] == ["loss"] * len(Plugins().offers("loss"))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("import no_such_library\n", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("1 / 0\n", "ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)\n", "SystemExit: 3"),
        ("def broken(:\n", "SyntaxError"),
        ("@hookimpl\ndef luthier_optimizers():\n    raise RuntimeError('no')\n", "RuntimeError: no"),
        ("@hookimpl\ndef luthier_optimizers():\n    raise SystemExit\n", "SystemExit"),
        ("@hookimpl\ndef luthier_optimizers():\n    yield record('half')\n    1 / 0\n", "ZeroDivisionError"),
        ("@hookimpl\ndef luthier_optimisers():\n    return []\n", "there is no hook luthier_optimisers. Did you mean 'luthier_optimizers'"),
        ("@hookimpl\ndef optimizers():\n    return []\n", "there is no hook optimizers"),
        ("def luthier_optimizers():\n    return [record('unmarked')]\n", "luthier_optimizers is not marked. Mark it with @luthier.hookimpl."),
        ("def luthier_optimisers():\n    return []\n", "there is no hook luthier_optimisers"),
        ("x = 1\n", "has no hook"),
        ("@hookimpl\ndef luthier_optimizers():\n    record('forgotten')\n", "luthier_optimizers returns nothing. Return a list of records."),
        ("@hookimpl\ndef luthier_optimizers():\n    return record('single')\n", "TypeError"),
        ("@hookimpl\ndef luthier_optimizers():\n    return ['text']\n", "luthier_optimizers returns OptimizerRecords (found 'text')"),
        ("@hookimpl\ndef luthier_losses():\n    return [record('other')]\n", "luthier_losses returns LossRecords"),
        ("@hookimpl\ndef luthier_optimizers(plugins):\n    return []\n", "PluginValidationError"),
        ("@hookimpl\ndef luthier_optimizers():\n    return [record('twice'), record('twice')]\n", "offers optimizer 'twice' twice"),
        ("@hookimpl\ndef luthier_optimizers():\n    return [record('Upper')]\n", "may hold only lower-case letters"),
        ("@hookimpl\ndef luthier_optimizers():\n    return [record('tagged', needs='dens-weights')]\n", "unknown tag 'dens-weights'. Did you mean 'dense-weights'"),
    ],
    ids=range(20),
)  # fmt: skip
def test_a_broken_plugin_is_a_failure_and_hides_no_other(distribution, cause, refused, body, says):
    distribution("luthier-broken", body)
    distribution("luthier-sound", parts="sound")
    plugins = Plugins()
    assert says in cause(plugins, "luthier-broken")
    assert plugins.get("optimizer", "sound").source.distribution == "luthier-sound"
    assert plugins.get("adapter", "full")
    assert not {"half", "unmarked", "twice", "single"} & {o.record.name for o in plugins.offers()}


def test_a_broken_plugin_is_an_error_only_when_its_part_is_used(distribution, refused):
    distribution("luthier-broken", "import no_such_library\n")
    plugins = Plugins()
    error = refused(plugins, "broken")
    assert error.code == "part-broken"
    facts = ("luthier-broken 1.2", "ModuleNotFoundError", "'no_such_library'")
    assert [fact for fact in facts if fact not in str(error)] == []


def test_failures_are_told_with_any_unknown_name(distribution, refused):
    distribution("luthier-broken", "import no_such_library\n")
    error = refused(Plugins(), "adamv")
    assert error.code == "part-unknown"
    assert "Did you mean 'adamw'" in error.remedy
    assert "Plugins that failed to load: broken (luthier-broken 1.2)" in error.remedy


def test_a_distribution_with_unreadable_entry_points_hides_no_other(distribution, cause):
    distribution("luthier-garbled", entry_points="[luthier]\nthis is no entry point\n")
    distribution("luthier-sound", parts="sound")
    plugins = Plugins()
    assert plugins.get("optimizer", "sound")
    assert cause(plugins, "luthier-garbled")


def test_an_entry_point_that_leads_nowhere_is_a_failure(distribution, cause):
    distribution("luthier-lost", entry_points="[luthier]\nlost = no.such.place:thing\n")
    assert "No module named 'no'" in cause(Plugins(), "luthier-lost")


def test_a_distribution_without_metadata_is_still_named(distribution):
    made = distribution("luthier-nameless", parts="nameless")
    (made.info / "METADATA").unlink()
    assert Plugins().get("optimizer", "nameless").source.distribution


def test_a_distribution_that_lies_twice_on_the_path_counts_once(distribution):
    distribution("luthier-double", parts="older", version="1.0", folder="behind")
    distribution("luthier-double", parts="newer", version="2.0", folder="before")
    plugins = Plugins()
    names = {o.record.name: o.source.version for o in plugins.offers("optimizer")}
    assert (names.get("newer"), names.get("older")) == ("2.0", None)


def test_a_name_of_two_distributions_is_listed_as_a_conflict_and_refused_when_used(distribution, refused):
    distribution("luthier-one", parts="shared own")
    distribution("luthier-two", parts="shared")
    plugins = Plugins()
    (listed,) = [o for o in plugins.offers("optimizer") if o.record.name == "shared"]
    assert (listed.source.distribution, [r.distribution for r in listed.rivals]) == ("luthier-one", ["luthier-two"])
    error = refused(plugins, "shared")
    assert error.code == "part-ambiguous"
    assert "one (luthier-one 1.2), two (luthier-two 1.2)" in str(error)
    assert plugins.get("optimizer", "own")


def test_options_of_a_claimed_name_are_ambiguous_whoever_defines_them(distribution):
    one, two = (distribution(f"luthier-{n}", parts="shared") for n in ("one", "two"))
    plugins = Plugins()
    for made in (one, two):
        with pytest.raises(LuthierError) as caught:
            plugins.of_options(sys.modules[made.module].Options())
        assert caught.value.code == "part-ambiguous"


def test_the_same_name_in_two_kinds_is_no_conflict(distribution):
    body = (
        "@hookimpl\ndef luthier_optimizers():\n    return [record('same')]\n"
        "@hookimpl\ndef luthier_losses():\n    return [record('same', LossRecord, options=Other)]\n"
        "@attrs.frozen(kw_only=True)\nclass Other: pass\n"
    )
    distribution("luthier-both", body)
    plugins = Plugins()
    assert plugins.get("optimizer", "same").rivals == plugins.get("loss", "same").rivals == ()


@pytest.mark.parametrize("name", ["blocked", "luthier-blocked", "Luthier_Blocked", " blocked "])
def test_a_plugin_is_blocked_by_its_name_or_its_distribution(distribution, refused, monkeypatch, name):
    made = distribution("luthier-blocked", parts="blocked")
    monkeypatch.setenv("LUTHIER_DISABLE_PLUGINS", f"other,{name}")
    plugins = Plugins()
    assert made.module not in sys.modules
    assert [s.distribution for s in plugins.skipped] == ["luthier-blocked"]
    error = refused(plugins, "blocked")
    assert error.code == "part-unknown"
    assert "luthier-blocked 1.2" in str(error)
    assert "LUTHIER_DISABLE_PLUGINS" in error.remedy
    assert Plugins(blocked=[]).get("optimizer", "blocked")


def test_blocking_holds_in_a_process_of_its_own(distribution):
    made = distribution("luthier-blocked", parts="blocked")
    code = "from luthier.plugins.registry import installed_plugins; print([o.record.name for o in installed_plugins().offers('optimizer')])"
    environment = {**os.environ, "PYTHONPATH": str(made.site), "LUTHIER_DISABLE_PLUGINS": ""}

    def listed(**more):
        run = subprocess.run(
            [sys.executable, "-c", code], env=environment | more, capture_output=True, text=True, check=True
        )
        return run.stdout

    assert "'blocked'" in listed()
    assert "'blocked'" not in listed(LUTHIER_DISABLE_PLUGINS="luthier-blocked")


def test_an_unknown_name_is_told_its_nearest_or_all_that_are_known(refused):
    plugins = registry(record("sophia"))
    assert refused(plugins, "sofia").remedy == "Did you mean 'sophia'?"
    assert refused(plugins, "zzz").remedy == "Known: sophia."
    assert refused(plugins, "zzz", "adapter").remedy == "Install the distribution named, or fix it."


def test_an_unknown_name_is_told_the_distribution_that_would_bring_it(refused):
    plugins = Plugins(autoload=False, bringing=lambda kind, name: "luthier-osft" if name == "osft" else None)
    assert refused(plugins, "osft", "adapter").remedy == "Install it: pip install luthier-osft"


def test_a_part_of_a_broken_plugin_is_found_by_the_catalogue(distribution, refused):
    distribution("luthier-family", "import no_such_library\n")
    plugins = Plugins(bringing=lambda kind, name: "luthier-family" if name == "child" else None)
    assert refused(plugins, "child").code == "part-broken"
    assert refused(plugins, "family.other").code == "part-broken"
    assert refused(plugins, "fam").code == "part-unknown"


def test_the_real_catalogue_is_read():
    assert isinstance(catalogue.read_catalogue(), dict)
    assert catalogue.distribution_of("adapter", "no-such-part") is None


def test_options_find_their_part(distribution):
    made = distribution("luthier-own", parts="own")
    plugins = Plugins()
    assert plugins.of_options(sys.modules[made.module].Options(r=2)).record.name == "own"
    with pytest.raises(LuthierError) as caught:
        plugins.of_options(Options())
    assert caught.value.code == "part-unknown"


def test_a_class_that_serves_two_parts_names_neither():
    plugins = registry(record("one"), record("two"))
    with pytest.raises(LuthierError) as caught:
        plugins.of_options(Options())
    assert (caught.value.code, caught.value.exit_status) == ("part-ambiguous", 2)


LAZY = "@hookimpl\ndef luthier_optimizers():\n    return [record('lazy', options='{}')]\n"


def test_listing_never_resolves_lazy_options(distribution, tmp_path):
    distribution("luthier-lazy", LAZY.format("lazy_options_of_a_test:Options"))
    (tmp_path / "site" / "lazy_options_of_a_test.py").write_text(HEAVY)
    plugins = Plugins()
    assert [o for o in plugins.offers() if o.record.name == "lazy"]
    with pytest.raises(LuthierError):
        plugins.of_options(Options())
    assert "lazy_options_of_a_test" not in sys.modules
    cls = plugins.options(plugins.get("optimizer", "lazy"))
    assert cls(rate=0.5).rate == 0.5
    assert plugins.of_options(cls()).record.name == "lazy"


HEAVY = """
import attrs
from luthier import option
@attrs.frozen(kw_only=True)
class Options:
    rate: float = option(0.1, help="Rate.")
@attrs.frozen(kw_only=True)
class Named:
    name: str = option("x", help="Taken by the recipe.")
def fails(name):
    raise RuntimeError(name)
def lacks(name):
    import no_such_library
text = "text"
"""


@pytest.mark.parametrize(
    ("target", "code", "says"),
    [
        (
            "no_such_module:Options",
            "dependency-missing",
            ("optimizer 'lazy' of lazy (luthier-lazy 1.2)", "no_such_module"),
        ),
        ("{}:Missing", "part-broken", ("optimizer 'lazy' of lazy (luthier-lazy 1.2)", "AttributeError")),
        ("{}:fails", "part-broken", ("optimizer 'lazy' of lazy (luthier-lazy 1.2)", "RuntimeError")),
        ("{}:lacks", "dependency-missing", ("optimizer 'lazy' of lazy (luthier-lazy 1.2)", "no_such_library")),
        ("{}:text", "part-broken", ("optimizer 'lazy' of lazy (luthier-lazy 1.2)", "TypeError")),
        ("{}:Named", "plugin-invalid", ("optimizer 'lazy' of lazy (luthier-lazy 1.2)", "'name'")),
        ("builtins:int", "plugin-invalid", ("optimizer 'lazy' of lazy (luthier-lazy 1.2)",)),
    ],
)
def test_lazy_options_that_fail_are_refused_by_the_parts_name(distribution, tmp_path, target, code, says):
    heavy = f"heavy_{abs(hash(target))}"
    distribution("luthier-lazy", LAZY.format(target.format(heavy)))
    (tmp_path / "site" / f"{heavy}.py").write_text(HEAVY)
    plugins = Plugins()
    with pytest.raises(LuthierError) as caught:
        plugins.options(plugins.get("optimizer", "lazy"))
    assert caught.value.code == code
    assert caught.value.where == "optimizer 'lazy' of lazy (luthier-lazy 1.2)"
    assert all(fact in str(caught.value) for fact in says)
    sys.modules.pop(heavy, None)


@pytest.mark.parametrize(
    ("build", "body", "code", "says"),
    [
        ("luthier_no_such:Thing", "", "part-broken", ("optimizer 'own' of here (luthier-here 1)", "'luthier_no_such'")),
        ("{}:Missing", "", "part-broken", ("AttributeError",)),
        ("{}:Thing", "1 / 0", "part-broken", ("ZeroDivisionError",)),
        ("{}:Thing", "import {}.inner", "part-broken", ("optimizer 'own' of here (luthier-here 1)",)),
        ("{}:Thing", "import no_such_library", "dependency-missing", ("optimizer 'own' of here (luthier-here 1)", "no_such_library")),
        ("{}:Thing", "raise ModuleNotFoundError('gone', name='torch')", "dependency-missing", ("optimizer 'own' of here (luthier-here 1)",)),
        ("{}:Thing", "from os import no_such_name\n", "part-broken", ("optimizer 'own' of here (luthier-here 1)",)),
        ("{}:late", "def late(options):\n    import no_such_library\n", "dependency-missing", ("no_such_library",)),
        ("{}:Half", "class Half:\n    def __init__(self, options): ...\n    def evaluating(self): ...\n", "part-invalid", ("optimizer 'own'",)),
        ("{}:Heir", "import luthier\nclass Heir(luthier.Optimizer):\n    def __init__(self, options): ...\n", "part-invalid", ("optimizer 'own'",)),
    ],
    ids=range(10),
)  # fmt: skip
def test_a_part_that_cannot_be_built_is_refused_by_name(tmp_path, monkeypatch, build, body, code, says):
    module = f"to_build_{abs(hash((build, body)))}"
    (tmp_path / f"{module}.py").write_text(body.format(module) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins = registry(record("own", build=build.format(module)))
    with pytest.raises(LuthierError) as caught:
        plugins.build(plugins.get("optimizer", "own"), Options())
    assert caught.value.code == code
    assert "'own'" in caught.value.where
    assert all(fact in str(caught.value) for fact in says)


def test_a_users_own_error_in_a_part_is_not_blamed_on_the_plugin(tmp_path, monkeypatch):
    body = "from luthier import LuthierError\ndef late(options):\n    raise LuthierError('own:code', 'mine')\n"
    (tmp_path / "raises_its_own.py").write_text(body)
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins = registry(record("own", build="raises_its_own:late"))
    with pytest.raises(LuthierError) as caught:
        plugins.build(plugins.get("optimizer", "own"), Options())
    assert caught.value.code == "own:code"


def test_listing_every_installed_part_imports_nothing_heavy():
    code = (
        "import sys; from luthier.plugins.registry import installed_plugins; assert installed_plugins().offers()\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'wandb', 'mlflow', 'tensorboard') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_an_object_is_checked_against_its_kinds_protocol():
    with expect_error("part-invalid", "here", "__call__"):
        check_part(object(), "loss", "here")


@pytest.mark.parametrize("over", PENALISES)
def test_a_penalty_must_have_the_measure_of_what_it_is_over(over):
    with expect_error("part-invalid", "here", PENALISES[over]):
        check_part(SimpleNamespace(over=over), "penalty", "here")


def test_a_penalty_is_over_weights_or_tokens():
    with expect_error("plugin-invalid", "penalty record 'rows'"):
        PenaltyRecord(name="rows", summary="Of rows.", build="here:Rows", over="rows")


class Watcher:
    @event
    def saved(self, path):
        pass


def test_every_registered_plugin_of_the_core_has_a_part_for_its_protocol():
    plugins = Plugins(autoload=False)
    plugins.register(luthier.builtin, HERE)
    assert not plugins.failures
    for offer in plugins.offers():
        plugins.build(offer, plugins.options(offer)())
    watcher = Watcher()
    assert check_part(watcher, "callback", "here") is watcher


def test_a_record_without_options_is_built_with_none_to_give():
    offer = Plugins().get("callback", "progress")
    assert attrs.fields(Plugins().options(offer)) == ()
    assert Plugins().build(offer, Plugins().options(offer)()) is not None


def test_what_a_part_must_have_is_what_its_protocol_leaves_abstract():
    assert REQUIRED["loss"] == ("data", "terms", "__call__")
    assert REQUIRED["optimizer"] == ("build",)
    assert REQUIRED["callback"] == REQUIRED["metric"] == ()


def test_a_family_of_names_is_listed_once(refused):
    plugins = registry(record("peft.loha"), record("peft.oft"), record("sophia"))
    assert refused(plugins, "zzz").remedy == "Known: peft.*, sophia."
    assert refused(plugins, "peft.lohaa").remedy.startswith("Did you mean 'peft.loha'")
