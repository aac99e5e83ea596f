"""The memory of filling a cache before the first step is predicted, and a step's where that is larger."""

import luthier
import pytest
import torch
from luthier.hardware.memory_meter import Allocations
from luthier.memory.dry_run import Rehearsal
from luthier.memory.fit import fullest_batches
from luthier.model.fake_tensors import tensor_storages
from luthier.recipe import resolve_parts
from luthier.recipe.gather_arguments import gather_arguments
from luthier.step.reference.reference_check import begin_companions
from luthier.testing.worlds import save_tiny_model
from luthier.training.assemble import assemble_run

WIDE = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": 1024}  # fmt: skip
LORA = {"name": "lora", "target_modules": "all-linear"}


class Nearby:
    """The distance from the reference's log-probabilities."""

    data = "tokens"
    needs = ("reference",)

    def terms(self, batch):
        return {"nearby": float(len(batch.supervised))}

    def __call__(self, policy, batch):
        apart = policy.token_logprobs(batch) - policy.reference().token_logprobs(batch)
        return luthier.LossOutput(sums={"nearby": apart.square().sum()})


class Likely:
    """The divergence from the teacher's likeliest tokens."""

    data = "tokens"
    needs = ("teacher",)
    teacher_reads = (16, 1.0)

    def terms(self, batch):
        return {"likely": float(len(batch.supervised))}

    def __call__(self, policy, batch):
        def diverge(own, labels, theirs):
            best = theirs.topk(16, dim=-1).indices
            apart = own.log_softmax(-1).gather(-1, best) - theirs.log_softmax(-1).gather(-1, best)
            return apart.square().sum(-1)

        return luthier.LossOutput(sums={"likely": policy.map_logits(batch, diverge, other=policy.teacher()).sum()})


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    home = tmp_path_factory.mktemp("models")
    return [str(save_tiny_model(home / str(seed), "llama", seed=seed, **WIDE)) for seed in (0, 1)]


@pytest.fixture
def assembled(models):
    made = []

    def make(lengths=(90, 60) * 8, **settings):
        """Without operations of plugins, whose first call is compared with its reference on a sample."""
        random = torch.Generator().manual_seed(0)
        drawn = [torch.randint(8, 300, (length,), generator=random).tolist() for length in lengths]
        data = [{"input_ids": ids, "labels": ids} for ids in drawn]
        settings = {"model": models[0], "device": "cpu", "exact_callbacks": [], "precision": "float32",
                    "kernels": "reference", **settings}  # fmt: skip
        made.append(assemble_run(*gather_arguments(None, None, None, data, None, settings)))
        return made[-1]

    yield make
    for each in made:
        each.setup.undo.close()


def held(setup):
    """Bytes of all weights, another companion's and the halves that bfloat16 has no room for included.

    The start is copied when the companions begin.
    """
    live = [getattr(other, "live", None) for other in setup.step.policy.others.values()]
    models = [setup.model, *(each.model for each in live if each is not None)]
    tensors = [t for model in models for t in (*model.parameters(), *model.buffers())] + setup.precision.kept
    return sum({s._cdata: s.nbytes() for s in tensor_storages(tensors)}.values())


def rehearsed(run):
    """The run's rehearsal, and the largest micro-batches of its first step."""
    setup = run.setup
    made = Rehearsal(setup.recipe, resolve_parts(setup.recipe), setup.device, prepared=run.prepared)
    return made, fullest_batches(made.setup.feed, made.setup.packing, made.setup.train, 1)


def predicted(run):
    rehearsal, turns = rehearsed(run)
    return rehearsal.footprint(turns)


FEW = {"global_batch_size": 1, "max_tokens_per_device": 1024}  # a step has far less than a pass over the rows


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": Nearby(), "reference_cache": True, "adapter": LORA},
        {"loss": Likely(), "teacher_cache": True, "adapter": LORA},
        pytest.param({"loss": Nearby(), "reference_cache": True, "adapter": "full"}, marks=pytest.mark.slow),
        pytest.param({"loss": Nearby(), "reference_cache": True, "adapter": LORA, "other": True}, marks=pytest.mark.slow),
        pytest.param({"loss": Likely(), "teacher_cache": True, "adapter": LORA, "precision": "bf16"}, marks=pytest.mark.slow),
        pytest.param({"loss": Likely(), "teacher_cache": True, "adapter": LORA, "packing": False}, marks=pytest.mark.slow),
    ],
    ids=["reference", "teacher", "kept reference", "other reference", "bf16", "not packed"],
)  # fmt: skip
def test_the_peak_of_filling_is_within_a_tenth_of_the_measured_one(assembled, models, settings):
    settings = dict(settings)
    if settings.get("teacher_cache"):
        settings["teacher"] = models[1]
    if settings.pop("other", False):
        settings["reference"] = {"model": models[1]}
    run = assembled(**{**FEW, **settings})
    before = held(run.setup)
    with Allocations() as allocations:
        begin_companions(run.setup)
    rehearsal, turns = rehearsed(run)
    found = rehearsal.filling_footprint(turns[0])
    assert found.tokens > 2 * sum(len(example.input_ids) for example in turns[0]) or not run.setup.recipe.packing
    assert found.peak == pytest.approx(before + allocations.peak, rel=0.1)


def test_a_step_that_takes_more_is_the_peak_and_holds_the_full_cache(assembled, models):
    settings = {"loss": Likely(), "adapter": "full", "global_batch_size": 16, "max_tokens_per_device": 2048}
    live, cached = (assembled(**settings, teacher=models[1], teacher_cache=cache) for cache in (False, True))
    step, kept = predicted(live), predicted(cached)
    assert not kept.fills_cache
    supervised = sum((90, 60) * 8) - 16
    assert kept.causes["teacher"] == supervised * (2 * 16 + 1) * 4
    assert step.causes["teacher"] == held(live.setup)


def test_the_plan_says_that_filling_takes_most(assembled, models, tmp_path):
    rows = [{"input_ids": [5, 6, 7] * 20, "labels": [5, 6, 7] * 20} for _ in range(16)]
    plan = luthier.plan(model=models[0], data=rows, loss=Likely(), teacher=models[1], teacher_cache=True, adapter=LORA,
                        device="cpu", precision="float32", output_dir=str(tmp_path), **FEW)  # fmt: skip
    assert plan.memory["teacher"] > 0
    assert any("before the first step" in note and "cache" in note for note in plan.notes)
