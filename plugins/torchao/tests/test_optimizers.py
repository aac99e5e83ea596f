"""The optimizers beside torchao's own, run eagerly, and the bytes that they keep."""

import pytest
import torch
from luthier import Group
from luthier_torchao import AdamW4bit, AdamW8bit, AdamWFp8
from luthier_torchao.optimizers import TorchaoOptimizer
from torchao import optim

FORMS = [(AdamW8bit, optim.AdamW8bit, 2.03), (AdamW4bit, optim.AdamW4bit, 1.06), (AdamWFp8, optim.AdamWFp8, 2.03)]


@pytest.mark.parametrize(("options", "theirs", "bytes_each"), FORMS, ids=["8bit", "4bit", "fp8"])
@pytest.mark.parametrize("shape", [(128, 64), (7, 5)], ids=str)
def test_steps_are_torchaos_bit_for_bit(options, theirs, bytes_each, shape):
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, other = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    part = TorchaoOptimizer(options(betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1))
    optimizer = part.build([Group(parameters=[ours], names=["w.weight"], role="hidden")])
    optimizer.param_groups[0]["lr"] = 0.01
    peer = theirs([other], lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    for _ in range(4):
        gradient = torch.randn(shape)
        ours.grad, other.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        with torch.compiler.set_stance("force_eager"):
            peer.step()
    torch.testing.assert_close(ours, other, rtol=1e-6, atol=1e-7)
    kept = sum(v.numel() * v.element_size() for v in optimizer.state[ours].values() if isinstance(v, torch.Tensor))
    assert kept / start.numel() == pytest.approx(bytes_each if start.numel() >= 4096 else 8, abs=0.01)


def test_sharded_weights_are_refused():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    weight.full_tensor = lambda: weight
    with pytest.raises(Exception, match="sharded") as caught:
        TorchaoOptimizer(AdamW8bit()).build([Group(parameters=[weight], names=["w"])])
    assert caught.value.code == "part-unsupported"
