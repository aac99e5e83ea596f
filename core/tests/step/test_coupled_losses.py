"""Losses that couple the batch: fixed tensors, wrong returns, evaluation in groups, idle ranks, plans, large scores."""

import time

import luthier
import pytest
import torch
from luthier import LossOutput, LuthierError
from luthier.distributed.spread import Spread
from luthier.distributed.world import World
from luthier.testing import expect_error
from luthier.testing.ranks import in_ranks


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


def test_large_scores_are_gathered_as_tensors_in_less_than_a_second_or_two():
    def joined():
        world = World.current()
        scores = torch.arange(512 * 2 * 4096, dtype=torch.float32).reshape(512, 2, 4096) + world.rank
        began = time.perf_counter()
        places, whole = Spread(module=torch.nn.Identity(), world=world).join_rows([scores[:100], scores[100:]])
        mine = torch.cat([whole[place] for place in places])
        return [time.perf_counter() - began, list(whole.shape), torch.equal(mine, scores)]

    for seconds, shape, same in in_ranks(2, joined):
        assert (shape, same) == ([1024, 2, 4096], True)
        assert seconds < 5  # 19 s as JSON lists


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.int64, torch.float64])
def test_ranks_without_rows_take_part_whatever_the_dtype(dtype):
    def joined():
        world = World.current()
        rows = torch.tensor([[1, 0, 1]] * 2).to(dtype) if world.rank == 1 else torch.zeros(0)
        places, whole = Spread(module=torch.nn.Identity(), world=world).join_rows([rows])
        return [[places[0].start, places[0].stop], whole.tolist(), str(whole.dtype)]

    first, second = in_ranks(2, joined)
    assert (first[0], second[0]) == ([0, 0], [0, 2])
    assert first[1:] == second[1:] == [torch.tensor([[1, 0, 1]] * 2).to(dtype).tolist(), str(dtype)]


WRONG_SCORES = [
    (lambda s, f: s, ("loss",)),
    (lambda s, f: (s, [1]), ("loss",)),
    (lambda s, f: (s.sum(), f), ("loss", "'scores'")),
    (lambda s, f: (s[:1], f), ("loss", "'scores'")),
    (lambda s, f: (s, {"lengths": 3.0}), ("loss", "'lengths'")),
    (lambda s, f: (s.detach(), f), ("loss",)),
]
WRONG_SUMS = [
    (lambda sums: sums["ranked"], ("loss", "LossOutput")),
    (lambda sums: LossOutput(sums={"ranked": sums["ranked"].detach()}), ("loss",)),
    (lambda sums: LossOutput(sums={"pairs": sums["ranked"]}), ("loss",)),
    (lambda sums: LossOutput(sums={"ranked": sums["ranked"][None]}), ("loss",)),
]


@pytest.mark.parametrize(("change", "says"), WRONG_SCORES)
def test_wrong_scores_are_refused_with_what_was_expected(train, change, says):
    class Wrong(Ranked):
        def scores(self, policy, batch):
            return change(*super().scores(policy, batch))

    with pytest.raises(LuthierError) as refused:
        train(loss=Wrong(), memory_check=False, max_tokens_per_device=4096)
    assert all(fact in str(refused.value) for fact in says)
    assert (refused.value.code, refused.value.where) == ("part-invalid", "loss")


@pytest.mark.parametrize(("change", "says"), WRONG_SUMS)
def test_a_wrong_return_of_combine_is_refused_with_what_was_expected(train, change, says):
    class Wrong(Ranked):
        def combine(self, scores, fixed):
            return change(super().combine(scores, fixed).sums)

    with pytest.raises(LuthierError) as refused:
        train(loss=Wrong())
    assert all(fact in str(refused.value) for fact in says)
    assert (refused.value.code, refused.value.where) == ("part-invalid", "loss")


def test_weights_that_are_no_numbers_are_refused(train):
    class Wrong(Ranked):
        def terms(self, batch):
            return 1.0 * batch.num_units

    with expect_error("part-invalid", "loss"):
        train(loss=Wrong())


def test_a_coupled_loss_without_scores_is_refused_before_anything_is_read(train):
    class Bare:
        data, couples = "tokens", "batch"

        def terms(self, batch): ...

        def __call__(self, policy, batch): ...

    with expect_error("part-invalid", "Bare"):
        train(loss=Bare())


def test_evaluation_scores_groups_of_one_global_batch(train, tmp_path, rows):
    """Two groups of four rows are what two evaluations of four rows each are together, not one of eight."""
    shared = {"loss": Ranked(), "global_batch_size": 4, "max_steps": 1, "model": None}
    shared.pop("model")
    run = train(**shared, eval_data=rows[:8], output_dir=tmp_path / "both")
    first, second = run.evaluate(rows[:4])["eval_loss"], run.evaluate(rows[4:8])["eval_loss"]
    assert run.eval_loss == pytest.approx((first + second) / 2, rel=1e-5)
    cut = train(**shared, eval_data=rows[:8], max_tokens_per_device=40, output_dir=tmp_path / "cut")
    assert cut.eval_loss == pytest.approx(run.eval_loss, rel=1e-5)
    some = train(**shared, eval_data=rows[:8], max_eval_batches=1, output_dir=tmp_path / "some")
    assert some.eval_loss == pytest.approx(first, rel=1e-5)


def test_a_coupled_loss_is_rehearsed_without_weights(model_folder, rows):
    class Listed(Ranked):
        def combine(self, scores, fixed):
            assert len(fixed["lengths"].tolist()) == len(scores)
            return super().combine(scores, fixed)

    found = luthier.plan(model=str(model_folder), data=rows, loss=Listed(), global_batch_size=8)
    assert found.memory["activations"] > 0
    assert not [note for note in found.notes if "not predicted" in note]
