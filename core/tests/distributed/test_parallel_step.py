"""One optimizer step over several ranks: gradients, loss and norm are those of one process."""

import functools

import pytest
import torch
from luthier.builtin.full import FullTuning
from luthier.distributed.world import World
from luthier.errors import LuthierError
from luthier.model.weights.shard_tensors import whole_tensor
from luthier.plugins.contracts.values import LossOutput
from luthier.plugins.records import NoOptions
from luthier.randomness import keep_randomness
from luthier.recipe import Recipe
from luthier.recipe.objects import Objects
from luthier.step.over_batches import begin_loss
from luthier.step.update import accumulate_gradients, update_weights
from luthier.testing import expect_error
from luthier.testing.ranks import in_ranks
from luthier.testing.worlds import save_tiny_model, tiny_model, tiny_tokenizer
from luthier.training.assemble import assemble_run

LORA = {"name": "lora", "r": 4, "lora_dropout": 0.0, "target_modules": "all-linear", "init_lora_weights": False}
FULL = {"name": "full"}
BOUND = {"float64": 1e-10, "float32": 1e-5}


class Setting:
    """A recipe on the tiny model, to be assembled in each process anew."""

    def __init__(self, model, rows, **changes):
        self.rows, self.objects = rows, {}
        small = {"global_batch_size": 11, "max_tokens_per_device": 50, "memory_check": False}
        named = {"name_or_path": str(model), "dtype": changes.pop("dtype", "float64")}
        self.settings = {"model": named, "data": "rows", "adapter": FULL, **small, **changes}

    def assembled(self, world=None):
        objects = Objects(data=self.rows, **self.objects)
        with keep_randomness():
            return assemble_run(Recipe.from_dict(self.settings), objects, world=world or World.current())


def gradients(setting):
    """Of the first step: every parameter's gradient, the loss, and how many turns there were, and how many idle."""
    setup = setting.assembled().setup
    batches = list(setup.micro_batches(next(iter(setup.feed.portions(0)))))
    meter = accumulate_gradients(setup, 0, batches)
    named = [pair for g in setup.adapter.groups() for pair in zip(g.names, g.parameters, strict=True)]
    found = {name: whole_tensor(p.grad) for name, p in named if p.grad is not None}
    turns = {"turns": len(batches), "idle": sum(b.idle for b in batches)}
    return {"gradients": found, "loss": meter.loss, "metrics": meter.pairs(), **turns}


def assert_alike(ranks, alone, bound):
    for rank in ranks:
        assert rank["loss"] == pytest.approx(alone["loss"], rel=bound)
        assert rank["metrics"].keys() == alone["metrics"].keys()
        for name, pair in alone["metrics"].items():
            assert rank["metrics"][name] == pytest.approx(pair, rel=bound)
        assert rank["gradients"].keys() == alone["gradients"].keys()
        for name, expected in alone["gradients"].items():
            close = functools.partial(torch.testing.assert_close, rtol=bound, atol=bound * float(expected.abs().max()))
            close(rank["gradients"][name], expected, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def setting(model_folder, rows):
    return functools.partial(Setting, model_folder, rows)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("adapter", [FULL, LORA], ids=["full", "lora"])
def test_two_ranks_give_the_gradients_of_one(setting, strategy, adapter):
    alone = gradients(setting(adapter=adapter))
    ranks = in_ranks(2, gradients, setting(adapter=adapter, distributed=strategy))
    assert ranks[0]["turns"] == ranks[1]["turns"] > 1
    assert_alike(ranks, alone, BOUND["float64"])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_rank_without_work_changes_nothing(setting, strategy):
    changes = {"packing": False, "adapter": LORA, "global_batch_size": 4}
    ranks = in_ranks(3, gradients, setting(**changes, distributed=strategy))
    assert sorted(rank["idle"] for rank in ranks) == [0, 1, 1]
    assert_alike(ranks, gradients(setting(**changes)), BOUND["float64"])


def test_ranks_whose_weights_come_later_compute_another_gate_and_norm_like_rank_0(tmp_path, rows):
    folder = save_tiny_model(tmp_path / "model", "gemma2")  # GELU, and norms about one
    make = functools.partial(Setting, folder, rows, adapter=LORA)
    assert_alike(in_ranks(2, gradients, make(distributed="fsdp")), gradients(make()), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("adapter", [FULL, LORA, {**LORA, "name": "dora"}], ids=["full", "lora", "dora"])
@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "gpt_neox", "phi3", "qwen3", "mixtral"])
def test_architectures_and_adapters_over_four_ranks(tmp_path, rows, architecture, adapter, strategy):
    dtype = "float32" if architecture == "mixtral" else "float64"  # torch groups no products of float64
    exact = {"precision": "float32"} if dtype == "float32" else {}
    folder = save_tiny_model(tmp_path / "model", architecture)
    make = functools.partial(Setting, folder, rows, adapter=adapter, dtype=dtype, **exact)
    bound = 1e-6 if architecture == "gemma2" else BOUND[dtype]  # its norms are computed in float32 whatever it is in
    assert_alike(in_ranks(4, gradients, make(distributed=strategy)), gradients(make()), bound)


