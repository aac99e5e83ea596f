"""What Luthier asks of every quantizer, and of every exporter."""

from luthier.testing import conformance
from luthier.testing.contexts import context
from luthier.testing.worlds import tiny_model
from luthier_bitnet import Bitnet, Packed, RangeTuning, Schedule, Ternary, luthier_exporters, luthier_quantizers
from luthier_bitnet.quantizer import TernaryQuantizer

EXAMPLES = [
    Ternary(granularity="group", group_size=32, schedule=Schedule(start_step=2, end_step=8, schedule_type="cosine")),
    Ternary(granularity="row", estimator="clipped", second_stage_start=0.5),
    Bitnet(granularity="group", group_size=32),
    Ternary(sub_norms=["o_proj"], schedule=Schedule(start_step=2, end_step=8)),
    Bitnet(tuning=RangeTuning(factors=[0.8, 1.2], layers=2)),
    Bitnet(skip_modules=["mlp"], schedule=Schedule(end_epoch=0.5)),
]


@conformance([r for r in luthier_quantizers() if not r.name.startswith("qat")], examples=EXAMPLES)
def test_conforms(check):
    check()


def trained_model():
    """A tiny model as quantizer `bitnet` has it."""
    model = tiny_model("qwen3")
    return TernaryQuantizer(Bitnet()).apply(model, context(model))


@conformance(luthier_exporters(), examples=[Packed(weight_scale="multiply")], model=trained_model)
def test_exporters_conform(check):
    check()
