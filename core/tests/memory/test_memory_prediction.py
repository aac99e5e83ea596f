"""The predicted peak of a step is the measured one: for every way to train, from the config alone."""

import numpy as np
import pytest
from luthier.hardware.memory_meter import Allocations
from luthier.memory.dry_run import Rehearsal
from luthier.memory.fit import fullest_batches
from luthier.model.fake_tensors import tensor_storages
from luthier.recipe import resolve_parts
from luthier.recipe.gather_arguments import gather_arguments
from luthier.step.update import update_weights
from luthier.testing.worlds import ARCHITECTURES, save_tiny_model
from luthier.training.assemble import assemble_run

WIDE = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1024,
}
LORA = {"name": "lora", "target_modules": "all-linear"}
CUT = {"max_tokens_per_device": 400}  # of steps with about 600 tokens


def rows(lengths=(90, 60) * 8, vocabulary=300):
    random = np.random.default_rng(0)
    drawn = [random.integers(8, vocabulary, length).tolist() for length in lengths]
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a model, saved when it is first asked for."""
    home, made = tmp_path_factory.mktemp("models"), {}

    def find(architecture):
        if architecture not in made:
            shape = {"wide": ("llama", WIDE)}.get(architecture, (architecture, {}))
            made[architecture] = save_tiny_model(home / architecture, shape[0], **shape[1])
        return made[architecture]

    return find


@pytest.fixture
def assembled(folder):
    made = []

    def make(architecture="wide", data=None, **settings):
        model = {"name_or_path": str(folder(architecture)), **settings.pop("model", {})}
        settings = {"model": model, "device": "cpu", "exact_callbacks": [], "global_batch_size": 8, **settings}
        recipe, objects = gather_arguments(None, None, None, data or rows(), None, settings)
        made.append(assemble_run(recipe, objects))
        return made[-1]

    yield make
    for each in made:
        each.setup.undo.close()


def held(setup):
    """Bytes of weights, and of what is kept beside them."""
    tensors = [*setup.model.parameters(), *setup.model.buffers(), *setup.precision.kept]
    return sum({s._cdata: s.nbytes() for s in tensor_storages(tensors)}.values())


def steps(setup):
    """The first step twice: the second time the optimizer has its state."""
    first = next(setup.feed.portions(0))
    for _ in range(2):
        update_weights(setup, first.step, first)


def measured(setup):
    before = held(setup)
    with Allocations() as allocations:
        steps(setup)
    return before + allocations.peak


def predicted(run):
    setup = run.setup
    rehearsal = Rehearsal(setup.recipe, resolve_parts(setup.recipe), setup.device, prepared=run.prepared)
    made = rehearsal.setup
    return rehearsal.footprint(fullest_batches(made.feed, made.packing, made.train, 1))


@pytest.mark.parametrize(
    "settings",
    [
        {"adapter": "full"},
        pytest.param({"adapter": "full", **CUT}, marks=pytest.mark.slow),
        pytest.param({"adapter": "full", "packing": False}, marks=pytest.mark.slow),
        pytest.param({"adapter": "full", "precision": "bf16", **CUT}, marks=pytest.mark.slow),
        pytest.param(
            {"adapter": "full", "precision": "pure_bf16", "model": {"dtype": "bfloat16"}, **CUT}, marks=pytest.mark.slow
        ),
        pytest.param({"adapter": "full", "optimizer": {"name": "sgd", "momentum": 0.9}}, marks=pytest.mark.slow),
        pytest.param({"adapter": LORA, **CUT}, marks=pytest.mark.slow),
        pytest.param({"adapter": LORA, "packing": False}, marks=pytest.mark.slow),
        {"adapter": LORA, "precision": "bf16", **CUT},
        {"adapter": "dora"},
        pytest.param({"adapter": "full", "gradient_checkpointing": True, **CUT}, marks=pytest.mark.slow),
        pytest.param({"adapter": LORA, "gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param({"adapter": LORA, "gradient_checkpointing": True, "precision": "bf16"}, marks=pytest.mark.slow),
        {"adapter": LORA, "gradient_checkpointing": "selective"},
    ],
    ids=str,
)
def test_the_predicted_peak_is_within_a_tenth_of_the_measured_one(assembled, settings):
    run = assembled(**{"precision": "float32", **settings})
    found = measured(run.setup)
    assert predicted(run).peak == pytest.approx(found, rel=0.1)


OTHERS = [a for a in ARCHITECTURES if a not in ("llama", "gemma2", "gpt2", "mixtral")]


@pytest.mark.parametrize(
    "architecture", ["gemma2", "gpt2", "mixtral", *(pytest.param(a, marks=pytest.mark.slow) for a in OTHERS)]
)
def test_every_architecture_is_predicted(assembled, architecture):
    run = assembled(architecture, data=rows((100, 64) * 4), adapter=LORA, max_tokens_per_device=400)
    found = measured(run.setup)
    assert predicted(run).peak == pytest.approx(found, rel=0.1)
