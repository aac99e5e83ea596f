"""The conformance kit on the loss, with every divergence among the examples."""

from luthier.testing import conformance
from luthier_distill import Distill, luthier_losses

EXAMPLES = [
    Distill(divergence="jsd", beta=0.1, ce_weight=0.5),
    Distill(divergence="reverse_kl", temperature=2.0),
    Distill(top_k=2),
    Distill(divergence="jsd", top_k=3, add_tail=False),
    Distill(hidden_weight=0.5),
    Distill(hidden_weight=2.0, hidden_distance="mse", hidden_layers=[0, 1], teacher_layers=[1, -1]),
    Distill(hidden_weight=2.0, hidden_distance="relation"),
    Distill(attention_weight=0.5),
    Distill(
        attention_weight=2.0,
        attention_relations=["query_key", "value"],
        relation_heads=1,
        attention_layers=[0, 1],
        teacher_attention_layers=[1, -1],
        hidden_weight=0.5,
    ),
]


@conformance(luthier_losses(), examples=EXAMPLES, vary=False)
def test_distill_conforms(check):
    check()
