"""The decorator and the listing: ids, strict expected failures, examples, and what importing the kit costs."""

from __future__ import annotations

import subprocess
import sys
import unittest

import attrs
import pytest
from luthier.plugins.options import option
from luthier.testing import checks_for, conformance, expect_error
from luthier.testing.kinds import part_checks as everyones
from luthier.testing.laws import Law
from luthier.testing.worlds import tiny_model
from mutants.records import (
    ADAPTER,
    CALLBACK,
    COUPLED,
    LOSS,
    OPTIMIZER,
    PREFERENCE,
    QUANTIZER,
    MomentumOptions,
    NllOptions,
    broken,
)

pytest_plugins = ["pytester"]
HEAD = "from luthier.testing import conformance\nfrom mutants.records import *\n"
TEST = "def test_conforms(check):\n    check()\n"


def cases(decorator):
    def test_conforms(check):
        check()

    (mark,) = decorator(test_conforms).pytestmark
    return mark.args[1]


def names(record):
    return [check.name for check in checks_for(record)]


def test_ids_say_kind_name_and_check():
    ids = [case.id for case in cases(conformance([OPTIMIZER]))]
    assert "optimizer-mutant-momentum-resumes_exactly" in ids
    assert len(set(ids)) == len(ids)


def test_every_kind_has_the_common_checks_and_its_own():
    common = [value.name for value in vars(everyones).values() if isinstance(value, Law)]
    assert "import_needs_no_torch" in common
    for record in (LOSS, ADAPTER, OPTIMIZER, QUANTIZER, CALLBACK):
        assert set(common) < set(names(record))


@pytest.mark.parametrize(
    ("record", "changes", "check"),
    [
        (ADAPTER, {"mergeable": False}, "merge_keeps_outputs"),
        (ADAPTER, {"provides": frozenset()}, "disabled_gives_the_base"),
        (ADAPTER, {"needs": {"dense-weights"}}, "works_on_a_quantized_base"),
        (ADAPTER, {"conflicts": {"quantized-base"}}, "merges_on_a_quantized_base"),
        (LOSS, {"reference": None}, "matches_its_reference"),
        (LOSS, {"data": "preference"}, "counts_an_example_by_its_weight"),
        (PREFERENCE, {"data": "documents"}, "prefers_what_the_row_prefers"),
        (QUANTIZER, {"bits": None}, "is_smaller"),
        (QUANTIZER, {"provides": {"dense-weights"}}, "freezes_base_weights"),
    ],
)
def test_the_record_decides_which_checks_hold(record, changes, check):
    assert check in names(record)
    assert check not in names(attrs.evolve(record, **changes))


def test_each_check_says_what_it_means():
    for record in (LOSS, ADAPTER, OPTIMIZER, QUANTIZER, CALLBACK):
        assert all(check.meaning.endswith(".") for check in checks_for(record))


def test_an_expected_failure_of_an_unknown_check_is_refused_with_the_nearest_name():
    with expect_error("plugin-invalid", "expected_failures", "'resumes_exactly'"):
        conformance([OPTIMIZER], {"resume_exactly": "not yet"})


def test_an_expected_failure_needs_a_reason():
    with expect_error("plugin-invalid", "expected_failures.resumes_exactly"):
        conformance([OPTIMIZER], {"resumes_exactly": " "})


def test_an_example_of_another_part_is_refused():
    with expect_error("plugin-invalid", "examples"):
        conformance([OPTIMIZER], examples=[NllOptions()])


def test_the_authors_examples_are_tried():
    record = attrs.evolve(OPTIMIZER, build="mutants.optimizers:RefusesHalf")
    (check,) = [c for c in checks_for(record) if c.name == "is_deterministic"]
    check()  # what the part refuses is not counted against it
    mine = [MomentumOptions(momentum=0.5)]
    (check,) = [c for c in checks_for(record, examples=mine) if c.name == "is_deterministic"]
    with expect_error("recipe-conflict"):
        check()


def test_a_check_that_never_ran_the_part_is_skipped_with_its_reason():
    checks = {check.name: check for check in checks_for(COUPLED)}
    with pytest.raises(unittest.SkipTest, match="'mutant-squared'.*couples the batch"):
        checks["gives_sums_not_means"]()
    with pytest.raises(unittest.SkipTest, match="declares no coefficients"):
        checks["coefficients_agree_with_the_gradient"]()


def test_options_that_the_part_refuses_are_said(capsys):
    record = attrs.evolve(OPTIMIZER, build="mutants.optimizers:RefusesHalf", options=HalfOptions)
    (check,) = [c for c in checks_for(record) if c.name == "is_deterministic"]
    check()
    assert "drawn options were refused, as HalfOptions(momentum=0.5" in capsys.readouterr().out


@attrs.frozen(kw_only=True)
class HalfOptions:
    momentum: float = option(0.9, help="Share of the last step that is kept.", choices=(0.9, 0.5))
    weight_decay: float = option(0.0, help="L2 decay.", low=0.0)


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2", "mixtral"])  # Conv1D, biases, experts
def test_laws_are_run_on_the_authors_model(architecture):
    made = []

    def model():
        made.append(tiny_model(architecture))
        return made[-1]

    laws = [(PREFERENCE, "agrees_on_a_model"), (ADAPTER, "disabled_gives_the_base")]
    for record, name in laws[: 1 if architecture == "gpt2" else 2]:  # the adapter's layers have names that GPT-2's lack
        made.clear()
        (check,) = [c for c in checks_for(record, model=model) if c.name == name]
        check()
        assert made, name


