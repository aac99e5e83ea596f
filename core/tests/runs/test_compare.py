"""Two runs side by side, the curve in characters, and a run's recipe made ready to train again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from luthier.errors import LuthierError
from luthier.recipe import Recipe, recipe_hash
from luthier.runs.chart import BLOCKS, draw_chart
from luthier.runs.compare import compare_runs, draw_both
from luthier.runs.replay import replay_run
from luthier.runs.run_folder import read_folder
from luthier.testing import expect_error


@pytest.fixture
def pair(make):
    one = make("one", learning_rate=1e-4)
    changed = {"versions": {"luthier": "0.1.0", "torch": "2.14.0"}, "data": "other", "threads": 4}
    parts = [{"kind": "adapter", "name": "lora", "distribution": "luthier-lora", "version": "0.2.0"}]
    other = make("two", number=2, learning_rate=3e-4, losses=[3.0, 1.0], record={**changed, "parts": parts})
    return read_folder(one), read_folder(other)


def test_a_run_differs_from_itself_in_nothing(make):
    run = read_folder(make())
    found = compare_runs(run, run)
    assert [found[name] for name in ("options", "parts", "versions", "environment")] == [[], [], [], []]
    assert found["data"]["same"]
    assert all(row["difference"] == 0 for row in found["metrics"])


def test_what_differs_is_named_with_both_values(pair):
    found = compare_runs(*pair)
    assert found["options"] == [{"name": "learning_rate", "a": 1e-4, "b": 3e-4}]
    assert {"name": "adapter", "a": "full 0.1.0", "b": "lora 0.2.0"} in found["parts"]
    assert {"name": "callback mine", "a": "mine of a program", "b": None} in found["parts"]
    assert found["versions"] == [{"name": "torch", "a": "2.13.0", "b": "2.14.0"}]
    assert found["environment"] == [{"name": "threads", "a": 2, "b": 4}]
    assert found["data"] == {"a": "0123456789abcdef", "b": "other", "same": False}
    assert not found["recipe_hash"]["same"]


def test_numbers_stand_side_by_side(pair):
    metrics = {row["name"]: row for row in compare_runs(*pair)["metrics"]}
    assert (metrics["loss"]["a"], metrics["loss"]["b"], metrics["loss"]["difference"]) == (1.0, 1.0, 0.0)
    assert (metrics["steps"]["a"], metrics["steps"]["b"]) == (3, 2)
    assert (metrics["tokens_per_second"]["a"], metrics["tokens_per_second"]["b"]) == (200.0, 150.0)


def test_both_curves_are_drawn_into_one_picture(pair, tmp_path):
    import matplotlib.image

    path = draw_both(*pair, tmp_path / "deep" / "both.png")
    picture = matplotlib.image.imread(path)
    colours = {tuple(pixel) for pixel in (picture.reshape(-1, picture.shape[-1])[:, :3] * 255).astype(int).tolist()}
    assert (31, 119, 180) in colours  # the first of matplotlib's cycle
    assert (255, 127, 14) in colours  # and the second


def test_runs_without_numbers_cannot_be_drawn(make, tmp_path):
    run = read_folder(make(losses=[]))
    with expect_error("run-not-found", "one"):
        draw_both(run, run, tmp_path / "both.png")


def test_a_picture_that_cannot_be_written_is_told(pair, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(LuthierError) as caught:
        draw_both(*pair, tmp_path / "file" / "both.png")
    assert caught.value.code == "path-unwritable"


def test_a_run_without_a_recipe_cannot_be_compared(pair):
    (pair[1].path / "recipe.yaml").unlink()
    with expect_error("run-not-found", "two", "recipe.yaml") as caught:
        compare_runs(*pair)
    assert str(pair[1].path) in caught.value.where


# the curve


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300),
    st.integers(1, 80),
    st.integers(2, 9),
)
def test_a_curve_is_as_wide_and_high_as_it_may_be_and_touches_top_and_bottom(values, width, height):
    lines = draw_chart(list(enumerate(values, 1)), width, height)
    rows = lines[:-1]
    room = max(len(row.split(" ")[0]) for row in rows)
    assert len(rows) == height
    assert all(len(row) <= max(room, 12) + 1 + min(width, len(values)) for row in rows)
    assert set("".join(row[-width:] for row in rows)) <= {*BLOCKS, *"0123456789.-+e "}
    assert rows[-1].rstrip()[-1] in BLOCKS[1:]


def test_a_falling_loss_falls_in_its_picture():
    assert draw_chart([(i, 4.0 - i) for i in range(1, 4)], 10, 2) == ["3 █▁", "1 ██▁", "  1 3"]


def test_one_point_is_one_column():
    assert draw_chart([(7, 2.0)], 10, 2) == ["2", "2 ▁", "  7"]


def test_no_points_give_no_picture():
    assert draw_chart([], 10) == []


# again


def test_the_same_recipe_has_the_same_hash_in_a_fresh_folder(make):
    folder = make(learning_rate=1e-4)
    plan = replay_run(read_folder(folder))
    assert plan.changes == []
    assert plan.to_dict()["recipe_hash"]["same"]
    assert plan.folder == folder.with_name("one-2")
    assert plan.recipe.output_dir == str(plan.folder)
    assert recipe_hash(plan.recipe) == recipe_hash(Recipe.load(folder / "recipe.yaml", environ={}))


def test_changes_are_shown_with_what_was(make):
    plan = replay_run(read_folder(make(learning_rate=1e-4)), ["learning_rate=3e-4", "optimizer.eps=1e-6"])
    assert {c["name"]: (c["was"], c["now"]) for c in plan.changes} == {
        "learning_rate": (1e-4, 3e-4),
        "optimizer.eps": (1e-8, 1e-6),
    }
    assert not plan.to_dict()["recipe_hash"]["same"]
    assert plan.recipe.learning_rate == 3e-4


def test_the_environment_has_no_say(make, monkeypatch):
    monkeypatch.setenv("LUTHIER_LEARNING_RATE", "0.5")
    assert replay_run(read_folder(make())).changes == []


def test_the_number_of_processes_that_a_run_had_is_told(make):
    plan = replay_run(read_folder(make(record={"world_size": 4})))
    assert plan.to_dict()["processes"] == {"was": 4, "now": 1}


def test_an_option_that_is_younger_than_the_run_is_no_change_unless_it_is_given(make):
    folder = make()
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace("oom_recovery: true\n", ""))
    assert replay_run(read_folder(folder)).changes == []
    [change] = replay_run(read_folder(folder), ["oom_recovery=false"]).changes
    assert change == {"name": "oom_recovery", "was": None, "now": False}


def test_a_folder_may_be_named(make, tmp_path):
    assert replay_run(read_folder(make()), (), tmp_path / "elsewhere").folder == tmp_path / "elsewhere"


def test_an_option_that_does_not_exist_is_refused(make):
    with pytest.raises(LuthierError) as caught:
        replay_run(read_folder(make()), ["lerning_rate=1"])
    assert caught.value.code == "recipe-unknown-option"


@pytest.mark.parametrize(
    ("settings", "code", "remedy"),
    [
        ({"data": "python:list"}, "data-not-found", "--set data.train=PATH"),
        ({"model": "python:LlamaForCausalLM"}, "model-not-found", "--set model=NAME"),
    ],
)
def test_what_was_handed_over_in_python_is_asked_for(make, tmp_path, settings, code, remedy):
    folder = make()
    text = (folder / "recipe.yaml").read_text()
    was = {"data": str(tmp_path / "rows.jsonl"), "model": "demo"}
    for name, value in settings.items():
        text = text.replace(f": {was[name]}\n", f": {value}\n")
    (folder / "recipe.yaml").write_text(text)
    with pytest.raises(LuthierError) as caught:
        replay_run(read_folder(folder))
    assert caught.value.code == code
    assert remedy in caught.value.remedy


def test_a_run_without_a_recipe_cannot_be_replayed(make):
    folder = make()
    (folder / "recipe.yaml").write_text("}{")
    with expect_error("run-not-found", "one"):
        replay_run(read_folder(folder))
