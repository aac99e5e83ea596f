"""The trajectory does not depend on how the global batch is cut, when one looks, or who watches."""

import luthier
import pytest
import torch
from luthier.plugins.contracts.values import LossOutput


def weights(run):
    return torch.cat([p.detach().double().flatten() for p in run.model.parameters()])


def settings_in(dtype, model_folder):
    return {"model": {"name_or_path": str(model_folder), "dtype": dtype}, "optimizer": {"name": "sgd", "momentum": 0.9}}


CUTS = [
    {"max_tokens_per_device": 4096},
    {"max_tokens_per_device": 60},
    {"max_tokens_per_device": 37},
    {"packing": False},
]


@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-10), ("float32", 1e-5)])
def test_micro_batches_and_packing_do_not_change_the_trajectory(train, tmp_path, model_folder, dtype, bound):
    shared = settings_in(dtype, model_folder)
    runs = [train(**shared, **cut, output_dir=tmp_path / f"run-{i}") for i, cut in enumerate(CUTS)]
    for run in runs[1:]:
        torch.testing.assert_close(weights(run), weights(runs[0]), rtol=bound, atol=bound)
        assert run.loss_history == pytest.approx(runs[0].loss_history, rel=bound)


def test_accumulation_by_another_name_is_the_same_global_batch(train, tmp_path):
    one = train(output_dir=tmp_path / "a")
    other = train(
        output_dir=tmp_path / "b", global_batch_size=8, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    assert one.loss_history == other.loss_history


@pytest.mark.parametrize(
    "watching",
    [
        {"eval_steps": 1, "eval_on_start": True},
        {"save_steps": 1},
        {"logging_steps": 3},
        {"exact_callbacks": [luthier.on(step_ended=lambda: torch.rand(3))]},
        {"exact_callbacks": ["jsonl", "plot", "progress"]},
    ],
)
def test_whoever_looks_changes_nothing(train, tmp_path, rows, watching):
    plain = train(output_dir=tmp_path / "plain", eval_data=rows[:3])
    watched = train(output_dir=tmp_path / "watched", eval_data=rows[:3], **watching)
    assert torch.equal(weights(plain), weights(watched))
    assert plain.loss_history == watched.loss_history


class MeanOfSquares:
    """A loss that couples the batch: the squared mean of the documents' log-likelihoods."""

    data = "tokens"
    couples = "batch"

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


def test_a_loss_that_couples_the_batch_is_cut_without_a_difference(train, tmp_path, model_folder, rows):
    shared = {**settings_in("float64", model_folder), "loss": MeanOfSquares(), "learning_rate": 1e-6}
    shared = {**shared, "global_batch_size": 24, "num_train_epochs": 3}
    whole = train(**shared, output_dir=tmp_path / "a", eval_data=rows[:4])
    cut = train(**shared, output_dir=tmp_path / "b", eval_data=rows[:4], max_tokens_per_device=40)
    torch.testing.assert_close(weights(whole), weights(cut), rtol=1e-10, atol=1e-12)
    assert whole.loss_history == pytest.approx(cut.loss_history, rel=1e-10)
    assert whole.eval_loss == pytest.approx(cut.eval_loss, rel=1e-10)
    assert whole.loss_history[-1] < whole.loss_history[0]


def test_the_same_recipe_gives_the_same_losses_again(train, tmp_path, model_folder, rows):
    import json

    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = train(data=data)
    again = luthier.train(first.output_path / "recipe.yaml", output_dir=tmp_path / "again")
    assert again.loss_history == first.loss_history


def test_the_callers_random_numbers_are_left_alone(train):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train(max_steps=1)
    assert torch.equal(torch.rand(3), expected)


def test_the_loss_is_transformers_mean_over_the_global_batchs_supervised_tokens(train, model_folder, rows):
    from luthier.data.prepare import prepare_data
    from luthier.recipe.schema import Data
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = train(max_steps=1, global_batch_size=24, max_tokens_per_device=64)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    examples = prepare_data(Data(train=[]), tokenizer, seed=0, given=rows).train
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    total = count = 0
    for example in examples:
        ids, labels = (torch.tensor(a, dtype=torch.int64)[None] for a in (example.input_ids, example.labels))
        total += model(input_ids=ids, labels=labels).loss.item() * example.num_supervised
        count += example.num_supervised
    assert run.loss_history[0] == pytest.approx(total / count, rel=1e-5)


def test_the_experts_balance_joins_the_objective_where_it_is_asked_for(train, tmp_path):
    from luthier.testing.worlds import save_tiny_model

    folder = save_tiny_model(tmp_path / "mixtral", "mixtral")
    shared = {"model": str(folder), "max_steps": 2}
    plain = train(**shared, output_dir=tmp_path / "plain")
    balanced = train(**shared, output_dir=tmp_path / "balanced", router_aux_loss_coef=0.5)
    cut = train(**shared, output_dir=tmp_path / "cut", router_aux_loss_coef=0.5, max_tokens_per_device=64)
    assert balanced.loss_history[0] > plain.loss_history[0] + 0.4
    assert cut.loss_history == pytest.approx(balanced.loss_history, rel=1e-4)
