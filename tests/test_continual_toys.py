"""SLAO beside sequential LoRA on linear maps: six tasks of rank 2 with a common part, eight seeds at once."""

import torch
from luthier_slao.algebra import merge_factor, merge_share, orthonormal_rows

SEEDS, TASKS, SIZE, RANK, STEPS = 8, 6, 16, 4, 150


def drawn(*shape, seed):
    return torch.randn(SEEDS, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made_tasks():
    """Maps [seeds, out, in], each a common one of rank 2 and one of rank 2 of its own, of equal size."""
    maps = [drawn(SIZE, 2, seed=2 * i) @ drawn(2, SIZE, seed=2 * i + 1) / SIZE**0.5 for i in range(TASKS + 1)]
    return [maps[0] + own for own in maps[1:]]


def fitted(a, b, target):
    """Train both factors on a task by Adam, over inputs of unit covariance."""
    a, b = (factor.clone().requires_grad_() for factor in (a, b))
    optimizer = torch.optim.Adam([a, b], lr=3e-2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (b @ a - target).square().sum().backward()
        optimizer.step()
    return a.detach(), b.detach()


def mean_loss(a, b, tasks):
    """[seeds]: the loss over all tasks at the end."""
    return torch.stack([(b @ a - target).square().sum((1, 2)) for target in tasks]).mean(0) / SIZE


def begun():
    return drawn(RANK, SIZE, seed=99) / SIZE**0.5, torch.zeros(SEEDS, SIZE, RANK, dtype=torch.float64)


def in_sequence(tasks):
    a, b = begun()
    for target in tasks:
        a, b = fitted(a, b, target)
    return mean_loss(a, b, tasks)


def by_slao(tasks):
    a, b = begun()
    merged = b
    for number, target in enumerate(tasks, 1):
        if number > 1:
            a = torch.stack([orthonormal_rows(one) for one in a])
        a, b = fitted(a, b, target)
        merged = merge_factor(merged, b, merge_share("inverse_sqrt", number))
    return mean_loss(a, merged, tasks)


def test_slao_ends_below_sequential_lora_on_every_one_of_eight_seeds():
    tasks = made_tasks()
    sequential, slao = in_sequence(tasks), by_slao(tasks)
    assert sequential.shape == (SEEDS,) and bool((slao < sequential).all())
    assert float(slao.mean()) < 0.9 * float(sequential.mean())
