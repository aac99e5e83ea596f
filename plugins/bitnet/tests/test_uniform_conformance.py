"""What Luthier asks of the quantizers `qat` and `qat_activations`; their own tests stand in test_uniform.py."""

import pytest
from luthier.testing import conformance
from luthier_bitnet import Qat, QatActivations, Schedule, Tuning, luthier_quantizers

EXAMPLES = [
    Qat(bits=1, granularity="tensor", schedule=Schedule(start_step=2, end_step=6)),
    Qat(bits=8, symmetric=False, granularity="group", group_size=20, observer="percentile", noise_factor=0.1),
    Qat(bits=4, bits_stages=[8.0, 4.0], estimator="soft", observer="kl"),
    Qat(bits=2, learn_scale=True, estimator="straight_through"),
    Qat(bits=4, tuning=Tuning(factors=[0.8, 1.2], bits=[2, 1.58], layers=2)),
    QatActivations(activation_bits=4, activation_symmetric=True),
    QatActivations(
        activation_granularity="tensor",
        online_calibration=True,
        calibration_frequency=2,
        calibration_samples=8,
        activation_observer="mse",
    ),
]


@pytest.mark.slow
@conformance([r for r in luthier_quantizers() if r.name.startswith("qat")], examples=EXAMPLES)
def test_conforms(check):
    check()
