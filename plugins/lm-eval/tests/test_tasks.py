"""Tasks of one's own: the numbers are those of the harness's own model of transformers, and reach table, file and gate."""

import json
from pathlib import Path

import luthier
import pytest
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from luthier import BenchmarkModel
from luthier.cli.app import app
from luthier.testing import expect_error
from luthier.testing.worlds import tiny_model, tiny_tokenizer
from luthier_lm_eval.harness import nearest_names

NAMES = ["capitals", "capitals_answered", "capitals_read"]


@pytest.fixture(scope="module")
def model():
    return BenchmarkModel(model=tiny_model(seed=3).eval(), tokenizer=tiny_tokenizer(), max_tokens=200)


def values(scores):
    return {(score.task, score.metric): score.value for score in scores}


@pytest.mark.parametrize("num_fewshot", [None, 2])
def test_the_numbers_are_those_of_the_harness_itself(build, tasks, model, num_fewshot):
    names = NAMES[:1] if num_fewshot else NAMES
    found = build(include_path=tasks, num_fewshot=num_fewshot).run(model, names)
    manager = TaskManager(include_path=tasks, include_defaults=False)
    own = HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=1)
    wanted = simple_evaluate(own, tasks=names, task_manager=manager, num_fewshot=num_fewshot, bootstrap_iters=0)
    for score in found:
        expected = wanted["results"][score.task][f"{score.metric},none"]
        assert score.value == pytest.approx(expected, rel=1e-4)
        assert score.samples == 4
    assert {score.task for score in found} == set(names)


def test_the_error_is_that_of_a_mean(build, tasks, model):
    (score,) = build(include_path=tasks).run(model, ["capitals"])
    assert score.metric == "acc"
    assert score.greater_is_better is True
    assert score.stderr == pytest.approx((score.value * (1 - score.value) / 3) ** 0.5)


def test_a_group_is_measured_with_its_tasks(build, tasks, model, manager_with_groups):
    found = manager_with_groups.run(model, ["all_capitals"])
    assert values(found)["all_capitals", "acc"] == values(found)["capitals", "acc"]
    assert [score.samples for score in found if score.task == "all_capitals"] == [4]


@pytest.fixture
def manager_with_groups(build, tasks):
    """A benchmark whose index is made of the folder alone: that of the harness takes seconds, and adds nothing here."""
    benchmark = build(include_path=tasks)
    benchmark.manager = TaskManager(include_path=tasks, include_defaults=False)
    return benchmark


def test_a_limit_takes_the_first_examples(build, tasks, model):
    (score,) = build(include_path=tasks, limit=3).run(model, ["capitals"])
    assert score.samples == 3


@pytest.mark.parametrize("options", [{"apply_chat_template": True}, {"system_instruction": "Answer in a word."}])
def test_what_stands_around_a_prompt_changes_what_the_model_reads(build, tasks, model, options):
    plain, around = [], []
    build(include_path=tasks).run(Watched(model, plain), ["capitals_answered"])
    build(include_path=tasks, **options).run(Watched(model, around), ["capitals_answered"])
    assert len(plain) == len(around) == 4
    for text, surrounded in zip(plain, around, strict=True):
        assert "The capital of" in surrounded
        assert surrounded != text
        assert ("Answer in a word." in surrounded) == ("system_instruction" in options)


class Watched:
    """A model that writes down the prompts that it is asked to answer."""

    def __init__(self, model, seen):
        self.model, self.seen = model, seen
        self.tokenizer, self.max_length = model.tokenizer, model.max_length

    def answer_prompts(self, prompts, **how):
        self.seen += [self.tokenizer.decode(prompt) for prompt in prompts]
        return self.model.answer_prompts(prompts, **how)


def test_a_chat_without_a_template_is_refused(build, tasks):
    plain = BenchmarkModel(model=tiny_model().eval(), tokenizer=tiny_tokenizer(template=None))
    with expect_error("template-missing", "benchmark 'lm_eval': apply_chat_template"):
        build(include_path=tasks, apply_chat_template=True).run(plain, ["capitals"])


def test_a_search_that_is_not_here_is_refused_by_its_name(build, tasks, model):
    with expect_error("part-unsupported", "--tasks", "num_beams"):
        build(include_path=tasks).run(model, ["capitals_in_beams"])


