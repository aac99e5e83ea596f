"""All adapters keep the laws of Luthier's own kit."""

import pytest
from luthier.testing import conformance
from luthier_lora import AdaLora, Dora, Lora, luthier_adapters

EXAMPLES = [
    Lora(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", use_rslora=True),
    Lora(init_lora_weights="pissa", modules_to_save=["model.norm"], rank_energy=0.5, learn_scale=True),
    Lora(r=4, lora_dropout=0.0, trainable_token_indices=list(range(3, 90))),
    Dora(r=4, lora_dropout=0.1, target_modules=["q_proj", "down_proj"], exclude_modules=["1.mlp.down_proj"]),
]


@conformance(luthier_adapters()[:2], examples=EXAMPLES)
def test_conforms(check):
    check()


@conformance(luthier_adapters()[2:], vary=False)
def test_adalora_conforms(check):
    check()


@pytest.mark.slow
@conformance(luthier_adapters()[2:], examples=[AdaLora(init_r=4, target_r=2, tinit=1, tfinal=6, deltaT=2)])
def test_adalora_conforms_with_drawn_options(check):
    check()
