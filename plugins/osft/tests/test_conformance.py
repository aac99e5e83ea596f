"""The conformance kit. It draws no options: ratio 0 is legal, and trains nothing, which no check can look at."""

import pytest
from luthier.testing import conformance
from luthier_osft import Osft, luthier_adapters

EXAMPLES = [
    Osft(rank_rule="importance", form="factored", train_non_targets=True, target_patterns=["q_proj", "down"]),
]


OTHERS = [
    *EXAMPLES,
    Osft(unfreeze_rank_ratio=0.75),
    Osft(form="factored"),
    Osft(unfreeze_rank_ratio=1.0, target_patterns=["self_attn"]),
    Osft(rank_rule="schedule"),
]


@conformance(luthier_adapters(), examples=EXAMPLES, vary=False)
def test_conforms(check):
    check()


@pytest.mark.slow
@conformance(luthier_adapters(), examples=OTHERS, vary=False)
def test_conforms_with_other_options(check):
    check()