def test_without_vary_only_the_default_and_the_examples_are_tried(monkeypatch):
    monkeypatch.setenv("LUTHIER_EXAMPLES", "100")
    import mutants.optimizers

    seen = set()
    monkeypatch.setattr(mutants.optimizers.Momentum, "__init__", _recorder(seen))
    mine = MomentumOptions(momentum=0.25)
    (check,) = [c for c in checks_for(OPTIMIZER, examples=[mine], vary=False) if c.name == "is_deterministic"]
    check()
    assert seen == {MomentumOptions(), mine}


def test_the_environment_raises_the_number_of_examples(monkeypatch):
    import mutants.optimizers

    counts = {}
    for budget in (20, 60):
        seen = []
        monkeypatch.setattr(mutants.optimizers.Momentum, "__init__", _recorder(seen))
        monkeypatch.setenv("LUTHIER_EXAMPLES", str(budget))
        (check,) = [c for c in checks_for(OPTIMIZER) if c.name == "build_keeps_the_protocol"]
        check()
        counts[budget] = len(seen)
    assert counts == {20: 5, 60: 15}


def _recorder(seen):
    def begin(self, options):
        self.options = options
        (seen.add if isinstance(seen, set) else seen.append)(options)

    return begin


def test_a_part_for_a_device_that_is_not_here_is_skipped(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    record = attrs.evolve(OPTIMIZER, needs={"cuda"})
    (check,) = [c for c in checks_for(record) if c.name == "is_deterministic"]
    with pytest.raises(unittest.SkipTest, match="needs a CUDA device"):
        check()


def test_a_check_leaves_threads_and_random_numbers_as_they_were():
    import torch

    torch.manual_seed(7)
    expected = torch.random.get_rng_state()
    (check,) = [c for c in checks_for(OPTIMIZER) if c.name == "is_deterministic"]
    check()
    assert torch.equal(torch.random.get_rng_state(), expected)


def test_listing_checks_imports_no_torch():
    script = (
        "import sys; import luthier.testing; assert 'hypothesis' not in sys.modules; from mutants.records import SOUND;"
        "[list(luthier.testing.checks_for(r)) for r in SOUND]; luthier.testing.conformance(SOUND);"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], env=_environment(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_an_expected_failure_that_passes_fails_the_test(pytester):
    decorator = "@conformance([OPTIMIZER], {'summary_is_one_line': 'too long'})\n"
    pytester.makepyfile(HEAD + decorator + TEST)
    result = pytester.runpytest_inprocess("-k", "summary_is_one_line", "-p", "no:cacheprovider")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*XPASS(strict)*too long*"])


def test_an_expected_failure_that_fails_is_reported_with_its_reason(pytester):
    long = "OPTIMIZER = attrs.evolve(OPTIMIZER, summary='a long line, ' * 12 + 'and an end')\n"
    decorator = "@conformance([OPTIMIZER], {'optimizer-mutant-momentum-summary_is_one_line': 'to be cut'})\n"
    pytester.makepyfile("import attrs\n" + HEAD + long + decorator + TEST)
    result = pytester.runpytest_inprocess("-k", "summary_is_one_line", "-rx", "-p", "no:cacheprovider")
    result.assert_outcomes(xfailed=1)
    result.stdout.fnmatch_lines(["*to be cut*"])


def test_a_failing_case_shows_its_options_and_what_was_found(pytester):
    pytester.makepyfile(HEAD + f"@conformance([{_mutant()}])\n" + TEST)
    result = pytester.runpytest_inprocess("-k", "learning_rate_zero", "-p", "no:cacheprovider")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "*steps with a learning rate of 0: parameter 0 differs*",
            "*options=MomentumOptions(*",
            "*learning_rate_zero_changes_nothing: At a rate of 0 every parameter stays*",
        ]
    )


def _mutant():
    return "broken(OPTIMIZER, 'RatelessPart', '', '').record"


def test_the_plugin_sets_one_thread_only_for_a_torch_that_is_imported(pytester):
    pytester.makepyfile(
        "import sys\n"
        "def test_it_imports_none():\n    assert 'torch' not in sys.modules\n"
        "def test_a_torch_that_comes_later_has_one():\n    import torch\n    assert torch.get_num_threads() == 1\n"
        "    torch.set_num_threads(2)\n"
        "def test_the_next_test_has_one_again():\n    import torch\n    assert torch.get_num_threads() == 1\n"
    )
    arguments = ("-p", "luthier.testing.pytest_plugin", "-p", "no:cacheprovider", "-p", "no:hypothesispytest")
    pytester.runpytest_subprocess(*arguments).assert_outcomes(passed=3)


def _environment():
    import os

    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def test_a_mutants_record_is_a_record():
    assert broken(OPTIMIZER, "RatelessPart", "", "").record.kind == "optimizer"