def test_rows_that_cannot_be_had_are_an_error_before_the_model_is_read(build, tasks, tmp_path):
    text = Path(tasks, "choices.yaml").read_text().replace("task: capitals", "task: gone")
    (tmp_path / "gone.yaml").write_text(text.replace("capitals.jsonl", "gone.jsonl"))
    with expect_error("data-not-found", "--tasks") as caught:
        build(include_path=str(tmp_path)).check(["gone"])
    assert "HF_HUB_OFFLINE" in caught.value.remedy


@pytest.mark.parametrize(
    ("line", "instead", "said"),
    [
        ("doc_to_target: 0", "", "doc_to_target"),
        ("doc_to_text: ", "doc_to_txt: ", "doc_to_txt"),
        ("{{country}}", "{{country.name.first}}", "doc_to_text"),
        ("test_split: test", "test_split: validation", "validation"),
    ],
)
def test_a_mistake_in_a_task_is_an_error_with_its_name_and_the_cause(build, tasks, tmp_path, line, instead, said):
    text = Path(tasks, "choices.yaml").read_text()
    (tmp_path / "right.yaml").write_text(text)
    (tmp_path / "wrong.yaml").write_text(text.replace("task: capitals", "task: wrong").replace(line, instead))
    with expect_error("part-unsupported", "--tasks", said) as caught:
        build(include_path=str(tmp_path)).check(["capitals", "wrong"])
    assert "'wrong'" in caught.value.problem and "'capitals'" not in caught.value.problem


def test_a_task_that_cannot_be_scored_is_an_error_and_what_the_model_raises_stays(build, tasks, model, tmp_path):
    text = Path(tasks, "answers.yaml").read_text().replace("task: capitals_answered", "task: wrong")
    (tmp_path / "wrong.yaml").write_text(f"{text}\nprocess_results: !function scoring.score\n")
    (tmp_path / "scoring.py").write_text("def score(doc, results):\n    return results[7]\n")
    with expect_error("part-unsupported", "--tasks", "IndexError") as caught:
        build(include_path=str(tmp_path)).run(model, ["wrong"])
    assert "'wrong'" in caught.value.problem
    with pytest.raises(ZeroDivisionError):
        build(include_path=tasks).run(Failing(model), ["capitals_answered"])


class Failing:
    """A model that fails at answering."""

    def __init__(self, model):
        self.tokenizer, self.max_length = model.tokenizer, model.max_length

    def answer_prompts(self, prompts, **how):
        return 1 / 0


def test_the_command_shows_them_and_the_run_keeps_them(tasks, model_folder, tmp_path, capsys):
    rows = [{"prompt": "One plus one is", "completion": "two"}] * 4
    run = luthier.train(model=str(model_folder), data=rows, adapter="lora", max_steps=1, global_batch_size=2, device="cpu",
                        output_dir=tmp_path / "run", exact_callbacks=[])  # fmt: skip
    how = f"{{name: lm_eval, include_path: {tasks}}}"
    words = ["evaluate", str(run.output_path), "--tasks", "capitals,luthier_sums", "--benchmark", how]
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        app([*words, "--json"])
    assert ended.value.code == 0
    document = json.loads(capsys.readouterr().out)
    number = document["metrics"]["capitals/acc"]
    assert number["low"] < number["value"] < number["high"] or number["stderr"] == 0
    assert {"capitals/acc", "luthier_sums/acc", "luthier_sums/acc_norm"} == set(document["metrics"])
    (line,) = [json.loads(line) for line in (run.output_path / "evaluations.jsonl").read_text().splitlines()]
    assert line["metrics"] == document["metrics"]
    assert line["tasks"] == ["capitals", "luthier_sums"]


def test_a_gate_is_about_a_number_of_a_task(tasks, model_folder):
    how = {"name": "lm_eval", "include_path": tasks}
    found = luthier.evaluate(model_folder, tasks=["capitals"], benchmark=how, against=model_folder, max_regression=0.0,
                             gate="capitals/acc")  # fmt: skip
    assert found.passed
    assert found.differences["capitals/acc"].value == 0.0
    assert found.against["capitals/acc"] == found.metrics["capitals/acc"]


@pytest.mark.slow
def test_a_misspelt_task_of_the_harness_is_told_its_nearest(build):
    with expect_error("part-unknown", "--tasks", "hellaswag"):
        build().check(["hellaswagg"])


@pytest.mark.parametrize("known", [[], ["capitals"]])
def test_an_unknown_task_is_told_how_tasks_of_ones_own_are_named(known):
    remedy = nearest_names("capital", known)
    assert '--benchmark "{name: lm_eval, include_path: FOLDER}"' in remedy
    assert ("'capitals'" in remedy) == bool(known)
