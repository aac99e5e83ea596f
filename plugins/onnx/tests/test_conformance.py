"""What Luthier asks of every exporter; each check traces a model, which takes seconds."""

import pytest
from luthier.testing import conformance
from luthier_onnx import Onnx, luthier_exporters


@pytest.mark.slow
@conformance(luthier_exporters(), examples=[Onnx(max_logit_error=1e-3)])
def test_conforms(check):
    check()
