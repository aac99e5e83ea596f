"""Listing reads PEFT's files and runs none of them; another PEFT lists its own methods."""

import os
import subprocess
import sys

import luthier_peft
import pytest
from luthier.testing import expect_error
from luthier_peft import listing
from luthier_peft.methods import METHODS
from luthier_peft.options import config_class


def run(script, *folders):
    """What a fresh interpreter prints, with `folders` first on its path."""
    path = os.pathsep.join([*map(str, folders), *(p for p in sys.path if p)])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def fake_peft(folder, registration, layers=True):
    """A PEFT whose only method is `newest`, and whose import would fail."""
    tuner = folder / "peft" / "tuners" / "newest"
    tuner.mkdir(parents=True)
    (folder / "peft" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tuner / "__init__.py").write_text(registration)
    if layers:
        (tuner / "layer.py").write_text("")
    return folder


REGISTRATION = 'if True:\n    register_peft_method(\n        name="newest", config_cls=NewestConfig, model_cls=M)'
NAMES = "import luthier_peft; print(*[r.name for r in luthier_peft.luthier_adapters()])"


def test_listing_every_part_imports_neither_peft_nor_torch():
    script = (
        "import sys; from luthier.plugins.registry import Plugins; names = [o.record.name for o in Plugins().offers()];"
        "print(sum(n.startswith('peft.') for n in names), *[m for m in ('peft', 'torch', 'transformers') if m in sys.modules])"
    )
    assert run(script) == [str(len(METHODS))]


def test_another_peft_lists_its_own_methods_without_running(tmp_path):
    assert run(NAMES, fake_peft(tmp_path, REGISTRATION)) == ["peft.newest"]


def test_a_method_that_the_table_does_not_know_promises_nothing(tmp_path):
    script = "import luthier_peft; r = luthier_peft.luthier_adapters()[0]; print(r.mergeable, r.tolerance, r.conflicts)"
    assert run(script, fake_peft(tmp_path, REGISTRATION)) == ["False", "1.0", "frozenset({'quantized-base'})"]


def test_a_method_without_layers_is_not_listed(tmp_path):
    assert run(NAMES, fake_peft(tmp_path, REGISTRATION, layers=False)) == []


def test_without_peft_the_plugin_is_a_failure_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr(listing.importlib.util, "find_spec", lambda name: None)
    listing.config_names.cache_clear()
    try:
        with expect_error("dependency-missing") as caught:
            luthier_peft.luthier_adapters()
    finally:
        listing.config_names.cache_clear()
    assert caught.value.code == "dependency-missing"


def test_what_is_read_from_the_files_is_what_peft_registers():
    for method, name in listing.config_names().items():
        assert config_class(method).__name__ == name


def test_options_classes_are_found_under_the_names_of_pefts_configurations():
    assert luthier_peft.LoHaConfig(r=4).method == "loha"
    with pytest.raises(AttributeError):
        luthier_peft.NoSuchConfig  # noqa: B018
