"""The three adapters keep the laws of Luthier's own kit."""

import pytest
from luthier.testing import conformance
from luthier_prompt import PrefixTuning, PromptTuning, PTuningV2, luthier_adapters

EXAMPLES = [
    PromptTuning(num_virtual_tokens=3, init="random"),
    PrefixTuning(num_virtual_tokens=2, init_weights="zero"),
    PTuningV2(num_virtual_tokens=3, encoder_hidden_size=5),
]


@conformance(luthier_adapters()[::2], vary=False)
def test_conforms(check):
    check()


@pytest.mark.slow
@conformance(luthier_adapters(), examples=EXAMPLES)
def test_conforms_with_examples_and_drawn_options(check):
    check()
