"""One thread, a context without a run, and an adapter attached to a tiny model."""

from pathlib import Path

import attrs
import pytest
import torch
from luthier import Context, LuthierError
from luthier.testing.worlds import save_tiny_model, tiny_model
from luthier_lora import Lora
from luthier_lora.adapter import LoraAdapter
from torch import nn

torch.set_num_threads(1)

TOKENS = torch.arange(7, 31)[None]  # [1, 24]


def _unquantized(layer: nn.Module) -> torch.Tensor:
    raise AssertionError("a dense layer's weight was asked of the quantizer")


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    return TOKENS


@pytest.fixture(scope="session")
def context():
    """Builds a `Context` whose other members nothing here may use."""

    def build(**changes) -> Context:
        given = {
            "device": torch.device("cpu"),
            "dtype": torch.float32,
            "seed": 0,
            "total_steps": 1,
            "dequantize": _unquantized,
        }
        required = {field.name: None for field in attrs.fields(Context) if field.default is attrs.NOTHING}
        return Context(**{**required, **given, **changes})

    return build


@pytest.fixture
def attached(context):
    """(model, adapter) for options; `shake` moves every adapter parameter as training would."""

    def build(options=None, architecture="llama", shake=0.1, dtype=torch.float32, **changes):
        model = tiny_model(architecture, **changes).to(dtype)
        adapter = LoraAdapter(options or Lora())
        model = adapter.attach(model, context())
        if shake:
            random = torch.Generator().manual_seed(1)
            for group in adapter.groups():
                for parameter in group.parameters:
                    noise = torch.randn(parameter.shape, generator=random) * shake
                    size = parameter.detach().mean() if parameter.dim() == 1 else 1.0  # a magnitude's, or 1
                    parameter.data.add_(noise.to(parameter.dtype) * size)
        return model, adapter

    return build


@pytest.fixture(scope="session")
def logits():
    """Logits [1, T, V] in evaluation mode, without gradient."""

    def compute(model, tokens=TOKENS) -> torch.Tensor:
        was = model.training
        with torch.no_grad():
            result = model.eval()(tokens, attention_mask=torch.ones_like(tokens)).logits
        model.train(was)
        return result

    return compute


@pytest.fixture
def refused():
    """The `LuthierError` that a call raises."""

    def call(function, *arguments) -> LuthierError:
        with pytest.raises(LuthierError) as caught:
            function(*arguments)
        return caught.value

    return call


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """The folder of a tiny model, written once for each architecture."""
    made: dict[str, Path] = {}

    def folder(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = save_tiny_model(tmp_path_factory.mktemp("base") / architecture, architecture)
        return made[architecture]

    return folder
