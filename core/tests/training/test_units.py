"""Units through a run: pairs and judged answers are trained whole, however the batch is cut, with their columns."""

import json

import attrs
import luthier
import pytest
import torch
import transformers
from luthier import LossOutput, LuthierError
from luthier.data.batches.batch import collate_examples
from luthier.data.examples import TokenExample
from luthier.distributed.world import World
from luthier.model.weights.shard_tensors import whole_tensor
from luthier.randomness import keep_randomness
from luthier.recipe import Recipe
from luthier.recipe.objects import Objects
from luthier.step.update import accumulate_gradients
from luthier.testing.ranks import in_ranks
from luthier.training.assemble import assemble_run
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


class ComparingLoss(VerdictLoss):
    """Says that it compares the units of a batch."""

    least_batch = 2


@pytest.mark.parametrize(("count", "steps", "told"), [(9, 0, True), (8, 0, False), (10, 0, False), (9, 2, False)])
def test_a_last_group_of_an_epoch_that_is_too_small_to_compare_is_told(count, steps, told, train, capsys):
    length = {"max_steps": steps} if steps else {"num_train_epochs": 1}
    train(loss=ComparingLoss(), data=judged_rows(count), global_batch_size=4, **length)
    assert ("the last group of an epoch" in capsys.readouterr().err) == told


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
    (MarginLoss(), {"rejected": None}, "data-row", ("rows.jsonl:3: rejected",)),
    (MarginLoss(), {"margin": "wide"}, "data-row", ("rows.jsonl:3: margin",)),
    (MarginLoss(), {"margin": None}, "data-column", ("'margin'",)),
    (VerdictLoss(), {"label": "good"}, "data-row", ("rows.jsonl:3: label",)),
    (VerdictLoss(), {"label": 2}, "data-row", ("rows.jsonl:3: label",)),
    (VerdictLoss(), {"label": None}, "data-column", ("'label'",)),
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
    assert (
        caught.value.code == code
        and all(fact in str(caught.value) for fact in words)
        and "rows.jsonl:3" in caught.value.where
    )
    assert not (tmp_path / "run").exists()


class MismatchLoss(VerdictLoss):
    """As KTO: every answer is held against the answer of the next row, which `arrange` puts behind its prompt."""

    def arrange(self, units):
        answers = [unit.documents["text"].answer for unit in units]
        return [
            unit.with_document("mismatched", unit.documents["text"].prompt + answer)
            for unit, answer in zip(units, answers[1:] + answers[:1], strict=True)
        ]

    def __call__(self, policy, batch):
        sums = batch.sum_by_document(policy.token_logprobs(batch))
        if batch.idle:
            return LossOutput(sums={"judged": 0 * sums.sum()})
        own, other = sums[batch.documents("text")], sums[batch.documents("mismatched")]
        sign = torch.where(batch.columns["label"], 1.0, -1.0)
        return LossOutput(sums={"judged": -logsigmoid(sign * (own - other) / 10).sum()})


LOSSES = [(MarginLoss, pair_rows), (MismatchLoss, judged_rows)]


def step_of(model_folder, loss, rows, shares=True, **cut):
    """The gradient and the objective of the first step, with prompts shared or not, and its tokens."""
    recipe = {"model": {"name_or_path": str(model_folder), "dtype": "float64"}, "data": "rows", "loss": loss}
    recipe = Recipe.from_dict({**recipe, "global_batch_size": 9, "memory_check": False, **cut})
    with keep_randomness():
        setup = assemble_run(recipe, Objects(data=rows), world=World.current()).setup
    assert setup.layout.shares_prompts
    setup.feed.layout = attrs.evolve(setup.layout, shares_prompts=shares)
    portion = next(iter(setup.feed.portions(0)))
    meter = accumulate_gradients(setup, 0, list(setup.micro_batches(portion)))
    gradient = torch.cat(
        [whole_tensor(p.grad).flatten() for g in setup.adapter.groups() for p in g.parameters if p.grad is not None]
    )
    return {"gradient": gradient, "loss": meter.loss, "metrics": meter.pairs(), "tokens": portion.num_tokens}


def cut_step(model_folder, loss, rows, packing):
    return step_of(model_folder, loss, rows, packing=packing, max_tokens_per_device=120)


def assert_same_step(one, other, bound):
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-10)
    assert {name: tuple(pair) for name, pair in one["metrics"].items()} == other["metrics"]
    torch.testing.assert_close(
        one["gradient"], other["gradient"], rtol=bound, atol=bound * float(other["gradient"].abs().max())
    )


