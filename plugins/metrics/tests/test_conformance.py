"""The conformance kit on each metric."""

from luthier.testing import conformance
from luthier_metrics import Bleu, Custom, ExactMatch, PassAtK, Rouge, luthier_metrics

EXAMPLES = [
    ExactMatch(ignore_case=True, ignore_punctuation=True),
    Bleu(tokenize="char", lowercase=True, smooth_method="floor"),
    Rouge(kind="rouge2"),
    PassAtK(k=2, num_answers=3, judge="contains"),
    Custom(function="luthier_metrics.matching:same_text"),
]


@conformance(luthier_metrics(), examples=EXAMPLES, vary=False)
def test_a_metric_conforms(check):
    check()
