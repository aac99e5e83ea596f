"""Both adapters keep the laws of Luthier's own kit, on a model that has biases; one of the two by default."""

import pytest
from luthier.testing import conformance
from luthier.testing.worlds import ARCHITECTURES
from luthier_selective import BitFit, Modules, luthier_adapters

EXAMPLES = [BitFit(target_modules=["q_proj"]), Modules(token_ids=[3, 9, 60])]


def biased_model():
    """Qwen2's biases, and a head that is the embedding, so that every row of it gets a gradient."""
    import transformers

    name, arguments = ARCHITECTURES["qwen2"]
    return transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, name)(**arguments, tie_word_embeddings=True)
    )


@conformance(luthier_adapters()[1:], vary=False, model=biased_model)
def test_conforms(check):
    check()


@pytest.mark.slow
@conformance(luthier_adapters(), examples=EXAMPLES, model=biased_model)
def test_conforms_with_examples_and_drawn_options(check):
    check()