@pytest.mark.parametrize(("loss", "rows"), LOSSES)
def test_values_and_gradients_do_not_depend_on_sharing_or_packing(model_folder, loss, rows):
    expected = step_of(model_folder, loss(), rows(), shares=False, packing=False)
    for cut in CUTS:
        shared = step_of(model_folder, loss(), rows(), **cut)
        assert_same_step(
            shared, expected, 1e-6
        )  # a norm computes in float32: its gradients are rounded summed or apart
        assert shared["tokens"] < 0.8 * expected["tokens"]


@pytest.mark.parametrize(("loss", "rows"), LOSSES)
@pytest.mark.parametrize("packing", [True, False])
def test_values_and_gradients_do_not_depend_on_the_number_of_ranks(model_folder, loss, rows, packing):
    expected = step_of(model_folder, loss(), rows())
    ranks = in_ranks(2, cut_step, model_folder, loss(), rows(), packing)
    for rank in ranks:
        assert_same_step(rank, expected, 1e-10)


def test_derived_documents_that_were_cut_are_counted_in_the_metrics(train, tmp_path):
    rows = [{"prompt": "p" * (31 - i), "completion": "c" * i, "label": True} for i in (1, 30)] * 4
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = train(loss=MismatchLoss(), data={"train": [str(data)], "max_length": 60})
    lines = [json.loads(line) for line in (run.output_path / "metrics.jsonl").read_text().splitlines()]
    assert any(0 < line.get("derived_cut", 0) < 1 for line in lines)


class TwoTexts:
    """Reads two texts of a row as documents of their own, and nothing else."""

    data = "documents"
    documents = {"anchor": "question", "positive": "answer"}

    def terms(self, batch):
        return {"near": float(batch.num_units)}

    def __call__(self, policy, batch):
        (states,) = policy.hidden(batch, [-1])
        last = states[batch.document_starts[1:] - 1]
        anchor, positive = (last[batch.documents(name)] for name in ("anchor", "positive"))
        return LossOutput(sums={"near": (anchor - positive).square().sum()})


def test_texts_that_a_loss_names_become_documents_of_the_unit(train):
    rows = [{"question": f"what {i}", "answer": f"that {i * i}", "other": 1} for i in range(12)]
    run = train(loss=TwoTexts(), data=rows, learning_rate=1e-3)
    assert run.loss_history[-1] < run.loss_history[0]


def test_a_layers_state_does_not_run_from_one_side_of_a_pair_into_the_other(model_folder, tmp_path):
    shape = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    model = transformers.AutoModelForCausalLM.from_config(transformers.MambaConfig(**shape))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    recipe = Recipe.from_dict({"model": "given", "data": "rows", "loss": MarginLoss(), "memory_check": False})
    with keep_randomness():
        setup = assemble_run(recipe, Objects(model=model, tokenizer=tokenizer, data=pair_rows(4))).setup
    assert not setup.layout.shares_prompts and not setup.packing.on
    policy, pair = setup.step.policy, setup.train[0].by_name()
    with torch.no_grad():
        found = [
            policy.token_logprobs(collate_examples([TokenExample.joined(dict(sides))]))
            for sides in (pair.items(), reversed(pair.items()))
        ]
    length = len(pair["chosen"].input_ids)
    torch.testing.assert_close(found[0][:length], found[1][-length:])


@pytest.mark.parametrize(("loss", "rows"), LOSSES)
def test_the_plan_says_what_an_epoch_computes_and_what_sharing_saves(model_folder, loss, rows):
    settings = {
        "model": str(model_folder),
        "data": rows(),
        "loss": loss(),
        "exact_callbacks": [],
        "global_batch_size": 20,
    }
    schedule = luthier.plan(**settings).schedule
    recipe = Recipe.from_dict({**settings, "data": "rows"})
    with keep_randomness():
        setup = assemble_run(recipe, Objects(data=rows())).setup
    computed = next(iter(setup.feed.portions(0))).num_tokens
    apart = attrs.evolve(setup.layout, shares_prompts=False).lay_out_groups(setup.train, 20)
    if loss is MarginLoss:  # derived documents are those of another order
        assert schedule["tokens_per_epoch"] == computed
    assert schedule["tokens_saved_per_epoch"] > 0.2 * schedule["tokens_per_epoch"]
    assert schedule["tokens_per_epoch"] + schedule["tokens_saved_per_epoch"] == sum(len(e.input_ids) for e in apart)