class SquaredMean:
    """A loss that couples the batch, its documents in no order."""

    data, couples = "tokens", "batch"

    def terms(self, batch):
        return {"coupled": 1.0 * batch.num_documents}

    def scores(self, policy, batch):
        return batch.sum_by_document(policy.token_logprobs(batch)), {}

    def combine(self, scores, fixed):
        return LossOutput(
            sums={"coupled": scores.mean() ** 2 * len(scores)}, metrics={"mean": (scores.sum(), len(scores))}
        )

    def __call__(self, policy, batch):
        return self.combine(*self.scores(policy, batch))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_loss_that_couples_the_batch_sees_all_of_it_on_every_rank(setting, strategy):
    alone = gradients(setting(loss=SquaredMean()))
    assert_alike(in_ranks(2, gradients, setting(loss=SquaredMean(), distributed=strategy)), alone, BOUND["float64"])


class Decaying(FullTuning):
    """Full tuning with a penalty on one weight."""

    def penalty(self):
        return 0.5 * next(iter(self.model.parameters())).square().sum()


def stepped(setting):
    setup = setting.assembled().setup
    done = update_weights(setup, 0, next(iter(setup.feed.portions(0))))
    return {"loss": done.loss, "norm": done.grad_norm, "tokens": [done.tokens, done.supervised_tokens, done.documents],
            "weights": {n: whole_tensor(p).detach() for n, p in setup.model.named_parameters()}}  # fmt: skip


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_penalty_counts_once_and_the_norm_is_everyones(setting, strategy):
    changes = {"adapter": Decaying(NoOptions()), "optimizer": "sgd", "max_grad_norm": 0.5, "learning_rate": 0.1}
    alone = stepped(setting(**changes))
    for rank in in_ranks(2, stepped, setting(**changes, distributed=strategy)):
        assert rank["loss"] == pytest.approx(alone["loss"], rel=1e-12)
        assert rank["norm"] == pytest.approx(alone["norm"], rel=1e-12)
        assert rank["tokens"] == alone["tokens"]
        for name, expected in alone["weights"].items():
            torch.testing.assert_close(rank["weights"][name], expected, rtol=1e-10, atol=1e-12)


class Choosy:
    """A loss whose second term touches one parameter for one document only: other ranks never reach it."""

    data = "tokens"

    def __init__(self, only):
        self.only = only

    def terms(self, batch):
        return {"loss": float(len(batch.supervised))}

    def __call__(self, policy, batch):
        total = -policy.token_logprobs(batch).sum()
        if self.only in batch.lengths.tolist():
            total = total + policy.model.model.norm.seldom.sum()
        return LossOutput(sums={"loss": total})


def test_what_one_rank_alone_reaches_has_its_gradient_and_what_none_reaches_has_none(rows):
    def made(only):
        model = tiny_model().double()
        for name in ("seldom", "never"):
            model.model.norm.register_parameter(name, torch.nn.Parameter(torch.ones(3, dtype=torch.float64)))
        setting = Setting("", rows, loss=Choosy(only), packing=False)
        setting.settings["model"] = "python"
        setting.objects = {"model": model, "tokenizer": tiny_tokenizer()}
        return setting

    portion = next(iter(made(0).assembled(World()).setup.feed.portions(0)))
    lengths = [len(e.input_ids) for e in portion.examples]
    only = next(length for length in lengths if lengths.count(length) == 1)
    alone = gradients(made(only))
    assert "model.norm.seldom" in alone["gradients"]
    assert "model.norm.never" not in alone["gradients"]
    assert_alike(in_ranks(2, gradients, made(only)), alone, BOUND["float64"])


