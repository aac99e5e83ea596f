"""Absurd settings and lost files end in an error of ours before the first step, or are made do with and said."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier import LuthierError
from luthier.data.tokenise.chat_template import load_template
from luthier.runs.writing.record import read_record
from luthier.step.schedule.learning_rates import schedule_rates
from luthier.testing import expect_error
from luthier.testing.worlds import tiny_tokenizer

RAISING = {
    "ZeroDivisionError": "{{ 1 // 0 }}",
    "OverflowError": "{{ 10.0 ** 400 }}",
    "RecursionError": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "UndefinedError": "{{ nobody.there }}",
    "TypeError": "{{ 1 + 'a' }}",
    "MemoryError": "{{ 'a' * (2 ** 62) }}",
    "of its own": "{{ raise_exception('no') }}",
}


@pytest.mark.parametrize("name", RAISING)
def test_a_template_that_raises_anything_refuses_the_row(name, train):
    data = {"train": [], "chat_template": RAISING[name]}
    with pytest.raises(LuthierError) as caught:
        train(**{"data.chat_template": data["chat_template"]})
    assert caught.value.code in ("data-row", "template-unprovable", "data-unsupervised")


@pytest.mark.parametrize("name", RAISING)
def test_a_template_that_raises_is_told_of_with_what_it_raised(name):
    template = load_template(tiny_tokenizer("{% if messages[0]['content'] == 'bad' %}" + RAISING[name] + "{% endif %}"))
    assert template is not None
    with expect_error("data-row") as caught:
        template.render([{"role": "user", "content": "bad"}])
    assert caught.value.code == "data-row"


ANY = (
    st.none() | st.booleans() | st.text(max_size=5) | st.floats() | st.integers() | st.lists(st.integers(), max_size=2)
)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["constant", "linear", "cosine", "one_cycle", "polynomial", "cosine_with_min_lr", "StepLR"]),
    st.dictionaries(st.sampled_from(["min_lr_ratio", "min_lr", "decay_steps", "num_cycles", "pct_start", "div_factor",
                                     "step_size", "gamma", "power", "lr_end"]), ANY, max_size=2),
)  # fmt: skip
def test_any_settings_of_a_schedule_give_rates_or_an_error_of_ours(name, given_settings):
    try:
        rates = schedule_rates(name, 1e-3, 5, 0, given_settings)
    except LuthierError as error:
        assert error.code in ("recipe-wrong-type", "recipe-unknown-option", "recipe-out-of-range", "recipe-conflict")
    else:
        assert len(rates) == 5


def test_a_floor_of_text_is_named(train):
    with pytest.raises(LuthierError, match="bytes") as caught:
        train(lr_scheduler_type="cosine", lr_scheduler_kwargs={"min_lr_ratio": "bytes"})
    assert caught.value.where == "lr_scheduler_kwargs.min_lr_ratio"


def test_a_rank_without_a_launch_is_refused(train, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with expect_error("distributed-setup", "environment", "3", "WORLD_SIZE") as caught:
        train()
    assert caught.value.code == "distributed-setup"


def stopped(train, **changes):
    import luthier

    with pytest.raises(ZeroDivisionError):
        train(
            save_steps=1, max_steps=4, exact_callbacks=[luthier.on(step_ended=lambda step: 1 / (step - 3))], **changes
        )


def test_a_run_that_lost_its_record_goes_on_from_its_checkpoints(train, tmp_path):
    stopped(train)
    (tmp_path / "run" / "run.json").unlink()
    run = train(save_steps=1, max_steps=4)
    straight = train(save_steps=1, max_steps=4, output_dir=tmp_path / "straight")
    assert run.loss_history == straight.loss_history and run.steps == 4
    assert read_record(tmp_path / "run")["state"] == "completed"


def test_checkpoints_of_another_recipe_are_not_gone_on_with_where_the_record_is_lost(train, tmp_path):
    stopped(train)
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(LuthierError) as caught:
        train(save_steps=1, max_steps=4, learning_rate=0.5)
    assert caught.value.code == "checkpoint-other"


@pytest.mark.parametrize("content", ["[1, 2]", "{}", "null", '{"state": 7}', "[" * 100_000, '{"state": "running"}'])
def test_a_record_that_is_none_is_told_of(content, train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(content)
    with expect_error("run-not-found", "run", "run.json"):
        train()
