"""The conformance kit. It draws no options: ratio 0 is legal, and trains nothing, which no check can look at."""

from luthier.testing import conformance
from luthier_osft import Osft, luthier_adapters

EXAMPLES = [
    Osft(unfreeze_rank_ratio=0.75),
    Osft(form="factored"),
    Osft(unfreeze_rank_ratio=1.0, target_patterns=["self_attn"]),
    Osft(rank_rule="schedule"),
    Osft(rank_rule="importance", min_preserved_ratio=0.5, form="factored", train_non_targets=True),
]


@conformance(luthier_adapters(), examples=EXAMPLES, vary=False)
def test_conforms(check):
    check()