class Mute(Choosy):
    """A loss without gradient where it does not find its document."""

    def __call__(self, policy, batch):
        found = super().__call__(policy, batch)
        return found if self.only in batch.lengths.tolist() else LossOutput(sums={"loss": found.sums["loss"].detach()})


def test_a_rank_without_a_gradient_is_told_and_not_waited_for(setting):
    def refused(setting):
        with expect_error("part-unsupported", "loss") as caught:
            gradients(setting)
        return caught.value.code

    assert in_ranks(2, refused, setting(loss=Mute(-1))) == ["part-unsupported"] * 2


def test_the_experts_balance_is_weighted_over_all_ranks(tmp_path, rows):
    folder = save_tiny_model(tmp_path / "model", "mixtral")
    exact = {"dtype": "float32", "precision": "float32"}
    make = functools.partial(Setting, folder, rows, router_aux_loss_coef=0.5, **exact)
    assert_alike(in_ranks(2, gradients, make()), gradients(make()), BOUND["float32"])


class Ranked:
    """Rows are compared with the batch's mean; `fixed` holds their lengths, which weigh them."""

    data, couples = "tokens", "batch"

    def terms(self, batch):
        return {"ranked": 1.0 * batch.num_units}

    def scores(self, policy, batch):
        rows = batch.documents("text") if batch.named else torch.arange(batch.num_units)
        scores = batch.sum_by_document(policy.token_logprobs(batch))[rows]
        lengths = batch.lengths[rows].to(scores)
        return torch.stack([scores, scores.square()], -1), {"lengths": lengths, "doubled": 2 * scores}

    def combine(self, scores, fixed):
        assert not fixed["doubled"].requires_grad
        ordered = scores[:, 0].sort().values / fixed["lengths"].mean()
        spread = (ordered - ordered.mean()).square().sum() + 1e-3 * scores[:, 1].sum()
        return LossOutput(sums={"ranked": spread}, metrics={"length": (fixed["lengths"].sum(), len(scores))})

    def __call__(self, policy, batch):
        return self.combine(*self.scores(policy, batch))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_scores_and_fixed_tensors_are_gathered_over_ranks_also_from_idle_ones(setting, strategy, ranks):
    changes = {"loss": Ranked(), "packing": False, "global_batch_size": 4}
    found = in_ranks(ranks, gradients, setting(**changes, distributed=strategy))
    assert any(rank["idle"] for rank in found) == (ranks == 3)
    assert_alike(found, gradients(setting(**changes)), BOUND["float64"])


def test_the_balance_of_experts_is_part_of_a_coupled_objective(tmp_path, rows):
    folder = save_tiny_model(tmp_path / "moe", "mixtral")
    make = functools.partial(Setting, folder, rows, loss=Ranked(), dtype="float32", precision="float32")
    plain, balanced = gradients(make()), gradients(make(router_aux_loss_coef=0.5))
    assert balanced["loss"] > plain["loss"]
    gate = next(name for name in plain["gradients"] if "gate" in name and "mlp" in name)
    assert not torch.allclose(plain["gradients"][gate], balanced["gradients"][gate])
    assert_alike(in_ranks(2, gradients, make(router_aux_loss_coef=0.5, distributed="ddp")), balanced, 1e-4)


class Centred:
    """Log-probabilities, measured from their mean over some batches before training."""

    data = "tokens"

    def begin(self, context):
        found = context.over(context.batches(self.batches), lambda policy, batch: policy.token_logprobs(batch).mean())
        self.centre = sum((i + 1) * one for i, one in enumerate(found))

    def terms(self, batch):
        return {"centred": 1.0 * len(batch.supervised)}

    def __call__(self, policy, batch): ...


def begun(setting, count):
    setup = setting.assembled().setup
    setup.loss.batches = count
    begin_loss(setup)
    context = setup.context
    with pytest.raises(LuthierError, match="Loss.begin"):
        context.over([], max)
    return {"centre": setup.loss.centre, "training": setup.model.training}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_every_rank_knows_the_results_of_all_in_their_order(setting, strategy, count):
    make = functools.partial(setting, loss=Centred(), global_batch_size=6)
    alone = begun(make(), count)
    for rank in in_ranks(2, begun, make(distributed=strategy), count):
        assert rank["training"]
        torch.testing.assert_close(rank["centre"], alone["centre"], rtol=1e-12, atol=0)
