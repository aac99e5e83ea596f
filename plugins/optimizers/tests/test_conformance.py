"""What Luthier asks of every optimizer."""

from luthier.testing import conformance
from luthier_optimizers import AdamW8bit, luthier_optimizers

EXAMPLES = [
    AdamW8bit(betas=(0.8, 0.95), weight_decay=0.3),
]


@conformance(luthier_optimizers(), examples=EXAMPLES)
def test_conforms(check):
    check()
