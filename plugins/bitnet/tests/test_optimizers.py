"""The optimizers for latent weights: torch's own at a factor of 1, the factor, the clipping, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from luthier import Group, LuthierError
from luthier.testing import conformance
from luthier_bitnet import QatAdam, QatSgd, luthier_optimizers
from luthier_bitnet.optimizers import LatentOptimizer

EXAMPLES = [
    QatAdam(latent_lr=2.0, weight_decay=0.1, betas=(0.8, 0.9)),
    QatSgd(momentum=0.5, nesterov=True, max_tensor_norm=100.0),
]


@conformance(luthier_optimizers(), examples=EXAMPLES)
def test_conforms(check):
    check()


def groups_of(*roles, lr_scale=1.0):
    random = torch.Generator().manual_seed(0)
    drawn = [torch.nn.Parameter(torch.randn(4, 3, generator=random, dtype=torch.float64)) for _ in roles]
    return [
        Group(parameters=[p], names=[f"{role}.weight"], role=role, lr_scale=lr_scale, weight_decay=None)
        for p, role in zip(drawn, roles, strict=True)
    ]


def stepped(optimizer, steps=5, rate=0.1, size=1.0):
    random = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
            for p in group["params"]:
                p.grad = size * torch.randn(p.shape, generator=random, dtype=p.dtype)
        optimizer.step()
    return [p.detach() for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize(
    ("options", "reference"),
    [
        (QatAdam(betas=(0.7, 0.9), eps=1e-4, weight_decay=0.3),
         lambda groups: torch.optim.Adam(groups, betas=(0.7, 0.9), eps=1e-4)),
        (QatSgd(momentum=0.6, nesterov=True, weight_decay=0.3),
         lambda groups: torch.optim.SGD(groups, lr=0.0, momentum=0.6, nesterov=True)),
    ],
    ids=["adam", "sgd"],
)  # fmt: skip
def test_at_a_factor_of_one_it_is_torchs_to_the_bit(options, reference):
    ours = stepped(LatentOptimizer(options).build(groups_of("hidden", "norm")))
    theirs = stepped(reference([group.settings(0.3) for group in groups_of("hidden", "norm")]))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("options", [QatAdam(latent_lr=3.0), QatSgd(latent_lr=3.0)], ids=["adam", "sgd"])
def test_the_factor_is_that_of_the_layers_matrices_alone(options):
    roles = ("hidden", "norm", "embedding", "head", "bias", "adapter")
    optimizer = LatentOptimizer(options).build(groups_of(*roles, lr_scale=0.5))
    assert [group["lr_scale"] for group in optimizer.param_groups] == [1.5, *[0.5] * 5]


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_each_gradient_is_clipped_alone_to_its_limit(limit, size):
    optimizer = LatentOptimizer(QatSgd(momentum=0.0, max_tensor_norm=limit)).build(groups_of("hidden", "norm"))
    before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    random = torch.Generator().manual_seed(1)
    drawn = [size * torch.randn(p.shape, generator=random, dtype=p.dtype) for p in before]
    after = stepped(optimizer, steps=1, rate=1.0, size=size)
    for old, new, gradient in zip(before, after, drawn, strict=True):
        moved, norm = old - new, gradient.norm()
        assert moved.norm() <= limit * (1 + 1e-9) + 1e-9
        torch.testing.assert_close(moved, gradient * min(1.0, limit / float(norm)), rtol=1e-6, atol=1e-9)


def test_the_norm_of_a_shard_and_nesterov_without_momentum_are_refused():
    (group,) = groups_of("hidden")
    group.parameters[0].full_tensor = lambda: group.parameters[0]
    with pytest.raises(LuthierError) as caught:
        LatentOptimizer(QatAdam(max_tensor_norm=1.0)).build([group])
    assert (caught.value.code, caught.value.where) == ("part-unsupported", "optimizer.max_tensor_norm")
    with pytest.raises(LuthierError, match="momentum"):
        QatSgd(momentum=0.0, nesterov=True)
