"""What Luthier asks of every exporter."""

from luthier.testing import conformance
from luthier_gguf import Gguf, luthier_exporters

EXAMPLES = [Gguf(type="q8_0", fallback="f16"), Gguf(type="q4_0", fallback="q8_0", modelfile=False)]


@conformance(luthier_exporters(), examples=EXAMPLES)
def test_conforms(check):
    check()
