"""One thread, and an adapter attached to a tiny model."""

import pytest
import torch
from luthier import LuthierError
from luthier.testing.contexts import context
from luthier.testing.worlds import tiny_model
from luthier_selective.adapter import SelectiveAdapter

torch.set_num_threads(1)
TOKENS = torch.arange(7, 31)[None]  # [1, 24]


@pytest.fixture
def attached():
    """(model, adapter) for options; `shake` moves every trained parameter as training would."""

    def build(options, architecture="llama", shake=0.1, dtype=torch.float32):
        model = tiny_model(architecture).to(dtype)
        adapter = SelectiveAdapter(options)
        adapter.attach(model, context(model))
        random = torch.Generator().manual_seed(1)
        for group in adapter.groups():
            for parameter in group.parameters:
                parameter.data.add_((torch.randn(parameter.shape, generator=random) * shake).to(parameter.dtype))
        return model, adapter

    return build


@pytest.fixture
def logits():
    """Logits [1, T, V] in evaluation mode, without gradient."""

    def compute(model):
        with torch.no_grad():
            return model.eval()(TOKENS).logits

    return compute


@pytest.fixture
def refused():
    """The `LuthierError` that a call raises."""

    def call(function, *arguments):
        with pytest.raises(LuthierError) as caught:
            function(*arguments)
        return caught.value

    return call
