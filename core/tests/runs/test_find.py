"""Finding runs by folder, name and abbreviated id."""

import pytest
from luthier.errors import LuthierError
from luthier.runs.find import all_runs, describe_folder, find_run


@pytest.fixture
def runs(make, tmp_path):
    for number, name in enumerate(["alpha", "beta", "deep/er/gamma"], 1):
        make(name, number=number)
    return tmp_path / "runs"


def test_runs_are_listed_the_newest_first_from_below_too(runs):
    assert [run.name for run in all_runs(runs)] == ["gamma", "beta", "alpha"]


def test_a_runs_own_folder_lists_itself_and_what_lies_in_a_run_is_none(runs, make):
    (runs / "alpha" / "checkpoints").mkdir()
    (runs / "alpha" / "inner").mkdir()
    (runs / "alpha" / "inner" / "run.json").write_text("{}")
    assert [run.name for run in all_runs(runs / "alpha")] == ["alpha"]
    assert len(all_runs(runs)) == 3


def test_damaged_runs_are_listed_last_and_other_folders_not_at_all(runs):
    (runs / "other").mkdir()
    (runs / "other" / "thesis.tex").touch()
    (runs / "broken").mkdir()
    (runs / "broken" / "lock").touch()
    assert [run.state for run in all_runs(runs)] == ["completed"] * 3 + ["damaged"]


@pytest.mark.parametrize(
    "name", ["beta", "be", "20260102-030402-abc2", "20260102-030402", "abc2", "ta"], ids=lambda name: name
)
def test_a_name_or_an_id_may_be_abbreviated(runs, name):
    assert find_run(name, runs).name == "beta"


def test_a_path_is_taken_as_it_is_wherever_it_lies(runs, tmp_path):
    assert find_run(str(runs / "deep" / "er" / "gamma"), tmp_path / "nowhere").name == "gamma"


def test_a_whole_name_wins_over_those_that_begin_with_it(runs, make):
    make("alphabet", number=7)
    assert find_run("alpha", runs).name == "alpha"


def test_an_ambiguous_name_lists_what_it_may_be(runs):
    with pytest.raises(LuthierError) as caught:
        find_run("2026", runs)
    assert caught.value.code == "run-ambiguous"
    for name in ("alpha", "beta", "gamma"):
        assert name in caught.value.problem


@pytest.mark.parametrize(
    ("name", "hint"),
    [("bta", "Did you mean beta?"), ("omega", "The newest is gamma; `luthier runs` lists them all."),
     ("20260102-030402-abx2", "gamma")],
)  # fmt: skip
def test_an_unknown_name_is_told_the_runs_that_are_like_it(name, hint, runs, tmp_path):
    with pytest.raises(LuthierError) as caught:
        find_run(name, runs)
    assert caught.value.code == "run-not-found"
    assert hint in caught.value.remedy
    with pytest.raises(LuthierError, match="--dir"):
        find_run("omega", tmp_path / "nowhere")


def test_a_directory_that_is_not_there_holds_no_runs(tmp_path):
    assert all_runs(tmp_path / "nowhere") == []


def test_a_folder_that_is_no_model_says_what_it_is_and_what_to_name(runs, tmp_path):
    assert describe_folder(runs) == f"It holds runs: give one of them, such as {runs / 'beta'}."
    run = runs / "beta"
    assert describe_folder(run) == "It is a run's folder, without a model yet."
    (run / "adapter").mkdir()
    assert f"`luthier merge {run}`" in describe_folder(run)
    (run / "merged").mkdir()
    assert describe_folder(run) == f"It is a run's folder: give {run / 'merged'}."
    newest = run / "checkpoints" / "step-00000002"
    newest.mkdir(parents=True)
    assert str(newest) in describe_folder(newest.parent) and "luthier merge" in describe_folder(newest)
    (run / "adapter" / "adapter_config.json").touch()
    assert "PEFT" in describe_folder(run / "adapter")
    (tmp_path / "models" / "small").mkdir(parents=True)
    assert describe_folder(tmp_path / "models") is None
    (tmp_path / "models" / "small" / "config.json").touch()
    assert (
        describe_folder(tmp_path / "models") == f"It holds models: give one of them, such as {tmp_path}/models/small."
    )
