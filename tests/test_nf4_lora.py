"""LoRA and DoRA on an NF4 base, end to end: they train, resume bit for bit, reopen, merge; `full` is refused."""

import json

import luthier
import pytest
import torch
from luthier import LuthierError
from luthier.model.attention import generating_attention
from luthier.testing.contexts import context
from luthier.testing.worlds import save_tiny_model
from luthier_nf4 import Nf4
from luthier_nf4.layer import FourBitLinear
from luthier_nf4.quantizer import FourBitQuantizer
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
        quantizer=settings.pop("quantizer", "nf4"),
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
    """Each nf4 layer's buffers by the path that the layer has in the plain model."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, FourBitLinear)}
    return {n.replace(".base_layer", ""): (m.weight.clone(), m.absmax.clone()) for n, m in layers.items()}


def test_it_trains_on_codes_that_stay_as_they_are(world, tmp_path):
    run = train(world, tmp_path / "run")
    assert run.loss_history[-1] < 0.9 * run.loss_history[0]
    base = AutoModelForCausalLM.from_pretrained(world / "llama")
    held, fresh = codes(run.model), codes(FourBitQuantizer(Nf4()).apply(base, context(base)))
    assert held.keys() == fresh.keys() and len(held) == 14
    assert all(torch.equal(a, b) for name in held for a, b in zip(held[name], fresh[name], strict=True))
    trained = [name for name, p in run.model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_a_run_that_broke_off_resumes_bit_for_bit(world, tmp_path, adapter):
    def break_off(step):
        if step == 5:
            raise RuntimeError("power cut")

    straight = train(world, tmp_path / "straight", adapter=adapter)
    with pytest.raises(RuntimeError, match="power cut"):
        train(world, tmp_path / "broken", adapter=adapter, exact_callbacks=["jsonl", luthier.on(step_ended=break_off)])
    began = []

    def note(step):
        began.append(step)

    resumed = train(world, tmp_path / "broken", adapter=adapter, exact_callbacks=["jsonl", luthier.on(resumed=note)])
    assert began == [3]
    assert resumed.loss_history == straight.loss_history and resumed.steps == STEPS
    ours, theirs = (dict(run.model.named_parameters()) for run in (resumed, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_saved_adapter_reopens_on_an_nf4_base(world, tmp_path):
    from luthier.step.opened import open_artifact

    run = train(world, tmp_path / "run", quantizer=Nf4(block_size=32, skip_modules=["down_proj"]))
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


def test_full_fine_tuning_on_nf4_is_refused_before_anything_is_written(world, tmp_path):
    with pytest.raises(LuthierError) as caught:
        luthier.train(
            model=str(world / "llama"),
            data=str(world / "train.jsonl"),
            adapter="full",
            quantizer="nf4",
            output_dir=tmp_path / "run",
        )
    assert caught.value.code == "part-incompatible"
    for word in ("adapter 'full'", "dense-weights", "quantizer 'nf4'"):
        assert word in str(caught.value)


def test_an_option_that_nf4_has_not_is_refused_with_the_nearest(world, tmp_path):
    with pytest.raises(LuthierError, match="block_size") as caught:
        train(world, tmp_path / "run", quantizer={"name": "nf4", "blocksize": 8})
    assert caught.value.code == "recipe-unknown-option"


@pytest.mark.parametrize(("short", "plain"), [("qlora", "lora"), ("qdora", "dora")])
def test_qlora_and_qdora_are_lora_and_dora_on_nf4(world, tmp_path, short, plain):
    quantizer = {"quantizer": "nf4"}
    ours = train(world, tmp_path / "short", adapter=short, **quantizer)
    theirs = train(world, tmp_path / "plain", adapter=plain, **quantizer)
    assert ours.loss_history == theirs.loss_history
    answer = ours.generate("1 plus 2 is ", max_new_tokens=3)
    assert answer == theirs.generate("1 plus 2 is ", max_new_tokens=3)


def test_the_command_line_trains_resumes_merges_and_generates(world, tmp_path, capsys):
    from luthier.cli.app import app

    words = [
        "--model",
        str(world / "llama"),
        "--data",
        str(world / "train.jsonl"),
        "--adapter",
        "qlora",
        "--merge",
        "true",
    ]
    words += ["--output-dir", str(tmp_path / "run"), "--json"]

    def call(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            app(list(arguments))
        assert caught.value.code in (0, None)
        return json.loads(capsys.readouterr().out)

    run = call("train", *words, "--max-steps", "4")
    assert run["steps"] == 4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run/merged")
    assert all(p.is_floating_point() for p in merged.parameters())
    generated = call("generate", str(tmp_path / "run"), "1 plus 2 is ", "--json")
    assert generated


@pytest.mark.parametrize("quantizer", ["none", "nf4"])
def test_a_plan_knows_how_large_the_merged_model_is(world, tmp_path, quantizer):
    settings = {"model": str(world / "llama"), "data": str(world / "train.jsonl"), "adapter": "lora",
                "quantizer": quantizer, "max_steps": 1, "merge": True, "output_dir": tmp_path / "run"}  # fmt: skip
    plan = luthier.plan(**settings)
    luthier.train(**settings, exact_callbacks=[])
    written = sum(file.stat().st_size for file in (tmp_path / "run" / "merged").glob("*.safetensors"))
    assert plan.disk["merged"] == pytest.approx(written, rel=0.05)
