"""The comparison of packed and separate documents is patient where a layer says that it rounds activations."""

import pytest
import torch
from luthier.model.attention import install_attention
from luthier.model.self_check import find_disagreement
from luthier.testing.worlds import tiny_model


class Rounding(torch.nn.Linear):
    """It rounds by chance, as two ways of computing fall to either side of an edge."""

    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x) * (1 + 1e-3 * (self.calls % 3))


@pytest.mark.parametrize("says", [True, False])
def test_what_rounds_may_differ_by_a_code(says):
    model = tiny_model()
    old = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = made = Rounding(old.in_features, old.out_features, bias=False)
    made.weight = old.weight
    made.rounds_activations = says
    install_attention(model)
    assert (find_disagreement(model) is None) == says
