"""The conformance kit on each loss."""

from luthier.testing import conformance
from luthier_objectives import Negated, Npo, luthier_losses

EXAMPLES = [Npo(beta=1.0, retain_weight=0.5), Negated(forget_weight=0.1)]


@conformance(luthier_losses(), examples=EXAMPLES, vary=False)
def test_an_objective_conforms(check):
    check()
