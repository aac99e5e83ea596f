"""TRL's trainers from a recipe: their steps, our data, adapters, numbers, checkpoints and artifact."""

import json
from pathlib import Path

import luthier
import luthier_trl
import pytest
from luthier import LuthierError, Recipe
from luthier.cli.app import app
from luthier.plugins.registry import installed_plugins
from luthier.testing import checks_for
from luthier.training.trainers.trainer_refusals import check_trainer
from luthier_trl import CONFIGS, luthier_trainers
from luthier_trl.options import offered_fields
from typer.testing import CliRunner

pytestmark = pytest.mark.slow  # TRL takes ten seconds to import
PROMPTS = ["Once upon a time", "The cat", "A dog went", "She said", "In the morning", "He wanted", "They lived", "I am"]
ROWS = [{"prompt": text, "answer": str(number)} for number, text in enumerate(PROMPTS)]
LORA = {"name": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
LENGTHS = {"grpo": "max_completion_length", "rloo": "max_completion_length", "gmpo": "max_completion_length",
           "online_dpo": "max_new_tokens"}  # fmt: skip


def few_vowels(completions):
    """The share of letters that are no vowel."""
    return [sum(c.isalpha() and c not in "aeiouAEIOU" for c in text) / max(len(text), 1) for text in completions]


def variety(completions):
    """How many letters are different ones."""
    return [float(len(set(text))) for text in completions]


def settings_of(method="grpo", **trainer):
    own = {"name": f"trl.{method}", "reward": few_vowels, LENGTHS[method]: 12, **trainer}
    return {"model": "demo", "data": {"path": "python:list", "max_length": 16}, "adapter": LORA, "trainer": own,
            "learning_rate": 3e-3, "global_batch_size": 4, "max_steps": 2, "callbacks": ["jsonl"]}  # fmt: skip


def train(folder, method="grpo", trainer=(), rows=ROWS, **settings):
    merged = {**settings_of(method, **dict(trainer)), "data": rows, "output_dir": folder, **settings}
    merged.setdefault("data.max_length", 16)
    return luthier.train(**merged)


def command(*words):
    """What a command prints, which ends well."""
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.output
    return result.output


def numbers_of(run):
    return [json.loads(line) for line in (run.output_path / "metrics.jsonl").read_text().splitlines()]


def test_grpo_raises_the_mean_reward_and_its_checkpoint_opens_as_ours(tmp_path):
    recipe = tmp_path / "grpo.yaml"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    recipe.write_text(json.dumps({
        **settings_of(num_generations=8, reward="distinct_words", max_completion_length=24),
        "data": {"path": "rows.jsonl", "max_length": 16}, "max_steps": 16, "save_steps": 8, "output_dir": "run",
    }))  # fmt: skip
    command("train", str(recipe))
    lines = numbers_of(luthier.train(recipe))
    rewards = [line["reward"] for line in lines]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.01
    assert {"loss", "learning_rate", "grad_norm", "rewards/distinct_words/mean", "completions/mean_length"} <= set(
        lines[0]
    )
    command("generate", str(tmp_path / "run"), "The", "--step", "8")
    command("merge", str(tmp_path / "run"), "--output-dir", str(tmp_path / "merged"))
    again = {luthier.generate(place, "The cat", max_new_tokens=6) for place in (tmp_path / "run", tmp_path / "merged")}
    assert len(again) == 1


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_each_trainer_trains_each_kind_of_adapter_towards_a_reference(method, adapter, tmp_path):
    trainer = {"beta": [0.1] if method == "online_dpo" else 0.1} | (
        {} if method == "online_dpo" else {"num_generations": 2}
    )
    run = train(tmp_path / "run", method, trainer, adapter=adapter, learning_rate=1e-3)
    first = numbers_of(run)[0]
    assert run.steps == 2
    assert first.get("kl", first.get("objective/kl")) == pytest.approx(0.0, abs=1e-4)  # the policy is where it began
    assert luthier.generate(run.output_path, "The", max_new_tokens=3) == run.generate("The", max_new_tokens=3)


def test_options_and_settings_have_an_effect_that_shows(tmp_path):
    plain = train(tmp_path / "plain", trainer={"num_generations": 2})
    other = train(tmp_path / "seed", trainer={"num_generations": 2}, seed=3)
    cut = train(tmp_path / "cut", trainer={"num_generations": 2, "max_completion_length": 4})
    clipped = train(tmp_path / "clip", trainer={"num_generations": 2}, max_grad_norm=1e-9)
    assert numbers_of(plain)[0]["reward"] != numbers_of(other)[0]["reward"]
    assert numbers_of(cut)[0]["completions/max_length"] == 4
    assert numbers_of(clipped)[0]["reward"] == numbers_of(plain)[0]["reward"]
    split = train(tmp_path / "split", trainer={"num_generations": 2}, max_tokens_per_device=56)
    assert split.loss_history[0] == pytest.approx(plain.loss_history[0], abs=1e-5)
    scored = train(tmp_path / "eval", trainer={"num_generations": 2}, eval_data=ROWS[:2])
    assert 0 < scored.eval_metrics["eval_reward"] < 1


BROKEN = {"raises": lambda completions: 1 / 0, "nan": lambda completions: [float("nan")] * len(completions)}


@pytest.mark.parametrize("name", BROKEN)
def test_a_reward_that_fails_ends_the_run_with_its_name_and_row(name, tmp_path):
    with pytest.raises(LuthierError, match=r"data\[\d\]") as caught:
        train(tmp_path / "run", trainer={"reward": BROKEN[name], "num_generations": 2})
    assert caught.value.code == "part-broken"
    assert json.loads((tmp_path / "run/run.json").read_text())["state"] == "failed"


ODD = [  # Arrow has no type for such a column, or makes other values of it
    {"prompt": [{"role": "user", "content": "Once"}], "completion": 1, "facts": {"a": 1}},
    {"prompt": [{"role": "user", "content": "Say", "name": "Ann"}], "completion": True, "facts": {"b": [2, "c"]}},
    {"prompt": [{"role": "user", "content": "Then"}], "completion": None, "facts": "none"},
    {"prompt": [{"role": "system", "content": "Go"}, {"role": "user", "content": "on"}], "completion": "x"},
]


@pytest.mark.parametrize("method", ["grpo", "online_dpo"])
def test_columns_of_any_kind_reach_the_reward_as_they_are_and_prompts_too(method, tmp_path):
    seen = []

    def reward(completions, prompts, completion, facts):
        seen.extend(zip(prompts, map(repr, completion), facts, strict=True))
        return [float(len(text)) for text in completions]

    template = "{% for m in messages %}{{ m['name'] is defined }} {{ m['content'] }} {% endfor %}"
    trainer = {"reward": reward} | ({} if method == "online_dpo" else {"num_generations": 2})
    train(tmp_path / "run", method, trainer, rows=ODD, max_steps=1, **{"data.chat_template": template})
    wanted = [(row["prompt"], repr(row["completion"]), row.get("facts")) for row in ODD]
    assert sorted(map(repr, seen)) == sorted(map(repr, wanted * 2))


def test_two_closures_of_one_factory_are_two_rewards(tmp_path):
    def worth(value):
        return lambda completions: [value] * len(completions)

    run = train(tmp_path / "run", trainer={"reward": [worth(1.0), worth(5.0)], "num_generations": 2}, max_steps=1)
    assert numbers_of(run)[0]["reward"] == 6.0


def test_the_reference_is_the_base_or_where_the_adapter_begins(tmp_path):
    trainer, first = {"beta": 0.1, "num_generations": 4}, {}
    for reference in ("auto", "base", "initial"):
        adapter = {**LORA, "init_lora_weights": False, "lora_dropout": 0.0}
        run = train(tmp_path / reference, trainer=trainer, adapter=adapter, reference=reference, max_steps=3)
        first[reference], *_, last = [line["kl"] for line in numbers_of(run)]
        assert last > 1e-4
    assert first["initial"] == pytest.approx(0.0, abs=1e-4)
    assert first["auto"] == first["base"] > 1e-3


@pytest.mark.parametrize("method", CONFIGS)
def test_an_option_that_is_null_is_taken_or_refused_with_a_code(method):
    plain = settings_of(method, reward="exact_match")
    for name in [field.name for field in offered_fields(method)]:
        recipe = {**plain, "trainer": {**plain["trainer"], name: None}}
        try:
            check_trainer(Recipe.from_dict(recipe))
        except LuthierError as error:
            assert error.code.startswith("recipe-"), (name, error)


def test_a_step_at_the_end_of_the_rows_counts_the_samples_that_it_has(tmp_path):
    run = train(tmp_path / "run", "online_dpo", rows=ROWS[:5], max_steps=None, num_train_epochs=2.0)
    assert (run.steps, run.samples_seen) == (4, 10)
    other = train(tmp_path / "other", trainer={"num_generations": 2, "num_iterations": 2}, max_tokens_per_device=56)
    assert (other.steps, other.samples_seen) == (2, 8)


class Cut:
    """A callback that ends a run, as a fault would, within one step."""

    def __init__(self, step):
        self.step = step

    @luthier.event
    def step_started(self, run, step):
        if step == self.step:
            raise RuntimeError("cut off")


RESUMED = {
    "answers in use": ({"num_generations": 2, "num_iterations": 2}, {"max_tokens_per_device": 56}, 4),
    "epochs and schedule": (
        {"num_generations": 2, "beta": 0.1, "max_completion_length": 6},
        {"lr_scheduler_type": "cosine", "warmup_steps": 2, "reference": "initial", "logging_steps": 3},
        6,
    ),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_that_was_cut_off_goes_on_to_the_same_numbers(name, tmp_path):
    trainer, settings, cut = RESUMED[name]
    settings = {**settings, "max_steps": 7, "save_steps": 1, "save_total_limit": 1}

    def go(folder, step=None):
        return train(tmp_path / folder, trainer=trainer, callbacks=["jsonl", Cut(step)], **settings)

    whole = go("whole")
    with pytest.raises(RuntimeError, match="cut off"):
        go("run", cut)
    again = go("run")
    assert again.loss_history == whole.loss_history
    assert (again.samples_seen, again.tokens_seen) == (whole.samples_seen, whole.tokens_seen)
    for line, other in zip(numbers_of(again), numbers_of(whole), strict=True):
        assert line.keys() == other.keys()
        numbers = line.keys() - {"timestamp", "step_time"}
        assert {key for key in numbers if line[key] != pytest.approx(other[key], rel=1e-6, nan_ok=True)} == set()


def test_what_a_callback_raises_is_not_put_down_to_trl(tmp_path):
    class Broken:
        @luthier.event
        def step_ended(self, run, step):
            raise ValueError("no such luck")

    with pytest.raises(ValueError, match="no such luck"):
        train(tmp_path / "run", trainer={"num_generations": 2}, callbacks=[Broken()])


REFUSED = [
    ({"trainer": {"use_vllm": True}}, "trainer.use_vllm"),
    ({"trainer": {"learning_rate": 1.0}}, "trainer.learning_rate"),
    ({"trainer": {"num_generations": 1}}, "trl.grpo"),
    ({"trainer": {"num_generations": None}}, "trainer.num_generations"),
    ({"trainer": {"reward": ["exact_match", "exact_match"]}}, "trainer.reward"),
    ({"trainer": {"reward": lambda completions, level: [0.0]}}, "'level'"),
    ({"global_batch_size": len(ROWS) + 1}, "global_batch_size"),
    ({"adapter": {**LORA, "target_modules": ["q_proj", "lm_head"]}}, "adapter.target_modules"),
    ({"adapter": {**LORA, "target_modules": ".*(proj|head)"}}, "adapter.target_modules"),
    ({"adapter": {**LORA, "modules_to_save": ["lm_head"]}}, "adapter.modules_to_save"),
    ({"trainer": {"reward": "nothing"}}, "trainer.reward"),
    ({"lr_scheduler_type": "one_cycle"}, "lr_scheduler_type"),
    ({"precision": "fp16"}, "precision"),
    ({"loss": {"name": "sft", "dft": True}}, "loss"),
    ({"reference": "base"}, "reference"),
    ({"reference": {"model": {"name_or_path": "demo"}}, "trainer": {"beta": 0.1}}, "reference"),
    ({"reference": "base", "adapter": "full", "trainer": {"beta": 0.1}}, "reference"),
    ({"adapter": "prompt"}, "adapter"),
    ({"quantizer": "bitnet"}, "quantizer"),
]


@pytest.mark.parametrize(("changed", "where"), REFUSED, ids=[where for _, where in REFUSED])
def test_what_does_not_map_is_refused_by_name_before_a_folder_appears(changed, where, tmp_path):
    changed = dict(changed)
    with pytest.raises(LuthierError) as caught:
        train(tmp_path / "run", trainer=changed.pop("trainer", {}), **changed)
    assert where in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_plan_checks_the_trainer_and_says_that_it_has_no_numbers(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]))
    recipe = Recipe.from_dict({**settings_of(), "data": {"path": str(tmp_path / "rows.jsonl")}})
    recipe.write(Path(tmp_path / "recipe.yaml"))
    said = command("plan", str(tmp_path / "recipe.yaml"))
    assert "trl.grpo" in said
    assert "takes its own steps" in said


@pytest.mark.parametrize("method", CONFIGS)
def test_a_record_conforms(method):
    record = next(record for record in luthier_trainers() if record.name == f"trl.{method}")
    short = {LENGTHS[method]: 8} | ({} if method == "online_dpo" else {"num_generations": 2})
    example = getattr(luthier_trl, CONFIGS[method])(reward=variety, **short)
    for check in checks_for(record, together=luthier_trainers(), examples=[example], vary=False):
        check()


def test_the_options_are_trls_own_and_named_as_there():
    for name, config in CONFIGS.items():
        options = installed_plugins().options(installed_plugins().get("trainer", f"trl.{name}"))
        assert options.__name__ == config
        assert getattr(luthier_trainers, "__module__", "") == "luthier_trl"
