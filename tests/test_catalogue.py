"""The catalogue of first-party parts is what the plugins of this repository offer. `python tests/test_catalogue.py` writes it."""

import importlib.metadata
import json
import tomllib
from pathlib import Path

import pytest
from luthier import LuthierError, Recipe
from luthier.plugins import catalogue
from luthier.plugins.records import RECORDS
from luthier.plugins.registry import Plugins

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "core/src/luthier/plugins/catalogue.json"


def first_party():
    """The distributions under plugins/. The core's own parts are never missing, and what is in contrib/ is not ours."""
    return {tomllib.loads(p.read_text("utf-8"))["project"]["name"] for p in ROOT.glob("plugins/*/pyproject.toml")}


def written():
    """The text of the catalogue: kind -> name -> distribution, a family such as `peft.oft` as `peft.*`."""
    ours, plugins = first_party(), Plugins(blocked=[])
    assert ours <= {distribution.name for distribution in importlib.metadata.distributions()}, "install every member"
    found = {kind: {} for kind in RECORDS}
    for offer in plugins.offers():
        if offer.source.distribution in ours:
            family, dot, _ = offer.record.name.partition(".")
            found[offer.record.kind][f"{family}.*" if dot else family] = offer.source.distribution
    return json.dumps({kind: parts for kind, parts in found.items() if parts}, indent=2) + "\n"


def test_the_catalogue_is_what_the_repository_offers():
    assert FILE.read_text("utf-8") == written()


def test_every_first_party_distribution_is_in_the_catalogue():
    assert {owner for parts in catalogue.read_catalogue().values() for owner in parts.values()} == first_party()


@pytest.fixture
def without():
    """A registry in which a distribution is not installed."""

    def of(distribution):
        plugins = Plugins(blocked=[distribution])
        plugins.blocked, plugins.skipped = set(), []
        return plugins

    return of


CASES = [
    ("adapter", "lora", "luthier-lora"),
    ("adapter", {"name": "dora", "r": 4}, "luthier-lora"),
    ("adapter", "adalora", "luthier-lora"),
    ("adapter", "peft.oft", "luthier-peft"),
    ("adapter", "slao", "luthier-slao"),
    ("adapter", "p_tuning_v2", "luthier-prompt"),
    ("adapter", "bitfit", "luthier-selective"),
    ("quantizer", "nf4", "luthier-nf4"),
    ("quantizer", {"name": "bitnet", "method": "twn"}, "luthier-bitnet"),
    ("loss", "dpo", "luthier-preference"),
    ("callbacks", ["wandb"], "luthier-wandb"),
    ("callbacks", ["jsonl", {"name": "mlflow"}], "luthier-mlflow"),
    ("report_to", "trackio", "luthier-trackio"),
]


@pytest.mark.parametrize(("field", "value", "distribution"), CASES)
def test_a_part_that_is_not_installed_says_which_distribution_brings_it(without, field, value, distribution):
    with pytest.raises(LuthierError, match=distribution) as caught:
        Recipe.from_dict({"model": "demo", "data": "rows.jsonl", field: value}, plugins=without(distribution))
    assert caught.value.code == "part-unknown"
    assert field in caught.value.where


def test_a_misspelt_method_of_an_installed_distribution_is_not_installed_again():
    with pytest.raises(LuthierError, match=r"peft\.loha") as caught:
        Recipe.from_dict({"model": "demo", "data": "rows.jsonl", "adapter": "peft.lohaa"})
    assert "pip" not in str(caught.value)


if __name__ == "__main__":
    FILE.write_text(written(), "utf-8")
