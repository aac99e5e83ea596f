"""OSFT besides the other parts: its guarantee under every optimizer that is installed."""

import pytest
import torch
from luthier.plugins.registry import installed_plugins
from luthier_osft import Osft
from safetensors.torch import load_file

EVERY = sorted(offer.record.name for offer in installed_plugins().offers("optimizer"))


def leak(weight, change, rank):
    u, _, v = torch.linalg.svd(weight.double())
    parts = (u[:, :rank].T @ change.double()).norm(), (change.double() @ v[:rank].T).norm()
    return float(max(parts) / change.double().norm())


SAMPLE = [("adamw_8bit", "core", 6, "bf16"), ("lion", "factored", 6, "float32")]
LONG = [
    pytest.param(name, form, 200, "float32", marks=pytest.mark.slow) for name in EVERY for form in ("core", "factored")
]


@pytest.mark.parametrize(("optimizer", "form", "steps", "precision"), [*SAMPLE, *LONG])
def test_every_optimizer_leaves_the_main_directions_as_they_are(train, model_folder, optimizer, form, steps, precision):
    run = train(adapter=Osft(form=form), optimizer=optimizer, max_steps=steps, merge=True, precision=precision)
    base, tuned = (load_file(folder / "model.safetensors") for folder in (model_folder, run.merged))
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        change = tuned[name] - base[name]
        rounding = 6e-8 * base[name].norm() / change.norm()
        assert change.norm() > 0 and leak(base[name], change, 24) < 1e-6 + rounding
