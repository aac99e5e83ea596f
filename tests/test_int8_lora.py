"""LoRA on an int8 base, end to end: it trains, resumes bit for bit, reopens, merges, and `full` is refused."""

import json

import luthier
import pytest
import torch
from luthier import LuthierError
from luthier.model.attention import generating_attention
from luthier.testing.contexts import context
from luthier.testing.worlds import save_tiny_model
from luthier_int8 import Int8
from luthier_int8.layer import Int8Linear
from luthier_int8.quantizer import Int8Quantizer
from transformers import AutoModelForCausalLM

STEPS = 8
IDS = torch.arange(10, 30)[None]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with tiny models `llama` and `gpt2`, and rows to train on."""
    folder = tmp_path_factory.mktemp("world")
    for architecture in ("llama", "gpt2"):
        save_tiny_model(folder / architecture, architecture)
    rows = [{"prompt": f"{i} plus {j} is ", "completion": str(i + j)} for i in range(6) for j in range(6)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def train(world, output, *, architecture="llama", adapter="lora", exact_callbacks=("jsonl",), **settings):
    """Some steps with dropout on, every linear layer taken."""
    options = {"name": adapter, "target_modules": "all-linear", "lora_dropout": 0.1}
    return luthier.train(
        model=str(world / architecture),
        data=str(world / "train.jsonl"),
        adapter=options,
        quantizer=settings.pop("quantizer", "int8"),
        exact_callbacks=list(exact_callbacks),
        output_dir=output,
        max_steps=STEPS,
        learning_rate=1e-2,
        save_steps=3,
        **settings,
    )


def logits(model):
    with generating_attention(model):
        return model(IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits.detach()


def codes(model):
    """Each int8 layer's buffers by the path that the layer has in the plain model."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Int8Linear)}
    return {n.replace(".base_layer", ""): (m.weight.clone(), m.scales.clone()) for n, m in layers.items()}


def test_it_trains_on_codes_that_stay_as_they_are(world, tmp_path):
    run = train(world, tmp_path / "run")
    assert run.loss_history[-1] < 0.9 * run.loss_history[0]
    base = AutoModelForCausalLM.from_pretrained(world / "llama")
    held, fresh = codes(run.model), codes(Int8Quantizer(Int8()).apply(base, context(base)))
    assert held.keys() == fresh.keys() and len(held) == 14
    assert all(torch.equal(a, b) for name in held for a, b in zip(held[name], fresh[name], strict=True))
    trained = [name for name, p in run.model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_a_run_that_broke_off_resumes_bit_for_bit(world, tmp_path):
    def break_off(step):
        if step == 5:
            raise RuntimeError("power cut")

    straight = train(world, tmp_path / "straight")
    with pytest.raises(RuntimeError, match="power cut"):
        train(world, tmp_path / "broken", exact_callbacks=["jsonl", luthier.on(step_ended=break_off)])
    began = []

    def note(step):
        began.append(step)

    resumed = train(world, tmp_path / "broken", exact_callbacks=["jsonl", luthier.on(resumed=note)])
    assert began == [3]
    assert resumed.loss_history == straight.loss_history and resumed.steps == STEPS
    ours, theirs = (dict(run.model.named_parameters()) for run in (resumed, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_saved_adapter_reopens_on_an_int8_base(world, tmp_path):
    from luthier.step.opened import open_artifact

    run = train(world, tmp_path / "run", quantizer=Int8(group_size=16, skip_modules=["down_proj"]))
    opened = open_artifact(tmp_path / "run")
    assert codes(opened.model).keys() == codes(run.model).keys() and len(codes(run.model)) == 12
    assert torch.equal(logits(opened.model), logits(run.model))


@pytest.mark.parametrize(("architecture", "adapter"), [("llama", "lora"), ("llama", "dora"), ("gpt2", "lora")])
def test_the_merged_model_is_plain_and_gives_the_same_logits(world, tmp_path, architecture, adapter):
    run = train(world, tmp_path / "run", architecture=architecture, adapter=adapter, merge=True)
    plain = AutoModelForCausalLM.from_pretrained(run.merged)
    base = AutoModelForCausalLM.from_pretrained(world / architecture)
    expected = logits(run.model)
    assert [(n, type(m)) for n, m in plain.named_modules()] == [(n, type(m)) for n, m in base.named_modules()]
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-5)
    assert (logits(base) - expected).abs().max() > 0.1
    assert codes(run.model), "the live model stays quantized"


def test_full_fine_tuning_on_int8_is_refused_before_anything_is_written(world, tmp_path):
    with pytest.raises(LuthierError) as caught:
        luthier.train(
            model=str(world / "llama"),
            data=str(world / "train.jsonl"),
            adapter="full",
            quantizer="int8",
            output_dir=tmp_path / "run",
        )
    assert caught.value.code == "part-incompatible"
    for word in ("adapter 'full'", "dense-weights", "quantizer 'int8'"):
        assert word in str(caught.value)


def test_an_option_that_int8_has_not_is_refused_with_the_nearest(world, tmp_path):
    with pytest.raises(LuthierError, match="group_size") as caught:
        train(world, tmp_path / "run", quantizer={"name": "int8", "groupsize": 8})
    assert caught.value.code == "recipe-unknown-option"
