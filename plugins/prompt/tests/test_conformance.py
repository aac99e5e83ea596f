"""The three adapters keep the laws of Luthier's own kit."""

from luthier.testing import conformance
from luthier_prompt import PrefixTuning, PromptTuning, PTuningV2, luthier_adapters

EXAMPLES = [
    PromptTuning(num_virtual_tokens=3, init="random"),
    PrefixTuning(num_virtual_tokens=2, init_weights="zero"),
    PTuningV2(num_virtual_tokens=3, encoder_hidden_size=5),
]


@conformance(luthier_adapters(), examples=EXAMPLES)
def test_conforms(check):
    check()
