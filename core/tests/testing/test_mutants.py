"""Every check of the kit is proven by a broken part that it catches, and lets the sound parts pass."""

from __future__ import annotations

import importlib
import re

import pytest
from luthier.testing import checks_for, conformance
from luthier.testing.laws import CHECKS, KINDS, Law
from mutants.lists import MUTANTS
from mutants.records import SOUND


@conformance(SOUND)
def test_a_sound_part_passes(check):
    check()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.id)
def test_a_broken_part_is_caught_by_the_check_named_for_its_fault(mutant):
    (check,) = [c for c in checks_for(mutant.record) if c.name == mutant.caught_by]
    with pytest.raises(Exception) as caught:
        check()
    assert re.search(mutant.says, str(caught.value)), f"caught for another reason: {caught.value}"


@pytest.mark.parametrize("kind", ["all", *KINDS])
def test_each_check_has_a_mutant(kind):
    module = importlib.import_module(CHECKS[kind])
    laws = {value.name for value in vars(module).values() if isinstance(value, Law)}
    caught = {m.caught_by for m in MUTANTS if kind in ("all", m.record.kind)}
    assert laws - caught == set()
