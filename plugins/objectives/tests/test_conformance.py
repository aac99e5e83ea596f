"""The conformance kit on each loss."""

from luthier.testing import conformance
from luthier_objectives import AnchoredSft, Negated, Npo, ShapedSft, luthier_losses

EXAMPLES = [
    ShapedSft(label_smoothing=0.1, z_loss=1e-3),
    ShapedSft(dft=True),
    AnchoredSft(kl_weight=0.5, label_smoothing=0.2),
    Npo(beta=1.0, retain_weight=0.5),
    Negated(forget_weight=0.1),
]


@conformance(luthier_losses(), examples=EXAMPLES, vary=False)
def test_an_objective_conforms(check):
    check()
