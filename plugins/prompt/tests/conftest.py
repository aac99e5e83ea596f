"""One thread, an adapter on a tiny model, and log-probabilities in one pass or document by document."""

import pytest
import torch
from luthier import LuthierError
from luthier.model.attention import install_attention
from luthier.model.policy import ModelPolicy
from luthier.testing.contexts import context
from luthier.testing.exactness import unrounded
from luthier.testing.worlds import tiny_model
from luthier_prompt import PromptTuning
from luthier_prompt.adapters import PrefixAdapter, PromptAdapter

torch.set_num_threads(1)


@pytest.fixture
def attached():
    """Builds (model, adapter) for options."""

    def build(options, architecture="llama", dtype=torch.float32):
        torch.manual_seed(0)
        model = tiny_model(architecture).to(dtype).eval()
        install_attention(model)
        adapter = (PromptAdapter if isinstance(options, PromptTuning) else PrefixAdapter)(options)
        adapter.attach(model, context(model))
        return model, adapter

    return build


@pytest.fixture
def scores():
    """Log-probabilities [T] of a packed batch."""

    def compute(model, adapter, batch):
        with unrounded():
            return ModelPolicy(model, adapter).token_logprobs(batch)

    return compute


@pytest.fixture
def separately():
    """Log-probabilities [T] of the documents of a batch, each on its own through a PEFT model."""

    def compute(model, batch):
        found = []
        for ids in batch.input_ids.split(batch.lengths.tolist()):
            logits = model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]).logits[0, -len(ids) :]
            found += [logits.new_zeros(1), logits[:-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]]
        return torch.cat(found)

    return compute


@pytest.fixture
def refused():
    """The `LuthierError` that a call raises."""

    def call(function, *arguments):
        with pytest.raises(LuthierError) as caught:
            function(*arguments)
        return caught.value

    return call
