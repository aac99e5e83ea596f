"""What Luthier asks of every optimizer."""

import pytest
from luthier.testing import conformance
from luthier_optimizers import (
    Adafactor,
    AdamW8bit,
    AdEMAMix,
    Apollo,
    Auto,
    Evolution,
    Muon,
    PagedAdamW,
    ScheduleFree,
    luthier_optimizers,
)

RECORDS = luthier_optimizers()
EXAMPLES = [
    AdamW8bit(betas=(0.8, 0.95), weight_decay=0.3),
    Muon(adjust_lr="original", nesterov=False, weight_decay=0.3),
    Adafactor(weight_decay=0.3),
    ScheduleFree(r=1.0, weight_decay=0.3),
    AdEMAMix(warmup_steps=3, weight_decay=0.3),
    Apollo(rank=2, refresh_steps=2, weight_decay=0.3),
    Apollo(rank=1, scale_by="tensor", max_growth=0.0),
    PagedAdamW(chunk=5, weight_decay=0.3),
    Evolution(pairs=1, rank=2, shaping="none", weight_decay=0.3),
    Auto(memory_share=0.0, betas=(0.8, 0.95), weight_decay=0.3),
]


QUICK = (AdamW8bit, Muon, ScheduleFree)  # the others have the same bones, and are tested in the slow suite


@conformance([r for r in RECORDS if r.options in QUICK], examples=[e for e in EXAMPLES if type(e) in QUICK])
def test_conforms(check):
    check()


@pytest.mark.slow
@conformance([r for r in RECORDS if r.options not in QUICK], examples=[e for e in EXAMPLES if type(e) not in QUICK])
def test_the_others_conform(check):
    check()
