"""All adapters keep the laws of Luthier's own kit."""

from luthier.testing import conformance
from luthier_lora import AdaLora, Dora, Lora, luthier_adapters

EXAMPLES = [
    AdaLora(init_r=4, target_r=2, lora_dropout=0.0, tinit=1, tfinal=6, deltaT=2),
    Lora(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", use_rslora=True),
    Lora(init_lora_weights="pissa", modules_to_save=["model.norm"], rank_energy=0.5, learn_scale=True),
    Dora(r=4, lora_dropout=0.1, target_modules=["q_proj", "down_proj"], exclude_modules=["1.mlp.down_proj"]),
]


@conformance(luthier_adapters(), examples=EXAMPLES)
def test_conforms(check):
    check()
