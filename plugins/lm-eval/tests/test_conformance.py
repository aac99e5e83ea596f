"""luthier-lm-eval keeps what every benchmark must keep."""

from luthier.testing import conformance
from luthier_lm_eval import luthier_benchmarks


@conformance(luthier_benchmarks(), vary=False)  # a folder of tasks is the user's
def test_conforms(check):
    check()
