"""Units through a run: pairs and judged answers are trained whole, however the batch is cut, with their columns."""

import json

import pytest
import torch
from luthier import LossOutput, LuthierError
from torch.nn.functional import logsigmoid

CUTS = [
    {"max_tokens_per_device": 4096},
    {"max_tokens_per_device": 120},
    {"max_tokens_per_device": 97},
    {"packing": False},
]
SEEN = []


class MarginLoss:
    """-log sigmoid(chosen - rejected - margin), summed over pairs: sees none where a pair was divided."""

    data = "preference"
    columns = {"margin": "float", "rank": "int"}

    def terms(self, batch):
        return {"pairs": float(len(batch.pairs))}

    def __call__(self, policy, batch):
        sums = batch.sum_by_document(policy.token_logprobs(batch))
        chosen, rejected = (sums[side] for side in batch.pairs.T)
        margins = batch.columns["margin"]
        assert len(batch.pairs) == batch.num_units == len(margins)
        assert (torch.arange(batch.num_units) == batch.unit_of[batch.pairs].T).all()
        SEEN.append((batch.index.tolist(), batch.columns["rank"].tolist()))
        total = -logsigmoid(chosen - rejected - margins).sum() + 0 * sums.sum()
        return LossOutput(sums={"pairs": total}, metrics={"wins": ((chosen > rejected).sum().float(), len(chosen))})


class VerdictLoss:
    """Judged answers are made likelier or less likely by their label."""

    data = "unpaired"

    def terms(self, batch):
        return {"judged": float(batch.num_units)}

    def __call__(self, policy, batch):
        sums = batch.sum_by_document(policy.token_logprobs(batch))
        own = sums[batch.documents("text").clamp(min=0)][: batch.num_units]
        label = batch.columns["label"]
        assert label.dtype == torch.bool and len(label) == batch.num_units
        return LossOutput(sums={"judged": -logsigmoid(torch.where(label, own, -own) / 10).sum() + 0 * sums.sum()})


def pair_rows(count=20):
    return [
        {
            "prompt": f"{i} and {i % 7}?" + "." * (i % 5),
            "chosen": f"{i + i % 7}" * (1 + i % 3),
            "rejected": "" if i % 6 == 5 else "no" * (1 + i % 4),
            "margin": i / 8,
            "rank": i,
        }
        for i in range(count)
    ]


def judged_rows(count=20):
    return [
        {"prompt": row["prompt"], "completion": row["rejected" if i % 3 else "chosen"], "label": i % 3 == 0}
        for i, row in enumerate(pair_rows(count))
    ]


def weights(run):
    return torch.cat([p.detach().double().flatten() for p in run.model.parameters()])


def in_float64(model_folder):
    model = {"name_or_path": str(model_folder), "dtype": "float64"}
    return {"model": model, "optimizer": {"name": "sgd", "momentum": 0.9}, "learning_rate": 1e-3}


@pytest.mark.parametrize(("loss", "rows"), [(MarginLoss(), pair_rows()), (VerdictLoss(), judged_rows())])
def test_units_are_whole_and_packing_does_not_change_the_trajectory(train, tmp_path, model_folder, loss, rows):
    shared = {**in_float64(model_folder), "loss": loss, "data": rows, "eval_data": rows[:5]}
    runs = [train(**shared, **cut, output_dir=tmp_path / f"run-{i}") for i, cut in enumerate(CUTS)]
    for run in runs[1:]:
        torch.testing.assert_close(weights(run), weights(runs[0]), rtol=1e-10, atol=1e-12)
        assert run.loss_history == pytest.approx(runs[0].loss_history, rel=1e-10)
        assert run.eval_loss == pytest.approx(runs[0].eval_loss, rel=1e-10)


def test_columns_and_index_are_those_of_the_row(train):
    SEEN.clear()
    train(loss=MarginLoss(), data=pair_rows(), max_tokens_per_device=97)
    assert sorted(i for index, _ in SEEN for i in index) == list(range(20))
    assert all(index == ranks for index, ranks in SEEN)


def test_a_run_on_pairs_goes_on_from_its_checkpoint_to_the_bit(train, tmp_path, model_folder):
    shared = {"loss": MarginLoss(), "data": pair_rows(), "save_steps": 1, "num_train_epochs": 2}
    straight = train(**shared, output_dir=tmp_path / "a")
    checkpoint = straight.output_path / "checkpoints" / "step-00000002"
    resumed = train(**shared, output_dir=tmp_path / "b", resume=checkpoint)
    assert torch.equal(weights(resumed), weights(straight))


BROKEN = [
    (MarginLoss(), {"rejected": None}, "data-row", "rejected is missing"),
    (MarginLoss(), {"margin": "wide"}, "data-row", "finite number"),
    (MarginLoss(), {"margin": None}, "data-column", "'margin'"),
    (VerdictLoss(), {"label": "good"}, "data-row", "true or false"),
    (VerdictLoss(), {"label": 1}, "data-row", "true or false"),
    (VerdictLoss(), {"label": None}, "data-column", "'label'"),
]


@pytest.mark.parametrize(("loss", "change", "code", "words"), BROKEN)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_that_lacks_what_the_loss_reads_is_named_before_the_first_step(
    train, tmp_path, loss, change, code, words, streaming
):
    rows = pair_rows() if loss.data == "preference" else judged_rows()
    rows[2] = {name: value for name, value in {**rows[2], **change}.items() if value is not None}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(LuthierError) as caught:
        train(loss=loss, data={"train": [str(path)], "streaming": streaming}, max_steps=3)
    assert caught.value.code == code and words in str(caught.value) and "rows.jsonl:3" in caught.value.where
    assert not (tmp_path / "run").exists()
