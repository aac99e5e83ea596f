"""What Luthier asks of every quantizer."""

from luthier.testing import conformance
from luthier_bitnet import Bitnet, Schedule, Ternary, luthier_quantizers

EXAMPLES = [
    Ternary(granularity="group", group_size=32, schedule=Schedule(start_step=2, end_step=8, schedule_type="cosine")),
    Ternary(granularity="row", estimator="clipped", second_stage_start=0.5),
    Bitnet(granularity="group", group_size=32),
    Bitnet(skip_modules=["mlp"], schedule=Schedule(end_epoch=0.5)),
]


@conformance(luthier_quantizers(), examples=EXAMPLES)
def test_conforms(check):
    check()
